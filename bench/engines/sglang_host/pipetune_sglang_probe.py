"""What runs inside SGLang's schedulers, as one of its plugins: when batches compute, memory, the layers held.

Never run yet. It hooks by what SGLang offers plugins; times of GPUs are brought to the clock of all processes.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_on: list[tuple[Any, Any, float]] = []
"""While batches are noted: the device's module, an event, and when that was on the clock of all processes."""
_noted: list[tuple[Any, Any, int, int]] = []
"""Events at the begin and the end of each batch, its requests and its tokens."""


def plugin() -> None:
    """Called by SGLang in each of its processes, before a scheduler is made."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation"
    HookRegistry.register(target, timed, HookType.AROUND)
    for method in (pipetune_install, pipetune_begin, pipetune_end):
        setattr(Scheduler, method.__name__, method)


def timed(inner: Callable[..., Any], worker: Any, batch: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Runs a stage's layers on a batch, behind whatever it waits for, and notes it."""
    if not _on or batch is None:
        return inner(worker, batch, *args, **kwargs)
    rows = batch.batch_size()
    tokens = batch.extend_num_tokens if batch.forward_mode.is_extend() else rows
    begin, end = (_on[0][0].Event(enable_timing=True) for _ in range(2))
    begin.record()
    try:
        return inner(worker, batch, *args, **kwargs)
    finally:
        end.record()
        _noted.append((begin, end, rows, tokens))


def pipetune_install(scheduler: Any, folder: str) -> None:
    """Tells which layers this worker holds, and the size of its KV cache."""
    layers = scheduler.tp_worker.model_runner.layer_info
    kv_bytes = int(scheduler.token_to_kv_pool_allocator.get_kvcache().mem_usage * 2**30)
    held = {"first_layer": layers.start_layer, "end_layer": layers.end_layer}
    _tell(folder, {**held, "kv_bytes": kv_bytes, "baseline_bytes": 0})


def pipetune_begin(scheduler: Any, folder: str) -> None:
    """Starts to note batches, and the peak of memory anew."""
    device = scheduler.device_module
    device.synchronize()
    device.reset_peak_memory_stats()
    zero = device.Event(enable_timing=True)
    zero.record()
    zero.synchronize()
    _noted.clear()
    _on[:] = [(device, zero, time.monotonic())]
    _tell(folder, {})


def pipetune_end(scheduler: Any, folder: str) -> None:
    """Tells what was noted, and the allocator's peak meanwhile."""
    ((device, zero, zero_s),) = _on
    _on.clear()
    device.synchronize()
    spans = [
        ("compute", *(zero_s + 1e-3 * zero.elapsed_time(event) for event in (begin, end)), *sizes)
        for begin, end, *sizes in _noted
    ]
    _tell(folder, {"spans": spans, "peak_bytes": device.max_memory_allocated()})


def _tell(folder: str, answer: dict[str, Any]) -> None:
    from sglang.srt.runtime_context import get_parallel

    stage, shard = get_parallel().pp_rank, get_parallel().tp_rank
    whole = Path(folder) / f"{stage:04}-{shard:04}.json"
    part = whole.with_suffix(".part")
    part.write_text(json.dumps({"stage": stage, "shard": shard, **answer}))
    part.replace(whole)
