"""Stages in one process: parts that change hands in any order give what the unsplit model gives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.runtime.job import MicroBatchInputs
from pipetune.bench.runtime.stage.parts import PlaceholderLayer
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.runtime.stage.unsplit import load_unsplit
from pipetune.bench.spec import LoadFormat, ModelSpec
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

CPU = torch.device("cpu")
NUM_LAYERS, NEW_TOKENS = 6, 3


def save_projecting_model(folder: Path) -> Path:
    """An OPT whose embedding is narrower than its layers, as that of opt-350m."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        OPTConfig(
            hidden_size=64,
            word_embed_proj_dim=32,
            ffn_dim=128,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=64,
            do_layer_norm_before=False,
        )
    )
    model.save_pretrained(folder)
    return folder


def some_inputs() -> MicroBatchInputs:
    source = random.Random(0)
    prompts = [[source.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (9, 4, 1)]
    inputs = MicroBatchInputs.build(prompts, output_len=NEW_TOKENS, pad_token_id=0, device=CPU)
    inputs.ids[:, inputs.prompt_len :] = torch.tensor([[7, 8, 9]])
    return inputs


def pipelined_logits(stages: list[Stage], inputs: MicroBatchInputs) -> torch.Tensor:
    """`[B, t, V]` under forced tokens, with slots larger than what is asked of them."""
    total = inputs.ids.shape[1]
    caches = [stage.new_cache(rows=5, max_len=total + 3) for stage in stages]
    steps, past = [], 0
    for end in range(inputs.prompt_len, total + 1):
        hidden = None
        for stage, cache in zip(stages, caches, strict=True):
            cache.seek(0, inputs.ids.shape[0], past)
            hidden = stage.forward(
                inputs.ids[:, past:end], inputs.mask[:, :end], inputs.positions[:, past:end], cache, hidden
            )
        assert hidden is not None
        steps.append(hidden)
        past = end
    return torch.stack(steps, 1)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "opt"])
def test_parts_may_change_hands_in_any_order(family: str, load_format: LoadFormat, tmp_path: Path) -> None:
    folder = save_projecting_model(tmp_path) if family == "opt" else save_tiny_model(tmp_path, family, NUM_LAYERS)
    resolved = resolve_model(ModelSpec(name=str(folder), load_format=load_format))
    inputs = some_inputs()
    model = load_unsplit(resolved, ("cpu:0",))
    takes_positions = {"position_ids": inputs.positions} if family != "opt" else {}
    with torch.inference_mode():
        whole = model(input_ids=inputs.ids, attention_mask=inputs.mask, use_cache=False, **takes_positions).logits
    expected = whole[:, inputs.prompt_len - 1 :]
    workers = [Stage(resolved, CPU) for _ in range(3)]
    source = random.Random(1)
    for count in (3, 2, 3, 1, 2, 3, 2, 1):
        order = source.sample(workers, count)
        cuts = [0, *sorted(source.sample(range(1, NUM_LAYERS), count - 1)), NUM_LAYERS]
        for index, stage in enumerate(order):
            stage.assign(cuts[index], cuts[index + 1], is_first=index == 0, is_last=index == count - 1)
        torch.testing.assert_close(pipelined_logits(order, inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_stage_lets_go_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve_model(ModelSpec(name=str(save_tiny_model(tmp_path, "llama", NUM_LAYERS))))
    stage = Stage(resolved, CPU)
    stage.assign(0, 4, is_first=True, is_last=False)
    held: list[int] = []
    load = stage._parts.load

    def watch(*args: Any, **kwargs: Any) -> Any:
        held.extend(
            index for index, layer in enumerate(stage.model.model.layers) if not isinstance(layer, PlaceholderLayer)
        )
        return load(*args, **kwargs)

    monkeypatch.setattr(stage._parts, "load", watch)
    assert stage.assign(3, 6, is_first=False, is_last=True) == (4, 5)
    assert held == [3], "layers of the old plan and of the new one would have to fit together"
