"""One family of causal LMs, split by the real stages and compared with itself unsplit; or how it is refused.

`python -m tests.families.survey --write docs/models.md` surveys them all and writes the table; `--only llama,gpt2`
looks at some of them, and with both, their rows are written anew.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils.logging import disable_progress_bar

from pipetune.bench.errors import ModelError, PlanError
from pipetune.bench.memory import ModelShape, check_plan, stage_bytes
from pipetune.bench.models.describe import build_on_meta, describe_model
from pipetune.bench.models.resolve import ResolvedModel, resolve_model
from pipetune.bench.runtime.job import MicroBatchInputs
from pipetune.bench.runtime.stage.kv_cache import SlotCache
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.runtime.stage.unsplit import load_unsplit
from pipetune.bench.spec import ModelSpec, Plan, StagePlan
from tests.families.configs import FAMILIES, UNBUILDABLE, tiny_config
from tests.families.pool import survey_all
from tests.families.result import Survey
from tests.families.table import write_table
from tests.families.unsplit import CPU, NEW_TOKENS, PADDED_LENGTHS, Case, difference, steps

TOLERANCE = 1e-4


def survey_family(family: str) -> Survey:
    """Surveys one family in this process; whatever it does comes back as a verdict, unless it ends the process."""
    began = time.process_time()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="pipetune-") as scratch:
        warnings.simplefilter("ignore")
        found = _survey(family, Path(scratch))
    return found.model_copy(update={"cpu_s": round(time.process_time() - began, 2)})


def survey_on_one_core(family: str) -> Survey:
    """The same for a process of its own, beside which others run."""
    torch.set_num_threads(1)
    return survey_family(family)


def _survey(family: str, folder: Path) -> Survey:
    known: dict[str, Any] = {"family": family}
    try:
        config = tiny_config(family)
        config.save_pretrained(folder)
        resolved = resolve_model(ModelSpec(name=str(folder), load_format="dummy"))
    except Exception as error:
        return _unbuildable(known, error)
    known["architecture"] = resolved.architecture
    try:
        shape = describe_model(resolved)
    except ModelError as error:
        return _refused(resolved, known, error)
    except Exception as error:
        return Survey(**known, verdict="wrong", reason=f"describe_model: {_words(error)}")
    try:
        model = load_unsplit(resolved, ("cpu:0",))
        known["notes"] = _notes(model, shape)
    except Exception as error:
        return Survey(**known, verdict="wrong", reason=f"dummy weights: {_words(error)}")
    try:
        cases = Case.both(model)
        cases["unpadded"].check_sensitive(model)
    except Exception as error:
        return Survey(**known, verdict="does not run unsplit", reason=_words(error))
    how = cases["padded"].how
    known["notes"] += (f"unsplit with {how}",) if how else ()
    known["forbidden_cuts"] = shape.forbidden_cuts
    try:
        return _split(resolved, shape, model, cases, folder / "saved", known)
    except Exception as error:
        return Survey(**known, verdict="wrong", reason=_words(error))


def _unbuildable(known: Mapping[str, Any], error: BaseException) -> Survey:
    reason = UNBUILDABLE.get(known["family"]) or _words(error)
    return Survey(**known, verdict="config does not build", reason=reason)


def _refused(resolved: ResolvedModel, known: Mapping[str, Any], refusal: ModelError) -> Survey:
    """A family that is refused, unless it was transformers that could not build it."""
    refused = Survey(**known, verdict="refused", reason=str(refusal))
    try:
        build_on_meta(resolved)
    except ModelError as error:
        if str(error) == str(refusal):
            return _unbuildable(known, error.__cause__ or error)
        reason = UNBUILDABLE.get(str(known["family"])) or _words(error)
        return refused.model_copy(update={"notes": (f"does not build: {reason}",)})
    try:
        # Not dummy weights: they need the list of layers, which may be what is lacking.
        torch.manual_seed(0)
        untyped: Any = transformers.AutoModelForCausalLM
        Case.both(untyped.from_config(tiny_config(str(known["family"]))).eval())
    except Exception as error:
        return refused.model_copy(update={"notes": (f"does not run unsplit: {_words(error)}",)})
    return refused


def _words(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:240]


def some_splits(num_layers: int, forbidden: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """Cuts to try: uneven ones in two, three and four parts, and all that are allowed at once.

    The last are every boundary there is; the others leave stages of several layers.
    """
    allowed = [cut for cut in range(1, num_layers) if cut not in set(forbidden)]
    if not allowed:
        return ()
    first, middle, last = allowed[0], allowed[len(allowed) // 2], allowed[-1]
    chosen = ((middle,), (first, last), (first, *allowed[1:2], last), allowed)
    return tuple(dict.fromkeys(tuple(sorted(set(cuts))) for cuts in chosen))


def _plan(cuts: Sequence[int], num_layers: int) -> Plan:
    bounds = (0, *cuts, num_layers)
    stages = tuple(
        StagePlan(device=f"cpu:{index}", first_layer=first, end_layer=end)
        for index, (first, end) in enumerate(itertools.pairwise(bounds))
    )
    return Plan(stages=stages, micro_batch_size=len(PADDED_LENGTHS))


def _stages(resolved: ResolvedModel, plan: Plan) -> list[Stage]:
    stages = []
    for index, part in enumerate(plan.stages):
        stage = Stage(resolved, CPU)
        stage.assign(part.first_layer, part.end_layer, is_first=index == 0, is_last=index == len(plan.stages) - 1)
        stages.append(stage)
    return stages


def _split(
    resolved: ResolvedModel,
    shape: ModelShape,
    model: Any,
    cases: Mapping[str, Case],
    saved: Path,
    known: dict[str, Any],
) -> Survey:
    """Every split with dummy weights, and one more from a saved checkpoint; forbidden cuts must be refused."""
    for cut in shape.forbidden_cuts:
        _check_refused(shape, cut)
    splits = some_splits(shape.num_layers, shape.forbidden_cuts)
    assert splits, "no cut is allowed, and the model is not refused"
    errors: dict[str, float] = {}
    accounting = ""
    for cuts in splits:
        plan = _plan(cuts, shape.num_layers)
        check_plan(shape, plan)
        stages = _stages(resolved, plan)
        errors |= _compare(stages, cases, f"{plan.layer_counts}")
        accounting = accounting or _accounting(shape, plan, stages)
    try:
        model.save_pretrained(saved)
        # Of a model of several parts, a text model saves its own part of the config alone; the hub has the whole.
        shutil.copy(resolved.folder / "config.json", saved)
        loaded = resolve_model(ModelSpec(name=str(saved)))
        again = Case.both(load_unsplit(loaded, ("cpu:0",)))
    except Exception as error:
        words = _words(error).replace(str(saved), "…")
        known["notes"] += (f"transformers cannot load what it saved ({words})",)
    else:
        plan = _plan(splits[len(splits) // 3], shape.num_layers)
        errors |= _compare(_stages(loaded, plan), again, f"{plan.layer_counts} from a checkpoint")
    largest = max(errors.values())
    wrong = "; ".join(f"{name} {error:.1e}" for name, error in errors.items() if error > TOLERANCE)
    return Survey(
        **known,
        verdict="wrong" if wrong else "close" if largest > 0.0 else "equal",
        max_error=largest if largest < float("inf") else None,
        splits=tuple(_plan(cuts, shape.num_layers).layer_counts for cuts in splits),
        reason=wrong,
        accounting=accounting,
    )


def _check_refused(shape: ModelShape, cut: int) -> None:
    try:
        check_plan(shape, _plan((cut,), shape.num_layers))
    except PlanError as error:
        message = str(error)
    else:
        raise AssertionError(f"a cut before layer {cut} is forbidden, and a plan with it is not refused")
    assert "possible cuts" in message, message


def _compare(stages: Sequence[Stage], cases: Mapping[str, Case], what: str) -> dict[str, float]:
    return {
        f"{what} {name}": difference(_split_logits(stages, case.inputs), case.expected) for name, case in cases.items()
    }


def _split_logits(stages: Sequence[Stage], inputs: MicroBatchInputs) -> torch.Tensor:
    """By stages that hand hidden states on, in slots larger than what is asked of them: `[B, t, V]`."""
    rows, total = inputs.ids.shape
    caches, others = ([stage.new_cache(rows=rows, max_len=total + 3) for stage in stages] for _ in range(2))
    has_mask = stages[0].needs_mask or inputs.full_rows < rows

    def through(slots: Sequence[SlotCache], given: torch.Tensor, past: int, end: int) -> torch.Tensor:
        message = None
        mask = inputs.mask[:, :end] if has_mask else None
        for stage, cache in zip(stages, slots, strict=True):
            cache.seek(0, rows, past)
            # As in a pipeline: stages in between are not told what was sampled, unless they read it.
            knows = past == 0 or stage.is_first or stage.is_last or stage.reads_ids
            ids = given[:, past:end] * int(knows)
            message = stage.forward(ids, mask, inputs.positions[:, past:end], cache, message)
            if not stage.is_last:
                expected = (rows, end - past, stage.message_values)
                assert tuple(message.shape) == expected, f"a message is {tuple(message.shape)}, announced is {expected}"
        assert message is not None
        return message

    logits = []
    for past, end in steps(inputs):
        logits.append(through(caches, inputs.ids, past, end))
        if past == 0:
            # Another micro-batch has its turn, whose states must not be taken for this one's.
            through(others, inputs.ids.flip(1), past, end)
    return torch.stack(logits, 1)


def _accounting(shape: ModelShape, plan: Plan, stages: Sequence[Stage]) -> str:
    for index, stage in enumerate(stages):
        need = stage_bytes(shape, plan, index, prompt_len=PADDED_LENGTHS[0], output_len=NEW_TOKENS)
        if need.weights != stage.weights_bytes():
            return f"{plan.layer_counts}, stage {index}: predicted {need.weights}, holds {stage.weights_bytes()} bytes"
    return ""


def _notes(model: Any, shape: ModelShape) -> tuple[str, ...]:
    """What makes this family unlike a plain llama."""
    config = model.config.get_text_config(decoder=True)
    modules = dict(model.named_modules())
    kinds = list(dict.fromkeys(layer.kind.removesuffix("_attention") for layer in shape.layers))
    mlps = list(dict.fromkeys(getattr(config, "mlp_layer_types", None) or ()))
    experts = any("experts" in name.split(".") for name in modules)
    learned = ("wpe", "embed_positions", "position_embeddings", "positions_embed")
    multipliers = ("embedding_multiplier", "scale_embedding", "scale_emb")
    marks = {
        "/".join(kinds): kinds != ["full"],
        "/".join(mlps): len(mlps) > 1,
        "MoE": experts and len(mlps) <= 1,
        "recurrent": shape.recurrent,
        "tied head": shape.tied,
        "ALiBi": getattr(config, "alibi", False) or any("alibi" in name for name in dir(model.get_decoder())),
        "learned positions": any(
            isinstance(module, nn.Embedding) and name.rpartition(".")[2] in learned for name, module in modules.items()
        ),
        "embedding multiplier": "Scaled" in type(model.get_input_embeddings()).__name__
        or any(hasattr(config, name) for name in multipliers),
        "multimodal, as a text model": config is not model.config,
        f"no cut before {', '.join(map(str, shape.forbidden_cuts))}": bool(shape.forbidden_cuts),
    }
    return tuple(note for note, holds in marks.items() if holds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Surveys families, prints a line for each, and writes the table where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the table; rows of families not looked at stay"
    )
    parser.add_argument("--only", default="", metavar="A,B", help="look at these families alone")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="how many at once")
    parser.add_argument("--json", action="store_true", help="print everything that was found")
    options = parser.parse_args(arguments)
    families = tuple(options.only.split(",")) if options.only else FAMILIES
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        parser.error(f"no causal-LM family is called {unknown[0]!r}")

    def tell(survey: Survey) -> None:
        error = "" if survey.max_error is None else f"{survey.max_error:.0e}"
        line = f"{survey.family:28} {survey.verdict:22} {error:6} {survey.cpu_s:5.1f} s  {survey.reason}"
        print(survey.model_dump_json() if options.json else line.rstrip(), flush=True)

    surveys = survey_all(families, survey_on_one_core, processes=options.processes, on_result=tell)
    if options.write:
        versions = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
        before = options.write.read_text(encoding="utf-8") if options.only and options.write.exists() else ""
        options.write.write_text(write_table(surveys, versions, before=before), encoding="utf-8")
    return 0 if all(survey.is_settled for survey in surveys) else 1


if __name__ == "__main__":
    sys.exit(main())
