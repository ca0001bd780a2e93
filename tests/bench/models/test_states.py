"""States found on the meta device are as large as those that a real run of the model leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.layers import cache_name
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.spec import ModelSpec
from tests.families.configs import tiny_config

ROWS = 3


@pytest.mark.parametrize("family", ["mamba2", "bamba", "falcon_h1", "qwen3_next", "jamba"])
def test_states_are_as_large_as_those_of_a_real_run(tmp_path: Path, family: str) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    shape = describe_model(resolve_model(ModelSpec(name=str(tmp_path), load_format="dummy")))
    model = AutoModelForCausalLM.from_config(tiny_config(family))  # type: ignore[no-untyped-call]
    cache = DynamicCache(config=model.config)
    name = cache_name(model)
    assert name is not None
    with torch.no_grad():
        model(input_ids=torch.ones((ROWS, 8), dtype=torch.long), use_cache=True, **{name: cache})
    real = [_states(layer) if isinstance(layer, LinearAttentionLayer) else 0 for layer in cache.layers]
    assert [ROWS * layer.state_bytes for layer in shape.layers] == real
    assert sum(real) > 0


def test_models_without_states_have_none(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    shape = describe_model(resolve_model(ModelSpec(name=str(tmp_path), load_format="dummy")))
    assert not any(layer.state_bytes for layer in shape.layers)


def _states(layer: LinearAttentionLayer) -> int:
    kept = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return sum(int(tensor.nbytes) for tensor in kept if tensor is not None)
