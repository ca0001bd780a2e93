"""Our own search on a world: the very strategy and finals of `pipetune tune`, fed with records as a study would be."""

from __future__ import annotations

from pipetune.bench.record import Record
from pipetune.bench.spec import Plan
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.ranking import finals
from pipetune.tuner.ranking.rank import rank
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.policy.strategy import Strategy
from pipetune.tuner.search.policy.tpe import TpePolicy
from pipetune.tuner.search.space.build import build_space
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.search_log import Stop
from tests.evaluation.search.world import METRIC, World, bounds_of

_OBJECTIVES = (Objective(metric=METRIC),)
FINALISTS, MIN_ROUNDS, MAX_ROUNDS = (
    TuneConfig.model_fields[name].default for name in ("finalists", "finalist_rounds", "max_finalist_rounds")
)
"""As a study has them when nothing else is asked."""


class Ours:
    """Asks the strategy, then holds the finals, and gives both back what the world says."""

    def __init__(self, world: World, seed: int, budget: int) -> None:
        """
        Args:
            budget: runs in all; the longest finals are within it.
        """
        model, resolve, self._space = self.known(world)
        self._study = OptunaStudy.open("sqlite://", self._space, objectives=(METRIC,), constraints=())
        tpe = TpePolicy(self._space, objectives=(METRIC,), seed=seed, trials=self._study.trials)
        self._strategy = Strategy(
            self._space,
            model,
            resolve,
            objectives=(METRIC,),
            constraints=(),
            n_trials=max(1, budget - FINALISTS * MAX_ROUNDS),
            seed=seed,
            stop_early=True,
            first=self.first(self._space),
            suggest=tpe.suggest,
        )
        self._seed = seed
        self._records: list[Record] = []
        self._point: Point = {}
        self._finalists: finals.Finalists | None = None
        self._due: finals.Due | None = None
        self._best: Plan | None = None
        self.trials: int | None = None
        self.stopped: str | None = None

    @staticmethod
    def known(world: World) -> tuple[CostModel, Resolver, SearchSpace]:
        """What is known before any plan has run."""
        model = CostModel.of_workload(world.shape, world.workload, world.prompt_lens, world.costs)
        resolve = Resolver.of_workload(world.shape, world.workload, world.prompt_lens, world.device_bytes)
        return model, resolve, build_space(bounds_of(world), world.devices, world.shape, model, resolve)

    @staticmethod
    def first(space: SearchSpace) -> tuple[Point, ...]:
        """Points that are run before the model is asked."""
        return ()

    def next(self) -> Plan | None:
        """The plan that the strategy proposes, or whose turn it is in the finals; None when these have ended."""
        if self._finalists is None:
            step = self._strategy.next(self._records)
            if not isinstance(step, Stop):
                self._point = step.point
                return self._space.plan(step.point)
            self.stopped, self.trials = step.kind, len(self._records)
            self._finalists = finals.choose(
                self._records,
                _OBJECTIVES,
                (),
                count=FINALISTS,
                preferred=self._strategy.preferred(self._records),
            )
            self._hold()
        return None if self._due is None else self._finalists.plan(self._due.name).plan

    def tell(self, record: Record) -> None:
        """Takes the run as the record of the trial proposed last, or of the round of the finals."""
        if self._due is not None:
            told = {"role": "finalist", "round": self._due.round, "trial_number": None, "params": None}
            self._add(record, told)
            self._hold()
            return
        told = {"role": "trial", "trial_number": self._study.ask(self._point), "params": dict(self._point)}
        self._study.tell(self._add(record, told))
        self._rank()

    def recommended(self) -> Plan | None:
        """What a study would: by its trials until the finals have ended, and by these then."""
        return self._best

    def _add(self, record: Record, told: dict[str, object]) -> Record:
        added = record.model_copy(update={"number": len(self._records), **told})
        self._records.append(added)
        return added

    def _hold(self) -> None:
        assert self._finalists is not None
        step = finals.next_step(
            self._records,
            self._finalists,
            objectives=_OBJECTIVES,
            min_rounds=MIN_ROUNDS,
            max_rounds=MAX_ROUNDS,
            seed=self._seed,
        )
        self._due = step if isinstance(step, finals.Due) else None
        if self._due is None:
            self._rank()

    def _rank(self) -> None:
        best = rank(self._records, _OBJECTIVES, (), (MIN_ROUNDS, MAX_ROUNDS)).best
        assert best is not None, "every run of a world is a measurement"
        self._best = best.plan
