"""Measures a landscape: all plans in random order, again and again, and those near the best more often."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipetune.bench.errors import FleetError
from pipetune.bench.files import write_durably
from pipetune.bench.fleet.experiment import Experiment, Labels
from pipetune.bench.record import Failure, Measurement, Record
from pipetune.bench.spec import Plan
from pipetune.tuner.planning.costs.profile_cache import grid_for
from tests.evaluation.harness import findable, module_command
from tests.evaluation.search.landscape import (
    Landscape,
    LandscapeFolder,
    LandscapeSpec,
    cell_of,
    is_undisturbed,
    usable_runs,
)
from tests.evaluation.search.world import throughput

MOST_VISITS = 3


def measure_landscape(
    spec: LandscapeSpec,
    folder: Path,
    *,
    timeout_s: float,
    most_visits: int = MOST_VISITS,
    say: Callable[[str], None] = print,
) -> bool:
    """Goes on until the landscape is complete or time is up.

    Args:
        most_visits: a run that something disturbed is made again, so often in all.

    Returns:
        Whether it is complete.

    Raises:
        ModelError, ConfigError, FleetError: as the fleet does.
    """
    files = LandscapeFolder(folder)
    if files.is_complete:
        plans = spec.plans(files.read().shape)
        if not any(True for _ in _left(spec, len(plans), files.records(), most_visits)):
            return True
        files.reopen()
    began = time.monotonic()
    devices = spec.device_orders[0]
    with Experiment.start(spec.model, devices, worker_env=spec.worker_env) as experiment:
        fleet = experiment.fleet
        lens = fleet.prompt_lens(spec.workload)
        files.begin(
            Landscape(
                spec=spec,
                shape=fleet.shape,
                machine=fleet.machine,
                device_bytes=fleet.device_bytes,
                prompt_lens=lens,
                auto_counts=_auto_counts(spec),
            )
        )
        failure = experiment.make_reference(folder / "reference.safetensors", spec.workload, spec.protocol)
        if failure is not None:
            raise FleetError(failure)
        plans = spec.plans(fleet.shape)
        records = list(files.records())
        for cell, repeat in _left(spec, len(plans), records, most_visits):
            if time.monotonic() - began > timeout_s:
                say(f"{spec.name}: time is up after {len(records)} runs; the next call goes on")
                return False
            record = _run(experiment, spec, plans[cell], len(records), cell, repeat)
            files.append(record)
            records.append(record)
            if len(records) % 20 == 0:
                say(f"{spec.name}: {len(records)} runs, the last took {record.wall_s:.1f} s")
    (folder / "reference.safetensors").unlink(missing_ok=True)
    files.pack(records)
    return True


def profile_landscape(spec: LandscapeSpec, folder: Path, *, say: Callable[[str], None] = print) -> None:
    """Profiles the model on the landscape's devices for its workload, as a study would before its first trial.

    Raises:
        ModelError, ConfigError, FleetError: as the fleet does.
    """
    with Experiment.start(spec.model, spec.device_orders[0], worker_env=spec.worker_env) as experiment:
        fleet = experiment.fleet
        grid = grid_for(
            spec.workload,
            fleet.prompt_lens(spec.workload),
            micro_batch_sizes=spec.micro_batch_sizes,
            prefill_sizes=spec.micro_batch_sizes,
            chunk_sizes=(None,),
        )
        profile = fleet.profile(grid)
    write_durably(folder / "profile.json", profile.model_dump_json(indent=1) + "\n")
    say(f"{spec.name}: profiled in {profile.took_s:.0f} s")


def _left(
    spec: LandscapeSpec, num_cells: int, records: Sequence[Record], most_visits: int
) -> Iterator[tuple[int, int]]:
    """Cells to run: every plan, then those near the best again and again.

    Repeat by repeat, each in an order of its own; those that were disturbed once more at the end. `records` may grow
    meanwhile.
    """
    yield from _undone(spec, range(num_cells), range(spec.repeats), records, most_visits)
    near = _near(spec, records)
    yield from _undone(spec, near, range(spec.repeats, spec.near_repeats), records, most_visits)


def _near(spec: LandscapeSpec, records: Sequence[Record]) -> list[int]:
    """Plans to be told apart more finely, by the runs that all plans have."""
    first = [record for record in records if cell_of(record)[1] < spec.repeats]
    runs = usable_runs([record for record in first if isinstance(record.result, Measurement)])
    means = {cell: statistics.fmean(throughput(record) for record in rows) for cell, rows in runs.items()}
    best = max(means.values())
    return sorted(cell for cell, mean in means.items() if mean >= (1 - spec.near) * best)


def _undone(
    spec: LandscapeSpec, plans: Sequence[int], repeats: range, records: Sequence[Record], most_visits: int
) -> Iterator[tuple[int, int]]:
    cells = [
        cell
        for repeat in repeats
        for cell in random.Random(f"{spec.seed}-{repeat}").sample([(plan, repeat) for plan in plans], len(plans))
    ]
    for visit in range(most_visits):
        visits = Counter(cell_of(record) for record in records)
        done = {cell_of(record) for record in records if is_undisturbed(record) or isinstance(record.result, Failure)}
        yield from [cell for cell in cells if visits[cell] <= visit and cell not in done]


def _auto_counts(spec: LandscapeSpec) -> tuple[int, ...]:
    command = module_command("tests.evaluation.peers.auto_map", spec.model.name, str(len(spec.device_orders[0])))
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=findable(os.environ))
    return tuple(json.loads(done.stdout))


def _run(experiment: Experiment, spec: LandscapeSpec, plan: Plan, number: int, cell: int, repeat: int) -> Record:
    protocol = spec.protocol if repeat == 0 else spec.protocol.model_copy(update={"check_outputs": False})
    labels: Labels = {"number": number, "role": "trial", "params": {"cell": cell, "repeat": repeat}}
    return experiment.measure(plan, spec.workload, protocol, **labels)
