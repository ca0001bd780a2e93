"""The sides of a comparison: each runs one pass of a workload under a setting of its own, by way of the rig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipetune.bench.errors import PipetuneError
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.record import Failure, Measurement
from pipetune.bench.spec import EffectivePlan, Plan, Protocol, Workload
from tests.evaluation.peers.group import Kind, PeerError, PeerGroup
from tests.evaluation.peers.rig import DEVICES, Rig
from tests.evaluation.peers.values import Contest, Setting
from tests.workers import worker_pids

PASS_TIMEOUT_S = 600.0
TRUTH_TEXTS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What one pass gave."""

    duration_s: float
    pids: tuple[int, ...]
    """Of the processes at work."""
    tokens: tuple[tuple[int, ...], ...] | None = None
    """By given index."""
    scores: tuple[tuple[float, ...], ...] | None = None
    """Log-probabilities of each text's tokens but the first."""
    measurement: Measurement | None = None


class SideError(Exception):
    """A pass that failed; says why."""


class OurSide:
    """Our runtime: a plan on a fleet of its own."""

    def __init__(self, rig: Rig, name: str, workload: Workload, *, fleet: str, **switches: Any) -> None:
        """
        Args:
            fleet: name of the fleet in the rig; sides that run the same plan share one.
            switches: of the plan, as `packed_weights`, and `replicas` and `instrument`.
        """
        self.name, self._rig, self._workload, self._fleet_name = name, rig, workload, fleet
        self._instrument = bool(switches.pop("instrument", True))
        self._replicas = int(switches.pop("replicas", 1))
        self._switches = switches

    @property
    def generates(self) -> bool:
        """Whether tokens come of it."""
        return self._workload.kind == "generate"

    @property
    def experiment(self) -> Experiment:
        """The workers and their runs; started here if they are not yet."""
        try:
            return self._rig.experiment(self._fleet_name)
        except PipetuneError as error:
            raise SideError(str(error)) from error

    @property
    def fleet(self) -> Fleet:
        """The workers."""
        return self.experiment.fleet

    def plan(self, setting: Setting) -> Plan:
        """The plan that a setting means."""
        total = self.fleet.shape.num_layers
        counts = (total,) if setting.cut is None else (setting.cut, total - setting.cut)
        plan = Plan.from_layer_counts(
            counts,
            DEVICES,
            setting.rows,
            prefill_micro_batch_size=setting.prefill_rows,
            prefill_chunk_size=setting.prefill_tokens,
            replicas=self._replicas,
        )
        return plan.model_copy(update=self._switches)

    def warm_up(self, setting: Setting) -> None:
        """Moves to the plan and runs a short pass.

        Raises:
            SideError: it failed.
        """
        few = min(self._workload.num_prompts, 2 * len(DEVICES))
        rows = max(1, few // len(DEVICES))
        short = self._workload.model_copy(update={"num_prompts": few, "output_len": min(2, self._workload.output_len)})
        self._pass(setting.model_copy(update={"rows": rows, "prefill_rows": None}), short)

    def run(self, setting: Setting) -> Pass:
        """One pass, timed from the prompts to the last token.

        Raises:
            SideError: it failed.
        """
        return self._pass(setting, self._workload)

    def _pass(self, setting: Setting, workload: Workload) -> Pass:
        protocol = Protocol(
            num_iters=1, num_iters_warmup=0, instrument=self._instrument, check_outputs=False, timeout_s=PASS_TIMEOUT_S
        )
        effective = self._resolve(setting, workload)
        try:
            record = self.experiment.measure(effective.plan, workload, protocol, resolved=effective)
        except PipetuneError as error:
            raise SideError(str(error)) from error
        outcome = record.result
        if isinstance(outcome, Failure):
            raise SideError(f"{outcome.kind.value}: {outcome.message}")
        return Pass(
            duration_s=outcome.iterations[0].duration_s,
            pids=worker_pids(self.fleet),
            measurement=outcome if self._instrument else None,
        )

    def tokens(self, setting: Setting) -> tuple[tuple[int, ...], ...]:
        """Greedy tokens under a setting, which warms the fleet up for it as well.

        Raises:
            SideError: it failed.
        """
        effective = self._resolve(setting, self._workload)
        try:
            results = self.fleet.generate(
                effective.plan,
                self.fleet.prompts(self._workload),
                max_new_tokens=self._workload.output_len,
                in_flight=effective.in_flight,
                ignore_eos=True,
            )
        except PipetuneError as error:
            raise SideError(str(error)) from error
        return tuple(result.token_ids for result in results)

    def _resolve(self, setting: Setting, workload: Workload) -> EffectivePlan:
        try:
            effective = self.fleet.resolve(self.plan(setting), workload)
        except PipetuneError as error:
            raise SideError(str(error)) from error
        if isinstance(effective, Failure):
            raise SideError(effective.message)
        return effective


class PeerSide:
    """A peer: one command for a group of processes, or for some of them."""

    def __init__(
        self,
        rig: Rig,
        name: str,
        workload: Workload,
        *,
        kind: Kind,
        size: int,
        command: str,
        ranks: Sequence[int] | None = None,
        all_cores: bool = False,
        **args: Any,
    ) -> None:
        """
        Args:
            size: processes of the group.
            ranks: those that get the command; None for all.
            args: of the command, beside workload, rows and cut.
        """
        self.name, self._rig, self.workload = name, rig, workload
        self._kind, self._size, self._all_cores = kind, size, all_cores
        self._command, self._ranks, self._args = command, ranks, args

    def warm_up(self, setting: Setting) -> None:
        """Starts the processes and runs a short pass: memory, thread pools, kernels.

        Raises:
            SideError: it failed.
        """
        few = min(self.workload.num_prompts, 2 * self._size)
        short = self.workload.model_copy(update={"num_prompts": few, "output_len": min(2, self.workload.output_len)})
        self._pass(setting.model_copy(update={"rows": max(1, few // self._size)}), short)

    def run(self, setting: Setting) -> Pass:
        """One pass, timed from the last process's start to the last one's end.

        Raises:
            SideError: it failed; its processes start anew when they are next asked.
        """
        return self._pass(setting, self.workload)

    def _pass(self, setting: Setting, workload: Workload) -> Pass:
        args = {**self._args, "workload": workload.model_dump(mode="json"), "rows": setting.rows}
        if setting.cut is not None:
            args["cut"] = setting.cut
        group: PeerGroup | None = None
        try:
            group = self._rig.group(self._kind, size=self._size, all_cores=self._all_cores, sleeps=bool(setting.sleeps))
            answers = group.request(self._command, args, ranks=self._ranks, timeout_s=PASS_TIMEOUT_S)
        except PeerError as error:
            if group is not None:
                self._rig.drop(group)
            raise SideError(str(error)) from error
        by_index = {int(index): row for answer in answers for index, row in answer.get("tokens", {}).items()}
        scores = next((answer["scores"] for answer in answers if answer.get("scores")), None)
        return Pass(
            duration_s=max(answer["ended_s"] for answer in answers) - min(answer["began_s"] for answer in answers),
            pids=tuple(group.pids[rank] for rank in self._ranks or range(self._size)),
            tokens=tuple(tuple(by_index[index]) for index in sorted(by_index)) if by_index else None,
            scores=None if scores is None else tuple(tuple(row) for row in scores),
        )


Side = OurSide | PeerSide
SIDES_OF: dict[Contest, tuple[str, ...]] = {
    "generate": ("hf_one", "hf_all", "hf_two", "hf_pp", "single", "single_plain", "pipeline", "replicas"),
    "score": ("gpipe", "score_pipeline", "score_single"),
    "instrument": ("pipeline", "pipeline_bare"),
}
INSTRUMENTED = "pipeline"
ALONE: dict[str, Any] = {"share": False, "together": False}


def sides_of(contest: Contest, rig: Rig, workload: Workload, *, extras: bool) -> tuple[Side, ...]:
    """The sides of a contest; of those that generate, the first says what is right.

    Args:
        extras: our single stage without packed weights runs as well.
    """
    scoring = workload.model_copy(update={"kind": "score"})
    pipeline = OurSide(rig, INSTRUMENTED, workload, fleet="pipeline")
    if contest == "generate":
        return (
            PeerSide(rig, "hf_one", workload, kind="hf", size=2, ranks=[0], command="generate", **ALONE),
            PeerSide(rig, "hf_all", workload, kind="hf", size=1, all_cores=True, command="generate", **ALONE),
            PeerSide(rig, "hf_two", workload, kind="hf", size=2, command="generate", share=True, together=True),
            PeerSide(rig, "hf_pp", workload, kind="pp", size=2, command="generate", share=False, together=True),
            OurSide(rig, "single", workload, fleet="single"),
            *((OurSide(rig, "single_plain", workload, fleet="single_plain", packed_weights=False),) if extras else ()),
            pipeline,
            OurSide(rig, "replicas", workload, fleet="replicas", replicas=2),
        )
    if contest == "score":
        return (
            PeerSide(rig, "gpipe", scoring, kind="gpipe", size=2, command="gpipe"),
            OurSide(rig, "score_pipeline", scoring, fleet="pipeline"),
            OurSide(rig, "score_single", scoring, fleet="single"),
        )
    return (pipeline, OurSide(rig, "pipeline_bare", workload, fleet="pipeline", instrument=False))


def score_truth(rig: Rig, workload: Workload) -> tuple[tuple[float, ...], ...] | None:
    """Log-probabilities of the first few texts by the unsplit model.

    Raises:
        SideError: it failed.
    """
    few = workload.model_copy(update={"num_prompts": min(workload.num_prompts, TRUTH_TEXTS)})
    side = PeerSide(rig, "truth", few, kind="hf", size=1, all_cores=True, command="score")
    return side.run(Setting(rows=few.num_prompts)).scores
