"""What is asked: which models, workloads and sides, how many rounds; one question for each cell."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from pipetune.bench.errors import ConfigError
from pipetune.bench.record import Machine
from pipetune.bench.spec import ModelSpec, Workload
from tests.evaluation.harness import ROOT
from tests.evaluation.peers import store
from tests.evaluation.peers.budget import cell_s
from tests.evaluation.peers.cells import Extent
from tests.evaluation.peers.compare import SIDES

MODELS = {
    "smollm2-135m": ModelSpec(name="smollm2-135m"),
    "dummy-llama-24l": ModelSpec(name=str(ROOT / "examples" / "dummy-llama-24l"), load_format="dummy"),
}
WORKLOADS = {
    "prefill-heavy": Workload(num_prompts=16, input_len=256, output_len=4),
    "balanced": Workload(num_prompts=64, input_len=64, output_len=16),
    "decode-heavy": Workload(num_prompts=64, input_len=16, output_len=32),
}
QUICK_WORKLOADS = {
    "prefill-heavy": Workload(num_prompts=8, input_len=128, output_len=4),
    "balanced": Workload(num_prompts=16, input_len=64, output_len=8),
    "decode-heavy": Workload(num_prompts=16, input_len=16, output_len=16),
}
QUICK_MODEL = "dummy-llama-24l"
MIN_PAIRS = 5
QUICK_PAIRS = 3
EXTRAS = "balanced"
"""The workload under which instrumentation and re-planning are measured as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One cell to be filled."""

    model_name: str
    model: ModelSpec
    workload_name: str
    workload: Workload
    extent: Extent
    identity: str
    path: Path

    def estimate_s(self) -> float | None:
        """How long it takes from the beginning; None where the model's size is not known beforehand."""
        return cell_s(self.model, self.workload, rounds=self.extent.pairs, extras=self.extent.extras)


def read_questions(args: argparse.Namespace, machine: Machine) -> list[Question]:
    """The cells that the command's arguments ask for, model by model.

    Raises:
        ConfigError: a model, workload or side that there is not.
    """
    names = args.models or (QUICK_MODEL if args.quick else ",".join(MODELS))
    workloads = _workloads(args)
    extras = (names.partition(",")[0], EXTRAS if EXTRAS in workloads else next(iter(workloads)))
    only = tuple(args.sides.split(",")) if args.sides else ()
    unknown = sorted(set(only) - set(SIDES))
    if unknown:
        raise ConfigError(f"--sides: {unknown[0]!r} is none of {', '.join(SIDES)}")
    pairs = args.pairs or (QUICK_PAIRS if args.quick else MIN_PAIRS)
    questions = []
    for name in names.split(","):
        model = MODELS.get(name)
        config = ""
        if model is None:
            folder = Path(name)
            if not (folder / "config.json").is_file():
                raise ConfigError(f"--models: {name!r} is none of {', '.join(MODELS)}, nor a folder with a config.json")
            has_weights = any(folder.glob("*.safetensors"))
            model = ModelSpec(name=str(folder.resolve()), load_format="auto" if has_weights else "dummy")
        if (Path(model.name) / "config.json").is_file():
            config = (Path(model.name) / "config.json").read_text(encoding="utf-8")
        for workload_name, workload in workloads.items():
            identity = store.identity_of(
                model=model.model_copy(update={"name": name}),
                workload=workload,
                seed=args.seed,
                quick=args.quick,
                packages=machine.software.packages,
                config_text=config,
                sides=only,
            )
            questions.append(
                Question(
                    model_name=name,
                    model=model,
                    workload_name=workload_name,
                    workload=workload,
                    extent=Extent(pairs=pairs, extras=(name, workload_name) == extras, only=only),
                    identity=identity,
                    path=store.path_of(store.folder_of(args.output, machine), model, workload_name, quick=args.quick),
                )
            )
    return questions


def _workloads(args: argparse.Namespace) -> dict[str, Workload]:
    if args.workload:
        try:
            prompts, tokens_in, tokens_out = (int(part) for part in args.workload.split("x"))
            return {"custom": Workload(num_prompts=prompts, input_len=tokens_in, output_len=tokens_out)}
        except ValueError as error:
            raise ConfigError(f"--workload {args.workload!r}: write three numbers, as 4x16x4") from error
    known = QUICK_WORKLOADS if args.quick else WORKLOADS
    chosen = {}
    for name in args.workloads.split(","):
        if name not in known:
            raise ConfigError(f"--workloads: {name!r} is none of {', '.join(known)}")
        chosen[name] = known[name]
    return chosen
