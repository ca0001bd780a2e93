"""One model with its sides, traces and limits: what the parts that measure have in common."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.spec import Lane, ModelSpec, Workload
from tests.evaluation.harness import ROOT, say
from tests.evaluation.load.estimates import Limits, limits_of
from tests.evaluation.load.rates_of import best_setting
from tests.evaluation.load.sides import (
    Continuous,
    Ours,
    OurSetting,
    PeerSetting,
    Setting,
    Side,
    Trace,
    serve,
    serve_alone,
)
from tests.evaluation.peers.rig import Rig

TTFT_FACTOR, TPOT_FACTOR = 5.0, 3.0
"""Limits are so many times what a request alone takes on the slower peer."""
PILOT_SEED = 1000
"""Of the trace by which settings are chosen: no round has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model, its requests, and what each side may run with."""

    model: ModelSpec
    input_len: int
    output_len: int
    ours: tuple[OurSetting, ...]
    pair: OurSetting
    """Two stages, for the parts that compare none."""
    peers: tuple[PeerSetting, ...]

    def workload(self, num_prompts: int, *, ratio: float = 0.5) -> Workload:
        """Random prompts and outputs, both of lengths uniform within the ratio."""
        return Workload(
            num_prompts=num_prompts,
            input_len=self.input_len,
            output_len=self.output_len,
            random_range_ratio=ratio,
            random_output_range_ratio=ratio,
        )


def _ours(*rows: tuple[int, tuple[int, ...], int, int]) -> tuple[OurSetting, ...]:
    """Replicas, layers of each stage, rows and slots."""
    return tuple(OurSetting(replicas=own, counts=counts, rows=size, slots=slots) for own, counts, size, slots in rows)


STEADY, GATHERING = (Lane(prefills_per_decode=1),), (Lane(prefills_per_decode=0.5),)
"""Let a step go after each prefill, or two."""


_PEERS = (
    PeerSetting(max_requests=8),
    PeerSetting(max_requests=16),
    PeerSetting(max_requests=16, max_batch_tokens=64),
    PeerSetting(max_requests=32),
    PeerSetting(attention="paged|eager", max_requests=16),
)
SUBJECTS: Mapping[str, Subject] = {
    "smollm2-135m": Subject(
        model=ModelSpec(name="smollm2-135m"),
        input_len=64,
        output_len=16,
        ours=(
            *(OurSetting(replicas=2, counts=(30,), rows=16, slots=1, lanes=own) for own in (STEADY, GATHERING)),
            *_ours((2, (30,), 8, 1), (2, (30,), 16, 1), (1, (30,), 16, 1), (1, (17, 13), 8, 2), (1, (17, 13), 16, 2)),
        ),
        pair=OurSetting(counts=(17, 13), rows=8, slots=2),
        peers=_PEERS,
    ),
    "dummy-llama-12l": Subject(
        model=ModelSpec(name=str(ROOT / "examples" / "dummy-llama-12l"), load_format="dummy"),
        input_len=32,
        output_len=8,
        ours=(
            *(OurSetting(replicas=2, counts=(12,), rows=16, slots=1, lanes=own) for own in (STEADY, GATHERING)),
            *_ours((2, (12,), 8, 1), (2, (12,), 16, 1), (1, (12,), 16, 1), (1, (6, 6), 8, 2), (1, (6, 6), 16, 2)),
        ),
        pair=OurSetting(counts=(6, 6), rows=8, slots=4),
        peers=_PEERS,
    ),
}
DUMMY = "dummy-llama-12l"


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much is measured."""

    rounds: int
    requests: Mapping[str, int]
    """Of a trace, by the subject's name."""
    alone: int
    pilot_share: float
    """Requests of the pilot's trace, as a share of the others'."""
    pilot_runs: int
    """Of each setting, at most."""
    pilot_tolerance: float
    runs: int
    """Of each side in a round, at most."""
    tolerance: float
    is_short: bool = False
    """Whether sides have a setting or two, in place of their grids."""


FULL = Extent(
    rounds=5,
    requests={"smollm2-135m": 150, DUMMY: 500},
    alone=8,
    pilot_share=0.5,
    pilot_runs=8,
    pilot_tolerance=0.1,
    runs=7,
    tolerance=0.03,
)
QUICK = Extent(
    rounds=1,
    requests={"smollm2-135m": 16, DUMMY: 24},
    alone=2,
    pilot_share=1.0,
    pilot_runs=2,
    pilot_tolerance=0.3,
    runs=3,
    tolerance=0.2,
    is_short=True,
)


