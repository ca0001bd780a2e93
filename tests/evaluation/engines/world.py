"""A measured landscape of vLLM's plans as a world to search, and the ways to search it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna

from pipetune.bench.errors import StudyError
from pipetune.bench.record import Record
from pipetune.bench.spec import EffectivePlan, Plan
from pipetune.tuner.config.schema import EngineConfig, TuneConfig
from pipetune.tuner.planning.calibration.engine_model import EngineModel
from pipetune.tuner.planning.costs.nominal import NominalCosts
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.space.engine import EngineResolver, build_engine_space, default_point
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Point, SearchSpace
from tests.evaluation.engines.grid import KV_BYTES, EngineDocument, EngineFolder, EngineLandscape, engine_plan
from tests.evaluation.search import drift
from tests.evaluation.search.landscape import usable_runs
from tests.evaluation.search.methods import OURS, Listed, Make
from tests.evaluation.search.ours import Ours
from tests.evaluation.search.world import MeasuredWorld, World, all_timed, throughput


class EngineWorld(MeasuredWorld):
    """An engine's landscape that was measured exhaustively."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            StudyError: the landscape is not complete.
        """
        files = EngineFolder(folder)
        if not files.is_complete:
            raise StudyError(f"{folder}: is not complete; `python -m tests.evaluation.engines measure` goes on with it")
        landscape = files.read()
        assert isinstance(landscape, EngineDocument)
        self.landscape, self.spec = landscape, landscape.spec
        self.name, self.about = self.spec.name, self.spec.about
        self.shape, self.workload = landscape.shape, self.spec.workload
        self.prompt_lens, self.device_bytes = landscape.prompt_lens, landscape.device_bytes
        self.devices, self.has_orders, self.auto_counts = self.spec.device_orders[0], False, None
        self.costs, self.profile_s = NominalCosts(self.shape), 0.0
        records = usable_runs(files.records())
        self._runs = {self.resolve(plan).key: records[cell] for cell, plan in enumerate(self.spec.grid())}
        self.num_plans = len(self._runs)
        self.drift = drift.fit(all_timed(self._runs.values()))
        self._judged = {}

    def resolve(self, plan: Plan) -> EffectivePlan:
        return EffectivePlan(plan=plan, in_flight=len(plan.stages))


class EngineOurs(Ours):
    """The strategy and finals of `pipetune tune --engine vllm`."""

    @staticmethod
    def known(world: World) -> tuple[CostModel, Resolver, SearchSpace]:
        assert isinstance(world, EngineWorld)
        spec, first = world.spec, world.spec.grid()[0]
        assert first.engine is not None
        budgets, seqs = zip(*spec.limits, strict=True)
        config = TuneConfig(
            model=spec.model,
            devices=world.devices,
            workload=world.workload,
            engine=EngineConfig(
                python="python",
                max_num_batched_tokens=tuple(sorted(set(budgets))),
                max_num_seqs=tuple(sorted(set(seqs))),
                kv_cache_memory_bytes=(first.engine.kv_cache_memory_bytes or KV_BYTES,),
                enforce_eager=True,
            ),
        )
        engine: Any = _Resolving(world)
        of = (world.shape, world.workload, world.prompt_lens, world.device_bytes)
        resolve = EngineResolver.of_workload(*of, engine=engine, work=world.workload)
        model = EngineModel.of_workload(world.shape, world.workload, world.prompt_lens)
        space = build_engine_space(config, world.devices, model, resolve)
        kept = [place for place, split in enumerate(space.partitions) if split in spec.partitions]
        lists = {name: getattr(space, name) for name in ("partitions", "replicas", "shards", "orders")}
        return (
            model,
            resolve,
            space.model_copy(update={name: tuple(values[place] for place in kept) for name, values in lists.items()}),
        )

    @staticmethod
    def first(space: SearchSpace) -> tuple[Point, ...]:
        return (default_point(space),)


class _Resolving:
    """What of an engine a space needs."""

    def __init__(self, world: EngineWorld) -> None:
        self._world = world

    def resolve(self, plan: Plan, workload: object) -> EffectivePlan:
        return self._world.resolve(plan)


class GridTpe:
    """Optuna's TPE over the three numbers of a plan, as somebody would set it up who knows Optuna."""

    stopped: str | None = None
    trials: int | None = None

    def __init__(self, world: EngineWorld, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._spec = world.spec
        self._study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        self._trial: optuna.Trial

    def next(self) -> Plan | None:
        spec, self._trial = self._spec, self._study.ask()
        budgets, seqs = (sorted(set(column)) for column in zip(*spec.limits, strict=True))
        place = self._trial.suggest_int("partition", 0, len(spec.partitions) - 1)
        budget = budgets[self._trial.suggest_int("budget", 0, len(budgets) - 1)]
        most = seqs[self._trial.suggest_int("seqs", 0, len(seqs) - 1)]
        return engine_plan(spec.partitions[place], budget, most)

    def recommended(self) -> Plan | None:
        return None

    def tell(self, record: Record) -> None:
        self._study.tell(self._trial, throughput(record))


def shuffled(spec: EngineLandscape, seed: int) -> Iterator[Plan]:
    """Every plan once, in random order."""
    plans = spec.grid()
    yield from random.Random(seed).sample(plans, len(plans))


def default_plan(spec: EngineLandscape) -> Plan:
    """What vLLM does by itself: the even split, with more tokens and sequences than there are."""
    even = min(spec.partitions, key=lambda one: max(one) - min(one))
    return engine_plan(even, *max(spec.limits))


METHODS: dict[str, Make] = {
    OURS: EngineOurs,
    "TPE, default": lambda world, seed, budget: GridTpe(world, seed),
    "random": lambda world, seed, budget: Listed(shuffled(world.spec, seed)),
    "vLLM's defaults": lambda world, seed, budget: Listed(itertools.repeat(default_plan(world.spec), 1)),
}
