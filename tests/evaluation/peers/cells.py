"""One cell, run: each side's own setting is found and frozen, then the rounds; saved after every step."""

from __future__ import annotations

import datetime as dt
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipetune.bench.errors import FleetError
from pipetune.bench.machine.hardware import git_revision
from tests.evaluation.peers import store
from tests.evaluation.peers.budget import Budget
from tests.evaluation.peers.candidates import Search, search_of
from tests.evaluation.peers.climb import best_of, climb
from tests.evaluation.peers.compare import SIDES
from tests.evaluation.peers.replan import measure_replans
from tests.evaluation.peers.rig import Rig
from tests.evaluation.peers.sides import (
    INSTRUMENTED,
    SIDES_OF,
    OurSide,
    Pass,
    PeerSide,
    Side,
    SideError,
    score_truth,
    sides_of,
)
from tests.evaluation.peers.values import Cell, Contest, Frozen, Replan, Round, Sample, Setting, Tried

SAME_SETTING = {"hf_pp": "hf_one", "single_plain": "single", "pipeline_bare": "pipeline"}
"""Sides that take the setting of another over: those that differ from it by one switch alone; and transformers' own
pipeline, of which one stage works at a time, so that it computes just what one process does, batch for batch."""
INSTRUMENT_ROUNDS = 2
"""A difference of 1 % wants more pairs: so many times as many."""