@dataclass(kw_only=True)
class Lab:
    """A subject's processes, started when first needed."""

    subject: Subject
    extent: Extent
    requests: int
    given: Limits | None = None
    """Limits that are not looked for."""
    origin: str = "given"
    """Where those come from, in words."""
    order: random.Random = field(default_factory=lambda: random.Random(0))
    used: dict[str, Setting] = field(default_factory=dict)
    _limits: Limits | None = None

    def __enter__(self) -> Self:
        resolved = resolve_model(self.subject.model)
        self.vocab_size = _vocab_size(resolved.folder)
        self.rig = Rig(self.subject.model, on_start=say)
        is_short = self.extent.is_short
        peers = self.subject.peers[:1] if is_short else self.subject.peers
        self.ours = Ours(
            rig=self.rig, grid=(self.subject.pair, self.subject.ours[0]) if is_short else self.subject.ours
        )
        self.one = Continuous(rig=self.rig, grid=peers, size=1)
        self.two = Continuous(rig=self.rig, grid=peers, size=2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rig.__exit__(kind, error, trace)

    @property
    def sides(self) -> tuple[Side, ...]:
        """All that are compared."""
        return self.ours, self.one, self.two

    def describe(self) -> str:
        """What is served, and within which limits, in words."""
        subject, limits = self.subject, self.limits
        found = f"{TTFT_FACTOR:g} and {TPOT_FACTOR:g} times a request alone on the slower peer"
        return (
            f"{subject.model.name.rpartition('/')[2]}: {self.requests} requests a trace, {subject.input_len} tokens in "
            f"and {subject.output_len} out, each ± 50 %; ttft {limits.ttft:g} ms and tpot {limits.tpot:g} ms "
            f"({self.origin if self.given else found})"
        )

    def trace(self, seed: int, count: int | None = None) -> Trace:
        """Requests with gaps of this seed; the prompts are the same for all."""
        from pipetune.bench.worker.prompts import random_prompts

        workload = self.subject.workload(count or self.requests)
        return Trace.drawn(
            random_prompts(workload, self.vocab_size),
            workload.generated_lens,
            max_len=2 * (self.subject.input_len + self.subject.output_len),
            seed=seed,
        )

    @property
    def pilot(self) -> Trace:
        """The trace by which settings are chosen."""
        return self.trace(PILOT_SEED, max(round(self.requests * self.extent.pilot_share), 8))

    @property
    def limits(self) -> Limits:
        """Fixed before any rate is measured: multiples of what a request alone takes on the slower peer."""
        if self._limits is None:
            self._limits = self.given or self._find_limits()
            say(f"limits: ttft {self._limits.ttft:g} ms, tpot {self._limits.tpot:g} ms")
        return self._limits

    def _find_limits(self) -> Limits:
        peers = (self.one, self.two)
        alone = [serve_alone(side, side.settings()[0], self.pilot, self.extent.alone, used=self.used) for side in peers]
        return limits_of(alone, ttft_factor=TTFT_FACTOR, tpot_factor=TPOT_FACTOR)

    def share(self, side: Side, setting: Setting, trace: Trace, rate: float) -> float:
        """The share of requests that keep the limits, measured."""
        share = self.limits.share(serve(side, setting, trace, rate, used=self.used))
        say(f"{side.name}, {setting.name}: {share:.1%} at {rate:g} requests/s")
        return share

    def capacity(self, side: Side, setting: Setting) -> float:
        """Requests a second when all are there at once."""
        trace = self.pilot
        served = serve(side, setting, trace, None, used=self.used)
        return len(served) / max(one.times_s[-1] for one in served)

    def choose(self, side: Side) -> tuple[Setting, float, list[tuple[str, float | None]]]:
        """A side's best setting, by the pilot's trace, its rate there, and what was seen of each."""
        trace, extent = self.pilot, self.extent
        best, rate, seen = best_setting(
            side.settings(),
            lambda setting, at: self.share(side, setting, trace, at),
            guess=0.7 * self.capacity(side, side.settings()[0]),
            tolerance=extent.pilot_tolerance,
            most=extent.pilot_runs,
        )
        say(f"{side.name}: {best.name} is taken of {len(seen)} settings; the rounds begin at {rate:.3g} requests/s")
        return best, rate, [(setting.name, found) for setting, found in seen]


def _vocab_size(folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)
