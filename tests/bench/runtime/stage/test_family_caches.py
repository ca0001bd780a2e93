"""Families that ask more of a split than hidden states: split, they give what they give whole."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipetune.bench.memory import ModelShape, stage_bytes
from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.layers import cache_name
from pipetune.bench.models.resolve import ResolvedModel, resolve_model
from pipetune.bench.runtime.job import MicroBatchInputs
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.runtime.stage.unsplit import load_unsplit
from pipetune.bench.spec import ModelSpec, Plan
from tests.bench.models.model_configs import model_config

CPU = torch.device("cpu")
NEW_TOKENS = 4
LENGTHS = (9, 4, 1)
# Several streams, further tensors, embeddings in layers, shared weights, keys to choose positions by, states alone and
# beside keys, caches of their own, layers left out, two attentions a layer.
FAMILIES: tuple[str, ...] = ("gemma3n_text", "zaya", "hy_v4", "zamba2", "deepseek_v32", "mamba2", "falcon_h1")
FAMILIES += ("minimax", "xlstm", "mllama", "longcat_flash", "glm_moe_dsa", "qwen3_next")
KEPT_BY_ROW = ("llama", "gemma2", "bloom", "opt", "gpt2", "deepseek_v32", "gemma3n_text", "longcat_flash")


def resolved(family: str, folder: Path, **spec: Any) -> ResolvedModel:
    model_config(family, initializer_range=0.1).save_pretrained(folder)
    return resolve_model(ModelSpec(name=str(folder), load_format="dummy", **spec))


def some_inputs(lengths: Sequence[int] = LENGTHS) -> MicroBatchInputs:
    source = random.Random(0)
    prompts = [[source.randrange(3, 96) for _ in range(length)] for length in lengths]
    inputs = MicroBatchInputs.build(prompts, output_len=NEW_TOKENS, pad_token_id=0, device=CPU)
    inputs.ids[:, inputs.prompt_len :] = torch.tensor([[7, 8, 9, 10]])
    return inputs


@torch.inference_mode()
def whole_logits(model: Any, inputs: MicroBatchInputs) -> torch.Tensor:
    """`[B, t, V]` by transformers alone, with the cache that the model itself makes."""
    takes = inspect.signature(type(model).forward).parameters
    name = cache_name(model) or ""
    cache, steps, past = None, [], 0
    for end in range(inputs.prompt_len, inputs.ids.shape[1] + 1):
        kwargs: dict[str, Any] = {"attention_mask": inputs.mask[:, :end], name: cache}
        if "position_ids" in takes:
            kwargs["position_ids"] = inputs.positions[:, past:end]
        if name == "cache_params" and past > 0:
            kwargs["attention_mask"] = None
        output = model(input_ids=inputs.ids[:, past:end], use_cache=True, **kwargs)
        cache, past = output[name], end
        steps.append(output.logits[:, -1])
    return torch.stack(steps, 1)


def split_logits(
    stages: Sequence[Stage], caches: Sequence[Any], inputs: MicroBatchInputs, *chunks: int
) -> torch.Tensor:
    """`[B, t, V]` under forced tokens, the prompt in chunks that end at these positions."""
    rows, steps, past = inputs.ids.shape[0], [], 0
    for end in (*chunks, *range(inputs.prompt_len, inputs.ids.shape[1] + 1)):
        message = None
        for stage, cache in zip(stages, caches, strict=True):
            cache.seek(0, rows, past)
            message = stage.forward(
                inputs.ids[:, past:end], inputs.mask[:, :end], inputs.positions[:, past:end], cache, message
            )
            if not stage.is_last:
                assert message.shape == (rows, end - past, stage.message_values)
                assert message.dtype == stage.message_dtype
        assert message is not None
        if end >= inputs.prompt_len:
            steps.append(message)
        past = end
    return torch.stack(steps, 1)


def some_cuts(shape: ModelShape, most: int = 6) -> list[tuple[int, ...]]:
    allowed = [cut for cut in range(1, shape.num_layers) if cut not in shape.forbidden_cuts]
    every = [cuts for count in (1, 2, 3) for cuts in itertools.combinations(allowed, count)]
    return random.Random(0).sample(every, min(most, len(every)))


def assign(stages: Sequence[Stage], cuts: Sequence[int], num_layers: int) -> Sequence[Stage]:
    bounds = (0, *cuts, num_layers)
    used = stages[: len(bounds) - 1]
    for index, stage in enumerate(used):
        stage.assign(bounds[index], bounds[index + 1], is_first=index == 0, is_last=stage is used[-1])
    return used


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_that_change_hands_give_what_the_whole_gives(family: str, tmp_path: Path) -> None:
    given = resolved(family, tmp_path)
    shape, inputs = describe_model(given), some_inputs()
    expected = whole_logits(load_unsplit(given, ("cpu:0",)), inputs)
    stages = [Stage(given, CPU) for _ in range(4)]
    for cuts in some_cuts(shape):
        used = assign(stages, cuts, shape.num_layers)
        # Slots larger than what is asked of them, used for fewer rows first.
        caches = [stage.new_cache(rows=5, max_len=inputs.ids.shape[1] + 3) for stage in used]
        split_logits(used, caches, some_inputs((3, 2)))
        logits = split_logits(used, caches, inputs)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert any(cache.nbytes() for cache in caches)


@pytest.mark.parametrize("family", ["gemma3n_text", "zamba2", "falcon_h1", "mamba2", "deepseek_v32"])
def test_a_checkpoint_gives_the_same(family: str, tmp_path: Path) -> None:
    given = resolved(family, tmp_path)
    load_unsplit(given, ("cpu:0",)).save_pretrained(tmp_path)
    saved = resolve_model(ModelSpec(name=str(tmp_path)))
    shape, inputs = describe_model(saved), some_inputs()
    expected = whole_logits(load_unsplit(saved, ("cpu:0",)), inputs)
    stages = [Stage(saved, CPU) for _ in range(4)]
    for cuts in some_cuts(shape, 3):
        used = assign(stages, cuts, shape.num_layers)
        caches = [stage.new_cache(rows=3, max_len=inputs.ids.shape[1]) for stage in used]
        torch.testing.assert_close(split_logits(used, caches, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3n_text", "deepseek_v32", "longcat_flash", "mamba2", "mllama"])
def test_a_stage_holds_the_bytes_that_are_predicted(family: str, tmp_path: Path) -> None:
    given = resolved(family, tmp_path)
    shape = describe_model(given)
    first = next(cut for cut in range(1, shape.num_layers) if cut not in shape.forbidden_cuts)
    plan = Plan.from_layer_counts((first, shape.num_layers - first), ("cpu:0", "cpu:1"), 1)
    used = assign([Stage(given, CPU) for _ in range(2)], (first,), shape.num_layers)
    for index, stage in enumerate(used):
        assert stage.weights_bytes() == stage_bytes(shape, plan, index, prompt_len=4, output_len=4).weights


def test_weights_that_layers_share_are_held_once(tmp_path: Path) -> None:
    given = resolved("zamba2", tmp_path)
    whole, grown = Stage(given, CPU), Stage(given, CPU)
    whole.assign(0, 6, is_first=True, is_last=True)
    # Layers 1 and 4 share a block; they come one after the other, and the one that the checkpoint names comes last.
    for first in (4, 2, 0):
        grown.assign(first, 6, is_first=first == 0, is_last=True)
    assert grown.weights_bytes() == whole.weights_bytes()
    blocks = [grown.model.model.layers[index].shared_transformer for index in (1, 4)]
    assert all(one is other for one, other in zip(*(block.parameters() for block in blocks), strict=True))


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("family", KEPT_BY_ROW)
def test_a_prompt_in_chunks_gives_what_it_gives_at_once(family: str, attention: str, tmp_path: Path) -> None:
    given = resolved(family, tmp_path, attention=attention)
    shape, inputs = describe_model(given), some_inputs()
    assert not shape.recurrent
    expected = whole_logits(load_unsplit(given, ("cpu:0",)), inputs)
    stages = [Stage(given, CPU) for _ in range(2)]
    used = assign(stages, some_cuts(shape, 20)[0][:1], shape.num_layers)
    # With the last row, chunks are all padding at first.
    for chunks in ((3, 6), (8,), (1, 2, 7)):
        caches = [stage.new_cache(rows=5, max_len=inputs.ids.shape[1] + 3) for stage in used]
        logits = split_logits(used, caches, inputs, *chunks)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma3n_text"])
def test_all_logits_are_those_of_every_position(family: str, tmp_path: Path) -> None:
    given = resolved(family, tmp_path)
    inputs, num_layers = some_inputs((5, 5)), describe_model(given).num_layers
    length = inputs.prompt_len
    model = load_unsplit(given, ("cpu:0",))
    with torch.inference_mode():
        expected = model(
            input_ids=inputs.ids[:, :length], attention_mask=inputs.mask[:, :length], use_cache=False
        ).logits
    message = None
    for stage in assign([Stage(given, CPU) for _ in range(2)], (1,), num_layers):
        cache = stage.new_cache(rows=2, max_len=length)
        cache.seek(0, 2, 0)
        message = stage.forward(
            inputs.ids[:, :length],
            inputs.mask[:, :length],
            inputs.positions[:, :length],
            cache,
            message,
            all_logits=True,
        )
    torch.testing.assert_close(message, expected, rtol=1e-4, atol=1e-4)
