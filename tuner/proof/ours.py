"""Our own search on a world: the very strategy of `pipetune tune`, fed with records as a study would be."""

from __future__ import annotations

from bench.record import Record
from bench.spec import Plan
from tuner.planning.cost import CostModel
from tuner.proof.world import METRIC, World, bounds_of
from tuner.search.build import build_space
from tuner.search.proposals import Proposals
from tuner.search.resolver import Resolver
from tuner.search.space import Point
from tuner.search.strategy import Stop, Strategy


class Ours:
    """Asks the strategy, and gives it back what the world says."""

    def __init__(self, world: World, seed: int, budget: int) -> None:
        model = CostModel.of_workload(world.shape, world.workload, world.prompt_lens, world.costs)
        resolve = Resolver.of_workload(world.shape, world.workload, world.prompt_lens, world.device_bytes)
        self._space = build_space(bounds_of(world), world.devices, world.shape, model, resolve)
        self._proposals = Proposals("sqlite://", self._space, objectives=(METRIC,), constraints=(), seed=seed)
        self._strategy = Strategy(
            self._space,
            model,
            resolve,
            objectives=(METRIC,),
            constraints=(),
            n_trials=budget,
            seed=seed,
            stop_early=True,
            suggest=self._proposals.suggest,
        )
        self._records: list[Record] = []
        self._point: Point = {}
        self.stopped: str | None = None

    def next(self) -> Plan | None:
        """The plan that the strategy proposes; None when it stops."""
        step = self._strategy.next(self._records)
        if isinstance(step, Stop):
            self.stopped = step.kind
            return None
        self._point = step.point
        return self._space.plan(step.point)

    def tell(self, record: Record) -> None:
        """Takes the run as the record of the trial proposed last."""
        number = self._proposals.start(self._point)
        told = record.model_copy(
            update={"number": len(self._records), "trial_number": number, "params": dict(self._point)}
        )
        self._records.append(told)
        self._proposals.tell(told)