CONTESTS: tuple[Contest, ...] = ("generate", "score", "instrument")


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much of a cell is measured."""

    pairs: int
    """Rounds of each contest."""
    extras: bool
    """Packed weights, instrumentation and re-planning as well."""
    only: tuple[str, ...] = ()
    """Sides that run; none means all."""

    def rounds(self, contest: Contest) -> int:
        """How many rounds a contest has."""
        compared = [side for side in SIDES_OF[contest] if not self.only or side in self.only]
        if len(compared) < 2 or (contest == "instrument" and not self.extras):
            return 0
        return INSTRUMENT_ROUNDS * self.pairs if contest == "instrument" else self.pairs

    def left(self, cell: Cell | None) -> int:
        """Rounds that a cell still lacks."""
        return sum(max(self.rounds(name) - (len(cell.of_contest(name)) if cell else 0), 0) for name in CONTESTS)


class CellRun:
    """Brings one cell forward."""

    def __init__(
        self, cell: Cell, path: Path, rig: Rig, *, extent: Extent, budget: Budget, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            cell: as far as it got.
            path: its file.
            say: told of every step.
        """
        self.cell = cell
        self._path, self._rig, self._extent, self._budget, self._say = path, rig, extent, budget, say
        self._last: dict[str, Pass] = {}

    def run(self) -> None:
        """Goes on until every contest has its rounds.

        Raises:
            OutOfTimeError: the budget does not reach for what comes next; what was done is saved.
        """
        for contest in CONTESTS:
            if len(self.cell.of_contest(contest)) < self._extent.rounds(contest):
                self._contest(contest)
        if self._extent.rounds("instrument") and not self.cell.replans and INSTRUMENTED in self.cell.frozen:
            self._replan()

    def _contest(self, contest: Contest) -> None:
        sides = [
            side
            for side in sides_of(contest, self._rig, self.cell.workload, extras=self._extent.extras)
            if not self._extent.only or side.name in self._extent.only
        ]
        if not self.cell.of_contest(contest):
            self._forget_absent(sides)
        for side in sides:
            if side.name not in self.cell.absent:
                self._ready(side)
        present = [side for side in sides if side.name in self.cell.frozen and side.name not in self.cell.absent]
        if len(present) < 2:
            self._say(f"{contest}: fewer than two sides run, nothing to compare")
            return
        for number in range(len(self.cell.of_contest(contest)), self._extent.rounds(contest)):
            self._budget.demand(sum(self._expected_s(side.name) for side in present))
            self._round(contest, number, present)

    def _forget_absent(self, sides: list[Side]) -> None:
        """A side that did not run gets another chance as long as no round went without it."""
        names = {side.name for side in sides}
        self._keep(absent={side: why for side, why in self.cell.absent.items() if side not in names})

    def _ready(self, side: Side) -> None:
        """Finds a side's setting if that was not done yet, and warms the side up for it."""
        try:
            if side.name in self.cell.frozen:
                self._budget.demand(self._expected_s(side.name))
                side.warm_up(self.cell.frozen[side.name].setting)
            else:
                self._freeze(side)
        except SideError as error:
            self._say(f"{SIDES[side.name]}: does not run: {error}")
            self._keep(absent={**self.cell.absent, side.name: str(error)})

    def _freeze(self, side: Side) -> None:
        tried: tuple[Tried, ...] = ()
        if side.name in SAME_SETTING:
            other = self.cell.frozen.get(SAME_SETTING[side.name])
            if other is None:
                raise SideError(f"needs the setting of {SIDES[SAME_SETTING[side.name]]}, which did not run")
            setting = other.setting
            side.warm_up(setting)
        else:
            search = self._search(side)
            self._budget.demand(0.0)
            side.warm_up(search.start)
            tried = climb(
                search.start, search.knobs, lambda candidate: self._try(side, candidate), max_runs=search.max_runs
            )
            best = best_of(tried)
            if best is None:
                raise SideError(tried[0].error or "no setting ran")
            setting = best.setting
        frozen = Frozen(setting=setting, tried=tried)
        frozen = self._compared(side, frozen)
        self._say(f"{SIDES[side.name]}: {setting.describe()} ({len(tried)} tried)")
        self._keep(frozen={**self.cell.frozen, side.name: frozen})

    def _search(self, side: Side) -> Search:
        try:
            shape = self._rig.experiment("pipeline").fleet.shape
        except FleetError as error:
            raise SideError(str(error)) from error
        workload = self.cell.workload
        if side.name in ("gpipe", "score_pipeline", "score_single"):
            workload = workload.model_copy(update={"kind": "score"})
        return search_of(side.name, shape, workload, quick=self.cell.quick)

    def _try(self, side: Side, setting: Setting) -> Tried:
        self._budget.demand(0.0)
        try:
            done = side.run(setting)
        except SideError as error:
            return Tried(setting=setting, duration_s=None, error=str(error))
        self._last[side.name] = done
        self._say(f"{SIDES[side.name]}: {setting.describe()}: {done.duration_s:.2f} s")
        return Tried(setting=setting, duration_s=round(done.duration_s, 6))

    def _compared(self, side: Side, frozen: Frozen) -> Frozen:
        """Compares what a side gives with what the unsplit model gives."""
        last = self._last.get(side.name)
        if isinstance(side, PeerSide) and last is not None and last.scores is not None:
            truth = score_truth(self._rig, side.workload)
            pairs = zip(truth or (), last.scores, strict=False)
            errors = [abs(a - b) for own, other in pairs for a, b in zip(own, other, strict=True)]
            return frozen.model_copy(update={"max_error": max(errors, default=None)})
        tokens = last.tokens if last is not None else None
        if isinstance(side, OurSide) and side.generates:
            tokens = side.tokens(frozen.setting)
        if side.name == "hf_one" and tokens is not None:
            self._keep(tokens=tokens)
        truth_tokens = self.cell.tokens
        if tokens is None or truth_tokens is None:
            return frozen
        return frozen.model_copy(update={"tokens_differ": _differing(tokens, truth_tokens)})

    def _round(self, contest: Contest, number: int, present: list[Side]) -> None:
        order = [side.name for side in present]
        random.Random(f"{self.cell.seed}/{contest}/{number}").shuffle(order)
        by_name = {side.name: side for side in present}
        started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        samples = tuple(self._sample(contest, by_name[name]) for name in order)
        done = Round(
            contest=contest,
            number=number,
            order=tuple(order),
            samples=samples,
            started_at=started,
            git_revision=git_revision(Path(__file__).parents[2]),
        )
        self._keep(rounds=(*self.cell.rounds, done))
        rates = ", ".join(f"{one.side} {one.tokens_per_s:.1f}" for one in samples if one.tokens_per_s)
        self._say(f"{contest}, round {number + 1} of {self._extent.rounds(contest)}, tok/s: {rates}")

    def _sample(self, contest: Contest, side: Side) -> Sample:
        load_before, cpu_before = os.getloadavg(), self._rig.cpu_s()
        done: Pass | None = None
        error = None
        try:
            done = side.run(self.cell.frozen[side.name].setting)
        except SideError as failure:
            error = str(failure)
        cpu_after = self._rig.cpu_s()
        busy = done.pids if done is not None else tuple(cpu_after)
        idle = sum(cpu_after[pid] - cpu_before.get(pid, 0.0) for pid in cpu_after if pid not in busy)
        if done is not None and done.tokens is not None:
            self._note_tokens(side.name, done.tokens)
        workload = self.cell.workload
        tokens = workload.num_prompts * (workload.input_len if contest == "score" else workload.output_len)
        return Sample(
            side=side.name,
            duration_s=None if done is None else round(done.duration_s, 6),
            tokens_per_s=None if done is None else round(tokens / done.duration_s, 3),
            load_before=load_before,
            load_after=os.getloadavg(),
            idle_cpu_s=round(idle, 2),
            error=error,
            measurement=done.measurement if done is not None and side.name == INSTRUMENTED else None,
        )

    def _note_tokens(self, side: str, tokens: tuple[tuple[int, ...], ...]) -> None:
        """Peers give their tokens with every pass; the worst counts."""
        if self.cell.tokens is None:
            return
        frozen = self.cell.frozen[side]
        differ = max(_differing(tokens, self.cell.tokens), frozen.tokens_differ or 0)
        self._keep(frozen={**self.cell.frozen, side: frozen.model_copy(update={"tokens_differ": differ})})

    def _replan(self) -> None:
        cut = self.cell.frozen[INSTRUMENTED].setting.cut
        assert cut is not None
        try:
            replans: tuple[Replan, ...] = measure_replans(self._rig, cut)
        except SideError as error:
            self._say(f"re-planning was not measured: {error}")
            return
        self._say("re-plan: " + ", ".join(f"{one.ready_s:.2f} s" for one in replans))
        self._keep(replans=replans)

    def _expected_s(self, side: str) -> float:
        """What a pass of a side took at last; nothing if it is not known."""
        durations = [one.duration_s for one in self.cell.frozen[side].tried if one.duration_s]
        if not durations and side in SAME_SETTING:
            return self._expected_s(SAME_SETTING[side])
        return min(durations, default=0.0)

    def _keep(self, **changes: object) -> None:
        self.cell = self.cell.model_copy(update=changes)
        store.save(self._path, self.cell)


def _differing(tokens: tuple[tuple[int, ...], ...], truth: tuple[tuple[int, ...], ...]) -> int:
    """Prompts with other tokens than they should have."""
    return sum(own != other for own, other in zip(tokens, truth, strict=True))
