"""Every family on a fake GPU: what waits for the host or copies pageable memory, which steps could be captured, and the
most memory that tasks take beside what was predicted.

`python -m tests.rehearsal.survey --write FILE` goes through all families and five shapes and writes both as tables;
`--only llama,gpt2` looks at some families.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from transformers.utils.logging import disable_progress_bar

from pipetune.bench.errors import ModelError
from pipetune.bench.memory import ModelShape, gpu_workspace_bytes, stage_bytes
from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.resolve import ResolvedModel, resolve_model
from pipetune.bench.runtime.kernels.graphs import STATIC_KERNELS
from pipetune.bench.runtime.kernels.static_step import StaticStep, StepKey, why_not_static
from pipetune.bench.runtime.stage.activations import measure_tasks
from pipetune.bench.spec import ModelSpec, Plan, Value
from tests.evaluation.gpu.models import LARGE, save_config
from tests.families.configs import FAMILIES, tiny_config
from tests.rehearsal.fakes import CUDA, FakeGpu, Watch

ROOM = ("max_position_embeddings", "n_positions")
ROWS, OUTPUT_LEN = 4, 24
PROMPT_LEN, PROMPT_LEN_OF_STATES = 1000, 96
HEAD = """# GPUs: what ran on one, and families on one that is not there

Written by `python -m tests.rehearsal.survey --write docs/gpus.md`, on tensors without memory; no
GPU took part. *Captured*: decode steps ask the host for nothing, and may be CUDA graphs. *Waits or
copies*: somewhere the host waits for the GPU, or copies memory that is not pinned; steps run
eagerly where one of them does. *Not run*: fake tensors do not go through this family, which says
nothing of it.

## On one NVIDIA H200

Run on 2026-11-29 with torch 2.11.0+cu130 and transformers 5.17.0, beside 16 cores of an Intel Xeon,
by `tests/evaluation/gpu/first.sh` (what it wrote: `results/gpu/nvidia-h200-x1`). One GPU: several
stages share it, which proves correctness and says nothing of the speed of pipelines.

- Six families (Llama, Qwen3, GPT-2, BLOOM, Gemma 2, Mixtral) over 1, 2 and 4 stages by host
  staging, and over 1 and 2 by NCCL, in float32 and bfloat16: 60 of 60 plans give the unsplit
  model's tokens. Decode steps were captured but for BLOOM and, in float32, Mixtral, for which
  transformers 5.17 asks the GPU and the notes say where.
- A real lack of memory under a cap is told as such, and the fleet goes on. Predicted memory was
  0.5 to 8 % above the peak for 10 of 10 plans, and never under it.
- 135M shape, batch 1: 3.2 ms a step with graphs, 8.5 times as fast as HF `generate`; 6.4 and 7.1
  times at batch 8 and 64. Without graphs a step takes what HF takes, 23 ms: the host launches.
- 7B shape, batch 1: 46 % of the copy bandwidth of 4.24 TB/s with graphs and 62 % with `--compile`,
  where 60 % and 70 % were hoped for. A step of the 135M shape has 1,414 kernels, 829 of which
  work element by element and 281 copy: transformers' norms and rotary embeddings, each in several
  kernels of about 2 µs, take 63 % of its time, and matrix products 26 %. A layer of the 7B shape
  has as many. They stay transformers' own, so that a stage's numbers stay the unsplit model's to
  the bit; `--compile` fuses them.
- `tune` on `cuda:0` ended by itself with its report. Predictions were off by 1.1 % in the median of
  the second half of its trials, and its best plan was 6.2 times as fast as `device_map="auto"`, not
  measured side by side.

Not run on any GPU: several GPUs, NVLink, MIG, flash-attention kernels of other packages, NCCL
between hosts, and whatever a rehearsal on stubbed GPUs (`tests/rehearsal`) shows alone: lost GPUs,
throttling during a run, foreign processes, unlike orders of CUDA and NVML.

How GPUs are used:

- A captured step of the last stage ends with its tokens, the likeliest or drawn ones, and ids stay
  on the GPU. The host looks at them only where generation may end early. A stage's graphs draw as
  the first job after their capture wants it; with other settings of sampling, tokens are drawn
  behind the graph. Memory that draws take within the graphs' pool is not predicted.
- Sampled tokens go to the first stage alone, one message a step. All stages are sent them where
  generation may end early, or where anything but the embedding may read ids: 32 of the families
  here, found on the meta device, GPT-2's and Gemma 4's among them.
- A worker is bound to the CPUs of its GPU's NUMA node that it may use, where the kernel names one;
  a GPU of MIG instances may not tell its place.
- A profile has the shares of a decode step's parts from events within a second graph. Where that
  cannot be captured they are those of eager steps, in which a layer of many small kernels seems
  dearer than it is, and a note says so.
