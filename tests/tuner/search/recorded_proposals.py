"""What the search proposes over recorded runs: two studies, the landscapes, and spaces of simulated machines.

`python -m tests.tuner.search.recorded_proposals REASON` records anew what `tests/data/proposals.json` holds: when the
cost model or a rule of the strategy is changed on purpose, and with the reason.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipetune.bench.profile import Profile
from pipetune.bench.record import Measurement, Record
from pipetune.bench.spec import EffectivePlan, Plan
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.ranking.finals import before_finals
from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.policy.strategy import Strategy
from pipetune.tuner.search.policy.tpe import TpePolicy
from pipetune.tuner.search.space.build import build_space
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.files import load_study
from pipetune.tuner.study.search_log import Proposal, Stop
from tests.evaluation.search.landscape import LandscapeFolder
from tests.evaluation.search.simulated import SimulatedWorld, simulated_worlds
from tests.evaluation.search.world import bounds_of, read_profile

ROOT = Path(__file__).resolve().parents[3]
RECORDED = ROOT / "tests" / "data" / "proposals.json"
_CELL = re.compile(r'"params":\{"cell":(\d+),"repeat":(\d+)\}')

Lines = list[str]
"""What is said step by step; what is said several times in a row stands once."""


def study_proposals(folder: str, **asked: Any) -> Lines:
    """After each of a study's records, what would run next."""
    study = load_study(ROOT / folder)
    assert study.shape is not None
    config = study.config.model_copy(update=asked)
    lens = next(record.result.prompt_lens for record in study.records if isinstance(record.result, Measurement))
    profile = ROOT / folder / "profile.json"
    costs = ProfiledCosts(Profile.model_validate_json(profile.read_bytes())) if profile.exists() else None
    model = CostModel.of_workload(study.shape, config.workload, lens, costs)
    memory = dict.fromkeys(config.concrete_devices, 8 * 2**30)
    resolve = Resolver.of_workload(study.shape, config.workload, lens, memory)
    space = SearchSpace.model_validate_json((ROOT / folder / "space.json").read_bytes())
    searching = _Searching(
        (space, model, resolve),
        objectives=config.objectives,
        constraints=config.constraints,
        n_trials=config.n_trials,
        seed=config.seed,
        stop_early=config.stop_early,
    )
    said = Lines()
    for count in range(len(study.records) + 1):
        records = before_finals(study.records[:count])
        searching.restore(records)
        text, _ = searching.next(records)
        if text not in said[-1:]:
            said.append(text)
    return [*said, searching.preferred(before_finals(study.records))]


def landscape_proposals(name: str, *, seed: int, **asked: Any) -> Lines:
    """A search over what was measured, trial by trial."""
    folder = ROOT / "results" / "landscapes" / name
    landscape = LandscapeFolder(folder).read()
    spec, shape = landscape.spec, landscape.shape
    model = CostModel.of_workload(shape, spec.workload, landscape.prompt_lens, ProfiledCosts(read_profile(folder)))
    resolve = Resolver.of_workload(shape, spec.workload, landscape.prompt_lens, landscape.device_bytes)
    world: Any = SimpleNamespace(
        devices=spec.device_orders[0],
        micro_batch_sizes=spec.micro_batch_sizes,
        has_orders=len(spec.device_orders) > 1,
    )
    space = build_space(bounds_of(world), spec.device_orders[0], shape, model, resolve)
    runs = dict(_runs(folder / "runs.jsonl.gz"))
    cells = {_key(resolve(plan)): cell for cell, plan in enumerate(spec.plans(shape))}
    searching = _Searching(
        (space, model, resolve),
        **{"objectives": ("output_throughput",), "constraints": (), "stop_early": True, "seed": seed, **asked},
    )
    visits = Counter[int]()

    def run(plan: Plan) -> Record:
        cell = cells[_key(resolve(plan))]
        visits[cell] += 1
        return Record.model_validate_json(runs[cell, seed + visits[cell] - 1])

    return [_space_text(space), *searching.play(run)]


def simulated_space(world: SimulatedWorld, *, any_order: bool = False) -> Lines:
    """The space of a simulated machine of four or eight devices."""
    bounds = bounds_of(world).model_copy(
        update={"device_order": "auto" if any_order else "given", "replicas": None, "min_stages": 2}
    )
    model = CostModel.of_workload(world.shape, world.workload, world.prompt_lens, world.costs)
    resolve = Resolver.of_workload(world.shape, world.workload, world.prompt_lens, world.device_bytes)
    return [_space_text(build_space(bounds, world.devices, world.shape, model, resolve))]


