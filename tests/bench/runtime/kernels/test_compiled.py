"""Compiled layers give what eager ones give, with few graphs, and step aside where compiling fails."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipetune.bench.models.layers import find_layers
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.models.torch_private import can_pack
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.job import MicroBatchInputs
from pipetune.bench.runtime.kernels.compiled import CompiledLayers
from pipetune.bench.runtime.kernels.graphs import DecodeGraphs
from pipetune.bench.runtime.packed_linear import PackedLinear, pack_linears
from pipetune.bench.runtime.stage.kv_cache import SlotCache
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.schedule import build_schedule
from pipetune.bench.spec import ModelSpec
from tests.bench.models.model_configs import model_config
from tests.tiny_models import save_tiny_model

# Compilers warn of what they themselves use.
pytestmark = pytest.mark.filterwarnings("ignore")

CPU = torch.device("cpu")
NEW_TOKENS = 4
VOCAB_SIZE = 96
TOLERANCE = 1e-4
LENGTHS = (11, 7, 2)
"""Longer than the window that a tiny gemma2 has."""


@pytest.fixture(autouse=True)
def _own_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def stages_of(folder: Path, *, num_layers: int = 2) -> list[Stage]:
    """The first layer, which stays eager, and the others."""
    resolved = resolve_model(ModelSpec(name=str(folder)))
    stages = [Stage(resolved, CPU) for _ in range(2)]
    stages[0].assign(0, 1, is_first=True, is_last=False)
    stages[1].assign(1, num_layers, is_first=False, is_last=True)
    return stages


def some_inputs(lengths: Sequence[int] = LENGTHS) -> MicroBatchInputs:
    source = random.Random(0)
    prompts = [[source.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
    inputs = MicroBatchInputs.build(prompts, output_len=NEW_TOKENS, pad_token_id=0, device=CPU)
    inputs.ids[:, inputs.prompt_len :] = torch.tensor([[7, 8, 9, 10]])
    return inputs


def logits_of(stages: list[Stage], inputs: MicroBatchInputs, *, first_row: int = 0) -> torch.Tensor:
    """`[B, t, V]` under forced tokens: padded prefill and cached decode, at some rows of slots with room to spare."""
    total, rows = inputs.ids.shape[1], inputs.ids.shape[0]
    caches = [stage.new_cache(rows=rows + 2, max_len=total + 3) for stage in stages]
    steps, past = [], 0
    for end in range(inputs.prompt_len, total + 1):
        hidden = None
        for stage, cache in zip(stages, caches, strict=True):
            cache.seek(first_row, first_row + rows, past)
            at = slice(past, end)
            hidden = stage.forward(inputs.ids[:, at], inputs.mask[:, :end], inputs.positions[:, at], cache, hidden)
        assert hidden is not None
        steps.append(hidden)
        past = end
    return torch.stack(steps, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bloom", "gemma2", "mixtral"])
def test_every_family_gives_the_eager_logits(family: str, tmp_path: Path) -> None:
    stages = stages_of(save_tiny_model(tmp_path / family, family, num_layers=3), num_layers=3)
    expected = logits_of(stages, some_inputs())
    # Without C++, which takes most of the time and knows nothing of families.
    compiled = CompiledLayers(backend="eager")
    compiled.apply(stages[1].model, stages[1].own_layers)
    assert (logits_of(stages, some_inputs()) - expected).abs().max() < TOLERANCE
    assert compiled.notes == ()
    made = compiled.graphs
    assert made >= 2
    # Two layers, of which gemma2's differ, and no step or layer that has a graph of its own.
    if family != "mixtral":
        assert made <= (4 if family == "gemma2" else 2)
    assert (logits_of(stages, some_inputs(), first_row=2) - expected).abs().max() < TOLERANCE
    assert compiled.graphs == made


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_real_compiler_serves_packed_layers_of_every_size_with_two_graphs(tmp_path: Path) -> None:
    stages = stages_of(save_tiny_model(tmp_path / "llama", "llama", num_layers=3), num_layers=3)
    wanted = [some_inputs(), some_inputs((19, 12, 3, 3, 1))]
    expected = [logits_of(stages, inputs) for inputs in wanted]
    pack_linears(stages[1].model)
    compiled = CompiledLayers()
    compiled.apply(stages[1].model, stages[1].own_layers, where="stage 1")
    for inputs, logits in zip(wanted, expected, strict=True):
        assert (logits_of(stages, inputs) - logits).abs().max() < TOLERANCE
    assert compiled.notes == ()
    assert compiled.graphs == 2
    assert compiled.compile_s > 0.0
    compiled.remove()
    compiled.apply(stages[1].model, stages[1].own_layers)
    logits_of(stages, wanted[0])
    assert compiled.graphs == 2, "graphs outlive the plan"


def test_a_compiler_that_is_missing_leaves_the_stage_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = stages_of(save_tiny_model(tmp_path / "gpt2", "gpt2", num_layers=2))
    expected = logits_of(stages, some_inputs())
    config: Any = torch._inductor.config
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    compiled = CompiledLayers()
    compiled.apply(stages[1].model, stages[1].own_layers, where="stage 1")
    assert torch.equal(logits_of(stages, some_inputs()), expected)
    assert len(compiled.notes) == 1
    assert compiled.notes[0].startswith("compile: eager on stage 1: ")
    assert "\n" not in compiled.notes[0]
    made = compiled.graphs
    logits_of(stages, some_inputs())
    assert compiled.graphs == made, "it is not tried again and again"


def test_wrong_graphs_are_found_and_not_used(tmp_path: Path) -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(output * 1.1 for output in graph(*args))

    stages = stages_of(save_tiny_model(tmp_path / "gpt2", "gpt2", num_layers=2))
    expected = logits_of(stages, some_inputs())
    compiled = CompiledLayers()
    compiled._make = wrong
    compiled.apply(stages[1].model, stages[1].own_layers)
    assert torch.equal(logits_of(stages, some_inputs()), expected)
    assert "differs from the eager one by" in compiled.notes[0]


def test_layers_change_hands_between_compiled_and_eager_plans(tmp_path: Path) -> None:
    stages = stages_of(save_tiny_model(tmp_path / "llama", "llama", num_layers=3), num_layers=3)
    expected = logits_of(stages, some_inputs())
    if can_pack(torch.float32):
        pack_linears(stages[1].model)
    compiled = CompiledLayers(backend="eager")
    compiled.apply(stages[1].model, stages[1].own_layers)
    assert (logits_of(stages, some_inputs()) - expected).abs().max() < TOLERANCE
    compiled.remove()
    stages[0].assign(0, 2, is_first=True, is_last=False)
    stages[1].assign(2, 3, is_first=False, is_last=True)
    _, layers = find_layers(stages[1].model)
    assert not any("forward" in vars(layer) for layer in layers)
    assert not any(isinstance(part, PackedLinear) and type(part) is not PackedLinear for part in layers.modules())
    assert (logits_of(stages, some_inputs()) - expected).abs().max() < TOLERANCE
    stages[1].assign(1, 3, is_first=False, is_last=True)
    stages[0].assign(0, 1, is_first=True, is_last=False)
    compiled.apply(stages[1].model, stages[1].own_layers)
    assert (logits_of(stages, some_inputs()) - expected).abs().max() < TOLERANCE
    assert compiled.notes == ()


def test_recurrent_layers_stay_eager_and_a_note_says_so(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_config(model_config("mamba"))  # type: ignore[no-untyped-call]
    model.save_pretrained(tmp_path)
    stages = stages_of(tmp_path, num_layers=4)
    expected = logits_of(stages, some_inputs())
    compiled = CompiledLayers(backend="eager")
    compiled.apply(stages[1].model, stages[1].own_layers, where="stage 1")
    assert torch.equal(logits_of(stages, some_inputs()), expected)
    assert compiled.graphs == 0
    assert compiled.notes == ("compile: eager on stage 1, layers 1, 2, 3: its cache is a SlotStates",)


def test_static_decode_steps_run_compiled(tmp_path: Path) -> None:
    stages = stages_of(save_tiny_model(tmp_path / "gpt2", "gpt2", num_layers=2))
    stage, inputs = stages[1], some_inputs()
    rows, length, total = len(LENGTHS), inputs.prompt_len, inputs.ids.shape[1]
    hidden = torch.randn((rows, total, stage.message_values), generator=torch.Generator().manual_seed(0))
    tasks = build_schedule((rows,), prompt_lens=(length,), output_len=NEW_TOKENS, in_flight=1)
    compiled = CompiledLayers(backend="eager")
    outputs: list[list[torch.Tensor]] = []
    for is_compiled in (False, True):
        if is_compiled:
            compiled.apply(stage.model, stage.own_layers)
        slot: SlotCache = stage.new_cache(rows=rows, max_len=total)
        graphs = DecodeGraphs(stage, DeviceContext("cpu:0", num_threads=1), capture=False)
        graphs.prepare([slot], tasks)
        assert graphs.notes == ()
        slot.seek(0, rows, 0)
        stage.forward(
            inputs.ids[:, :length], inputs.mask[:, :length], inputs.positions[:, :length], slot, hidden[:, :length]
        )
        outputs.append([])
        for task in tasks[1:]:
            output = graphs.run(task, inputs, hidden[:, task.first_token : task.end_token])
            assert output is not None
            outputs[-1].append(output.clone())
    assert compiled.notes == ()
    for eager, other in zip(*outputs, strict=True):
        assert (eager - other).abs().max() < TOLERANCE
