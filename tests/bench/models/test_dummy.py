"""Dummy weights must not depend on what else is in the model, on who built it, or on who else draws numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipetune.bench.models.dummy import init_dummy_weights
from pipetune.bench.models.layers import find_layers
from tests.bench.models.model_configs import FAMILIES, model_config

DTYPES = ["float32", "bfloat16", "float16"]


def build(family: str, *, dtype: str = "float32", device: str = "meta", **changes: Any) -> PreTrainedModel:
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            model_config(family, **changes), dtype=getattr(torch, dtype)
        )
    return model


def initialized(family: str, seed: int = 7, **how: Any) -> PreTrainedModel:
    model = build(family, **how)
    init_dummy_weights(model, seed)
    return model


def pruned(family: str, keep: range, *, embedding: bool, head: bool, **how: Any) -> PreTrainedModel:
    """As a stage prunes: foreign layers, embedding and head are replaced by modules without parameters."""
    model = build(family, **how)
    _, layers = find_layers(model)
    for index in range(len(layers)):
        if index not in keep:
            layers[index] = nn.Identity()
    if not embedding:
        model.set_input_embeddings(nn.Identity())
    if not head:
        model.set_output_embeddings(nn.Identity())  # type: ignore[no-untyped-call]
    if not (embedding and head):
        model.all_tied_weights_keys = {}
    init_dummy_weights(model, 7)
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def assert_part_of(part: nn.Module, whole: nn.Module) -> None:
    expected = tensors(whole)
    for name, tensor in tensors(part).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_models_have_the_whole_models_values(family: str, dtype: str) -> None:
    whole = initialized(family, dtype=dtype)
    assert_part_of(pruned(family, range(1), embedding=True, head=False, dtype=dtype), whole)
    assert_part_of(pruned(family, range(1, 3), embedding=False, head=False, dtype=dtype), whole)
    assert_part_of(pruned(family, range(3, 4), embedding=True, head=True, dtype=dtype), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_do_not_depend_on_where_the_model_was_built(family: str) -> None:
    assert_part_of(initialized(family, device="cpu"), initialized(family, device="meta"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_finite_and_tell_prompts_apart(family: str, dtype: str) -> None:
    model: Any = initialized(family, dtype=dtype)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[3, 5, 8], [13, 21, 34]])).logits[:, -1].float()
    assert logits.isfinite().all()
    assert (logits.std(dim=-1) > 1e-3).all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tensors_are_real_and_layers_differ(family: str) -> None:
    model = initialized(family)
    assert not [name for name, tensor in tensors(model).items() if tensor.is_meta]
    _, layers = find_layers(model)
    matrices = [[parameter for parameter in layer.parameters() if parameter.ndim > 1][-1] for layer in layers[1:3]]
    assert not torch.equal(*matrices)


def test_seed_changes_the_weights_and_nothing_else_does() -> None:
    first, again, other = (initialized("llama", seed=seed) for seed in (1, 1, 2))
    assert_part_of(again, first)
    assert not torch.equal(tensors(other)["lm_head.weight"], tensors(first)["lm_head.weight"])


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    initialized("llama")
    assert torch.equal(torch.rand(4), expected)


def test_tied_weights_stay_one_tensor() -> None:
    model = initialized("gpt2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[no-untyped-call]


def test_families_own_initialisation_is_kept() -> None:
    model = initialized("llama")
    rotary = tensors(model)["model.rotary_emb.inv_freq"]
    assert torch.equal(tensors(model)["model.norm.weight"], torch.ones(32))
    assert rotary[0] == 1.0
    assert (rotary[1:] < rotary[:-1]).all()
