"""What the GPUs are: their copy bandwidth, their matrix rate, and what NVML says of them under load."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch

from pipetune.bench.machine.sensors import Sensors
from pipetune.bench.machine.telemetry import read_telemetry, sensors_for
from tests.evaluation.gpu.context import Context

COPY_BYTES = 4 * 2**30
MATRIX = 8192
REPEATS = 10
LOAD_PRODUCTS = 1500
NEEDED = ("clock_mhz", "temperature_c", "power_w", "memory_used_bytes")


def run(context: Context) -> None:
    """Both ceilings by events, then the sensors around a load of some seconds."""
    device = torch.device("cuda", 0)
    free, _ = torch.cuda.mem_get_info(device)
    size = min(COPY_BYTES, free // 4)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _seconds(partial(target.copy_, source))
    # Read once and written once.
    context.row(what="copy bandwidth", value=round(2 * size / copy_s / 1e9, 1), unit="GB/s")
    left, right = (torch.randn((MATRIX, MATRIX), device=device, dtype=torch.bfloat16) for _ in range(2))
    product = partial(torch.mm, left, right)
    product_s = _seconds(product)
    context.row(what="bf16 matrix product", value=round(2 * MATRIX**3 / product_s / 1e12, 1), unit="TFLOP/s")
    context.row(what="GPUs", value=torch.cuda.device_count(), unit="")
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    context.row(what="NCCL", value=".".join(map(str, nccl)), unit="")
    _telemetry(context, product, max(1, min(LOAD_PRODUCTS, round(3.0 / product_s))))


def _telemetry(context: Context, work: Callable[[], object], count: int) -> None:
    sensors: Sensors = sensors_for(["cuda:0"])
    before = sensors.state()
    sensors.start()
    for _ in range(count):
        work()
    torch.cuda.synchronize()
    telemetry = read_telemetry(sensors, before)
    after = telemetry.after[0].model_dump(exclude={"device"})
    for name, value in {**after, "energy_j": telemetry.energy_j, "gpu_utilization": telemetry.gpu_utilization}.items():
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
        context.row(what=f"NVML {name}", value=shown, unit="")
    missing = [name for name in NEEDED if after[name] is None]
    context.aim(
        "NVML gives clock, temperature, power and memory",
        not missing,
        f"not {', '.join(missing)}" if missing else "all of them",
    )


def _seconds(work: Callable[[], object]) -> float:
    """Median of single runs by events, after some that warm up."""
    for _ in range(3):
        work()
    times: list[float] = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