def simulated_proposals(world: SimulatedWorld, *, seed: int, **asked: Any) -> Lines:
    """A search of a simulated machine, whose partitions are too many to list: refits bring further cuts."""
    model = CostModel.of_workload(world.shape, world.workload, world.prompt_lens, world.costs)
    resolve = Resolver.of_workload(world.shape, world.workload, world.prompt_lens, world.device_bytes)
    space = build_space(bounds_of(world), world.devices, world.shape, model, resolve)
    searching = _Searching(
        (space, model, resolve), objectives=("output_throughput",), constraints=(), seed=seed, stop_early=True, **asked
    )
    return searching.play(lambda plan: world.run(plan, 0, seed))


class _Searching:
    """A strategy with Optuna's TPE beside it."""

    def __init__(
        self,
        built: tuple[SearchSpace, CostModel, Resolver],
        *,
        objectives: Sequence[str],
        constraints: Sequence[Constraint],
        seed: int,
        **asked: Any,
    ) -> None:
        self._space, _, self._resolve = built
        self._study = OptunaStudy.open("sqlite://", self._space, objectives=objectives, constraints=constraints)
        tpe = TpePolicy(self._space, objectives=objectives, seed=seed, trials=self._study.trials)
        self.strategy = Strategy(
            *built,
            objectives=objectives,
            constraints=constraints,
            seed=seed,
            suggest=tpe.suggest,
            **asked,
        )

    def restore(self, records: Sequence[Record]) -> None:
        self._study.restore(records)

    def next(self, records: Sequence[Record]) -> tuple[str, Proposal | Stop]:
        step = self.strategy.next(records)
        if isinstance(step, Stop):
            return f"{step.kind}: {step.text}", step
        plan = self._space.plan(step.point)
        point = " ".join(f"{name}={value}" for name, value in sorted(step.point.items()))
        predicted = " ".join(f"{name}={value:.4g}" for name, value in sorted(step.predicted.items()))
        return f"{step.kind} | {point} | {plan.describe()} | {step.reason} | {predicted}", step

    def preferred(self, records: Sequence[Record]) -> str:
        return " ".join(self.strategy.preferred(records)[:5])

    def play(self, run: Callable[[Plan], Record]) -> Lines:
        """Searches to the end."""
        said, records = Lines(), list[Record]()
        while True:
            text, step = self.next(records)
            said.append(text)
            if isinstance(step, Stop):
                return [*said, self.preferred(records)]
            told = {"number": len(records), "role": "trial", "trial_number": len(records), "params": dict(step.point)}
            records.append(run(self._space.plan(step.point)).model_copy(update=told))
            self.restore(records)


def _space_text(space: SearchSpace) -> str:
    """The best partitions with their devices, and a digest of all that is listed."""
    listed = space.model_dump_json(exclude={"study_id"})
    first = " ".join(str(counts) for counts in space.partitions[:3])
    return f"{len(space.partitions)} partitions, {first} …, sha256 {hashlib.sha256(listed.encode()).hexdigest()[:16]}"


def _runs(path: Path) -> Iterator[tuple[tuple[int, int], str]]:
    """Runs by plan and repeat, unread."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            found = _CELL.search(line)
            assert found is not None, f"{path}: {line[:80]}"
            yield (int(found[1]), int(found[2])), line


def _key(resolved: object) -> str:
    assert isinstance(resolved, EffectivePlan), resolved
    return resolved.key


CASES: Mapping[str, Callable[[], Lines]] = {
    "the reference study": lambda: study_proposals("results/reference-smollm2-2cpu"),
    "a study before replicas": lambda: study_proposals("tests/data/study-before-replicas", n_trials=30),
    "prefill-heavy": lambda: landscape_proposals("smollm2-prefill-heavy", seed=1, n_trials=16, stop_early=False),
    "decode-heavy, two objectives and a limit": lambda: landscape_proposals(
        "smollm2-decode-heavy",
        seed=2,
        n_trials=14,
        objectives=("output_throughput", "mean_ttft_ms"),
        constraints=(Constraint.model_validate("p90_ttft_ms<=500"),),
    ),
    "unlike layers": lambda: landscape_proposals("unlike-layers", seed=0, n_trials=40),
    "unlike devices": lambda: landscape_proposals("unlike-devices", seed=3, n_trials=40),
    "simulated, 4 stages": lambda: simulated_proposals(simulated_worlds()[1], seed=0, n_trials=9),
    "space of 8 unlike devices": lambda: simulated_space(simulated_worlds()[2], any_order=True),
}


def main() -> None:
    """Records all cases anew."""
    reason = " ".join(sys.argv[1:])
    if not reason:
        sys.exit("give the reason for which the proposals are recorded anew")
    document = {"recorded_because": reason, "cases": {name: case() for name, case in CASES.items()}}
    RECORDED.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
