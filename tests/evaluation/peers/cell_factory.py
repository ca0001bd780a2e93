"""Cells as a run would leave them, made of given durations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipetune.bench.machine.hardware import read_machine
from pipetune.bench.spec import ModelSpec, Workload
from tests.evaluation.peers.values import Cell, Contest, Frozen, Round, Sample, Setting

WORKLOAD = Workload(num_prompts=4, input_len=8, output_len=10)
QUIET = (0.1, 0.2, 0.3)


def make_round(number: int, durations: Mapping[str, float | None], contest: Contest = "generate") -> Round:
    """One round; a duration of None is a pass that failed."""
    return Round(
        contest=contest,
        number=number,
        order=tuple(durations),
        samples=tuple(
            Sample(
                side=side,
                duration_s=duration,
                tokens_per_s=None if duration is None else 40.0 / duration,
                load_before=QUIET,
                load_after=QUIET,
                idle_cpu_s=0.0,
                error=None if duration is not None else "it fell over",
            )
            for side, duration in durations.items()
        ),
        started_at=f"2026-01-0{number + 1}T00:00:00+00:00",
        git_revision=None,
    )


def make_cell(rounds: Sequence[Round] = (), *, absent: Mapping[str, str] | None = None, identity: str = "same") -> Cell:
    """A cell of this machine with a setting for every side that has a sample."""
    sides = {sample.side for one in rounds for sample in one.samples}
    return Cell(
        identity=identity,
        model=ModelSpec(name="examples/some-model"),
        workload_name="balanced",
        workload=WORKLOAD,
        quick=False,
        seed=0,
        machine=read_machine(),
        frozen={side: Frozen(setting=Setting(rows=4), tokens_differ=0) for side in sorted(sides)},
        absent=dict(absent or {}),
        rounds=tuple(rounds),
    )
