"""What a comparison with the peers consists of, as frozen values: settings, passes, rounds, and the file of a cell.

A *cell* is one model under one workload. Its *sides* are the ways to run it: ours and the peers'. A *contest* is a set
of sides that are compared with each other; a *round* runs each side of a contest once, in random order.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipetune.bench.record import Machine, Measurement
from pipetune.bench.spec import ModelSpec, Value, Workload

SCHEMA_VERSION = 1

Contest = Literal["generate", "score", "instrument"]


class Setting(Value):
    """What a side may choose for itself; None where it has no say."""

    rows: int
    """Sequences computed together: the batch, or the micro-batch of a pipeline."""
    prefill_rows: int | None = None
    """… while prompts are read, where that differs."""
    prefill_tokens: int | None = None
    """Tokens of a prompt read at a time; None for whole prompts."""
    cut: int | None = None
    """First layer of the second stage."""
    sleeps: bool | None = None
    """Whether threads that wait for each other sleep (`OMP_WAIT_POLICY=PASSIVE`) or spin; None leaves it to torch."""

    def describe(self) -> str:
        """For people: `32 rows, prefill 8, cut before 16`."""
        parts = [f"{self.rows} rows"]
        if self.prefill_rows not in (None, self.rows):
            parts.append(f"prefill {self.prefill_rows}")
        if self.prefill_tokens is not None:
            parts.append(f"chunks of {self.prefill_tokens}")
        if self.cut is not None:
            parts.append(f"cut before {self.cut}")
        if self.sleeps:
            parts.append("threads that wait sleep")
        return ", ".join(parts)


class Tried(Value):
    """One run of the search for a side's best setting."""

    setting: Setting
    duration_s: float | None
    error: str | None = None


class Frozen(Value):
    """A side's own best setting, with all that was tried; it stays the same for every round."""

    setting: Setting
    tried: tuple[Tried, ...] = ()
    tokens_differ: int | None = None
    """Prompts whose greedy tokens are not those of `generate` on the unsplit model; None where not compared."""
    max_error: float | None = None
    """Largest difference of a text's log-probabilities from the unsplit model's; None where not compared."""


class Sample(Value):
    """One timed pass of one side."""

    side: str
    duration_s: float | None
    """From the prompts to the last token; None for a pass that failed."""
    tokens_per_s: float | None
    """Generated tokens, or scored ones, by that time."""
    load_before: tuple[float, float, float]
    """Load averages of the machine over 1, 5 and 15 minutes."""
    load_after: tuple[float, float, float]
    idle_cpu_s: float
    """CPU time that the waiting processes of all other sides took meanwhile."""
    error: str | None = None
    measurement: Measurement | None = None
    """The whole record, where our runtime was instrumented on two stages."""


class Round(Value):
    """Every side of a contest once."""

    contest: Contest
    number: int
    order: tuple[str, ...]
    """As they ran: drawn from the seed, the contest and the number."""
    samples: tuple[Sample, ...]
    started_at: str
    """UTC, ISO 8601."""
    git_revision: str | None


class Replan(Value):
    """One move of layers between the two stages of a running fleet."""

    from_cut: int
    to_cut: int
    ready_s: float
    """From the command to the first pass: layers loaded, links and KV made, output checked with the reference."""
    load_s: float
    check_s: float | None
    layers: int
    """Layers loaded."""


class Cell(Value):
    """One model under one workload: all that was measured of it, raw. One file."""

    schema_version: int = SCHEMA_VERSION
    identity: str
    """Digest of what must be equal for a resume: question, seed and versions; the hardware stands in `machine`."""
    model: ModelSpec
    workload_name: str
    workload: Workload
    quick: bool
    seed: int
    machine: Machine
    tokens: tuple[tuple[int, ...], ...] | None = None
    """What `generate` on the unsplit model gave, prompt by prompt: what every side is compared with."""
    frozen: dict[str, Frozen] = Field(default_factory=dict)
    absent: dict[str, str] = Field(default_factory=dict)
    """Sides that could not run, and why."""
    rounds: tuple[Round, ...] = ()
    replans: tuple[Replan, ...] = ()

    def of_contest(self, contest: Contest) -> tuple[Round, ...]:
        """Rounds of one contest, in order."""
        return tuple(one for one in self.rounds if one.contest == contest)