"""
SHAPES_HEAD = """Predicted and highest memory of a task, beside weights and KV, on four layers of five shapes in
bfloat16; cuBLAS's workspaces are not in it.
"""
VERDICTS = ("captured", "not static", "waits or copies", "not run", "refused", "not built")
LAYERS_OF_SHAPES = 4


class Shape(Value):
    """A model's sizes, beside those of the 7B shape, and a workload on it."""

    config: dict[str, Any]
    rows: int
    prompt_len: int
    chunk: int | None = None


def _shape(
    family: str, architecture: str, rows: int, prompt_len: int, chunk: int | None = None, **config: Any
) -> Shape:
    named = {"model_type": family, "architectures": [architecture], "max_position_embeddings": 32768, **config}
    return Shape(config=named, rows=rows, prompt_len=prompt_len, chunk=chunk)


SHAPES = {
    "Llama 2 7B": _shape("llama", "LlamaForCausalLM", 8, 1000),
    "Llama 3 8B": _shape(
        *("llama", "LlamaForCausalLM", 8, 8000, 1024),
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
    ),
    "Qwen3 8B": _shape(
        *("qwen3", "Qwen3ForCausalLM", 4, 3000),
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12288,
        vocab_size=151936,
    ),
    "Mixtral 8x7B": _shape(
        *("mixtral", "MixtralForCausalLM", 4, 2000),
        num_key_value_heads=8,
        intermediate_size=14336,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "Gemma 2 9B": _shape(
        *("gemma2", "Gemma2ForCausalLM", 4, 1500),
        hidden_size=3584,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        intermediate_size=14336,
        vocab_size=256000,
        sliding_window=4096,
    ),
}


class Found(Value):
    """What is known of a family."""

    family: str
    verdict: str
    reason: str = ""
    peaks: dict[str, int] = Field(default_factory=dict)
    """Most bytes alive within a task, beside weights and KV."""
    predicted: int = 0
    """Bytes predicted for the larger of prefill and decode."""


def survey_family(family: str, *, memory: bool = True) -> Found:
    """Surveys one family, and if wanted its memory; whatever goes wrong comes back as a verdict."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="pipetune-") as scratch:
        warnings.simplefilter("ignore")
        try:
            config = tiny_config(family)
            room = [name for name in ROOM if hasattr(config, name)]
            tiny_config(family, **dict.fromkeys(room, 2048)).save_pretrained(scratch)
            resolved = resolve_model(ModelSpec(name=scratch, dtype="bfloat16", load_format="dummy"))
            shape = describe_model(resolved)
        except ModelError as refusal:
            text = str(refusal).replace(repr(scratch), "its folder").replace("\n", " ")
            return Found(family=family, verdict="refused", reason=text)
        except Exception as error:
            return Found(family=family, verdict="not built", reason=_words(error))
        found = survey_stage(resolved, shape, memory=memory)
    return found.model_copy(update={"family": family})


def survey_stage(resolved: ResolvedModel, shape: ModelShape, *, memory: bool = True) -> Found:
    """Runs prefill, a decode step and a static one of a whole model on fake tensors."""
    gpu, prompt_len = FakeGpu(), PROMPT_LEN_OF_STATES if shape.recurrent else PROMPT_LEN
    length = prompt_len + OUTPUT_LEN
    stage = gpu.stage(resolved, 0, shape.num_layers, shape.num_layers)
    slot = stage.new_cache(rows=ROWS, max_len=length)
    seen: dict[str, Watch] = {}
    with gpu.running():
        ids = torch.ones((ROWS, length), dtype=torch.long, device=CUDA)

        def forward(begin: int, behind: int, *, padded: bool) -> torch.Tensor:
            slot.seek(0, ROWS, begin)
            mask = ids[:, :behind] if padded or stage.needs_mask else None
            return stage.forward(ids[:, begin:behind], mask, ids[:, begin:behind], slot, None)

        def watch(name: str, work: Callable[[], object]) -> str | None:
            seen[name] = Watch()
            try:
                with seen[name]:
                    work()
            except Exception as error:
                return _words(error)
            return None

        # The first pass gives the slot its memory, which is no activation.
        if error := watch("first", lambda: forward(0, 1, padded=False)):
            return Found(family="", verdict="not run", reason=f"prefill: {error}")
        for name, begin, behind in (("prefill", 0, prompt_len), ("decode", prompt_len, prompt_len + 1)):
            for kind, padded in ((name, False), (f"padded {name}", True)):
                if error := watch(kind, partial(forward, begin, behind, padded=padded)):
                    return Found(family="", verdict="not run", reason=f"{kind}: {error}")
        why = why_not_static(slot)
        kernel = getattr(stage.model.config.get_text_config(decoder=True), "_attn_implementation", None)
        if why is None and kernel not in STATIC_KERNELS:
            why = f"attention by {kernel}"
        if why is None:
            error = watch("static", StaticStep(stage, slot, StepKey(0, ROWS, length)).forward)
            why = error and f"static step: {error}"
    problems = [f"{name}: {text}" for name, watch_ in seen.items() for text in {**watch_.syncs, **watch_.copies}]
    plan = Plan.from_layer_counts((shape.num_layers,), ("cuda:0",), ROWS)
    if memory:
        shape = shape.model_copy(update={"task_bytes": measure_tasks(resolved, shape)})
    need = stage_bytes(shape, plan, 0, prompt_len=prompt_len, output_len=OUTPUT_LEN)
    verdict = "waits or copies" if problems else "not static" if why else "captured"
    return Found(
        family="",
        verdict=verdict,
        reason="; ".join(problems) or why or "",
        peaks={name: watch_.live.peak for name, watch_ in seen.items()},
        predicted=need.activations - gpu_workspace_bytes(plan),
    )


def survey_shape(name: str, folder: Path) -> tuple[int, int]:
    """Predicted and fake peak bytes of the last chunk of a prompt and of a captured step, on four layers of a shape."""
    case = SHAPES[name]
    save_config(folder, {**LARGE, **case.config, "num_hidden_layers": LAYERS_OF_SHAPES})
    resolved = resolve_model(ModelSpec(name=str(folder), dtype="bfloat16", load_format="dummy"))
    shape = describe_model(resolved)
    shape = shape.model_copy(update={"task_bytes": measure_tasks(resolved, shape)})
    chunk, length = case.chunk or case.prompt_len, case.prompt_len + OUTPUT_LEN
    plan = Plan.from_layer_counts((shape.num_layers,), ("cuda:0",), case.rows, prefill_chunk_size=case.chunk)
    need = stage_bytes(shape, plan, 0, prompt_len=case.prompt_len, output_len=OUTPUT_LEN)
    gpu = FakeGpu()
    stage = gpu.stage(resolved, 0, shape.num_layers, shape.num_layers)
    slot = stage.new_cache(rows=case.rows, max_len=length)
    with gpu.running():
        ids = torch.ones((case.rows, length), dtype=torch.long, device=CUDA)
        slot.seek(0, case.rows, 0)
        stage.forward(ids[:, :1], None, ids[:, :1], slot, None)
        slot.seek(0, case.rows, case.prompt_len - chunk)
        own = ids[:, case.prompt_len - chunk : case.prompt_len]
        prefill, decode = Watch(), Watch()
        with prefill:
            stage.forward(own, ids[:, : case.prompt_len], own, slot, None)
        with decode:
            StaticStep(stage, slot, StepKey(0, case.rows, length)).forward()
    return need.activations - gpu_workspace_bytes(plan), max(prefill.live.peak, decode.live.peak)


def read_verdicts(document: str) -> dict[str, str]:
    """Each family's verdict in a table that was written."""
    cells = [line.split(" | ") for line in document.splitlines() if line.startswith("| ")]
    return {family: row[0][2:] for row in cells if row[0][2:] in VERDICTS for family in row[1].split(", ")}


def families_table(found: Sequence[Found]) -> list[str]:
    """Families by verdict, and why where they are not captured."""
    lines = ["| verdict | families | |", "|---|---|---|"]
    groups: dict[tuple[str, str], list[str]] = {}
    for one in found:
        groups.setdefault((one.verdict, one.reason.replace("|", "/")[:90]), []).append(one.family)
    ordered = sorted(groups.items(), key=lambda item: (VERDICTS.index(item[0][0]), -len(item[1]), item[0]))
    return lines + [f"| {verdict} | {', '.join(names)} | {reason} |" for (verdict, reason), names in ordered]


def shapes_table(found: Mapping[str, tuple[int, int]]) -> list[str]:
    """Predicted against fake peaks of the shapes."""
    lines = ["| shape | rows | prompt | chunk | predicted MiB | peak MiB | ratio |", "|---|---|---|---|---|---|---|"]
    for name, (predicted, peak) in found.items():
        case, ratio = SHAPES[name], predicted / peak
        cells = (name, case.rows, case.prompt_len, case.chunk or "", predicted >> 20, peak >> 20, f"{ratio:.3f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Surveys and writes."""
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal.survey", description=__doc__)
    parser.add_argument("--only", help="families, apart by commas; all by default")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the tables go; the terminal by default")
    args = parser.parse_args(arguments)
    found = [survey_family(family, memory=False) for family in (args.only.split(",") if args.only else FAMILIES)]
    with tempfile.TemporaryDirectory(prefix="pipetune-") as scratch:
        shapes = {name: survey_shape(name, Path(scratch) / name) for name in SHAPES}
    text = "\n".join((HEAD, *families_table(found), "", SHAPES_HEAD, *shapes_table(shapes))) + "\n"
    sys.stdout.write(text) if args.write is None else args.write.write_text(text, encoding="utf-8")
    return 0


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


if __name__ == "__main__":
    sys.exit(main())
