"""A checkpoint runs only where its weights are those that the config's model reads, all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipetune.bench.errors import ModelError
from pipetune.bench.models.checkpoint import SINGLE
from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.resolve import ResolvedModel, resolve_model
from pipetune.bench.models.weights import check_weights
from pipetune.bench.spec import ModelSpec
from tests.bench.models.model_configs import FAMILIES

Tensors = dict[str, torch.Tensor]
UP, HEAD, EMBEDDING = "model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"


def checked(
    folder: Path, change: Callable[[Tensors], object], *, family: str = "llama", **config: Any
) -> ResolvedModel:
    """What is found of a checkpoint after a change of its weights, and, by its config alone, of its config."""
    made: Any = AutoConfig.for_model(family, **{**FAMILIES[family], **config})
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)  # type: ignore[no-untyped-call]
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return check_weights(resolve_model(ModelSpec(name=str(folder))))


def halved(tensors: Tensors) -> None:
    """Each linear weight in 8 bits, beside its scale."""
    for name in [name for name in tensors if "proj" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)


def packed(tensors: Tensors) -> None:
    base = UP.removesuffix(".weight")
    del tensors[UP]
    tensors |= {f"{base}.qweight": torch.ones(4, 48, dtype=torch.int32), f"{base}.scales": torch.ones(1, 48)}


def nf4(tensors: Tensors) -> None:
    tensors[UP] = torch.zeros(tensors[UP].numel() // 2, 1, dtype=torch.uint8)
    tensors |= {f"{UP}.absmax": torch.ones(24), f"{UP}.quant_map": torch.ones(16)}


CHANGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "8 bits": (halved, r"layers\.0\.mlp\.down_proj\.weight is stored as F8_E4M3.*nothing says by which method"),
    "8 bits without scales": (lambda one: one.update({UP: one[UP].to(torch.int8)}), f"{UP} is stored as I8"),
    "packed": (packed, r"up_proj\.qweight is stored as I32"),
    "NF4": (nf4, f"{UP} is stored as U8"),
    "scales": (
        lambda one: one.update({f"{UP}_scale": torch.ones(1)}),
        f"holds 1 weights that nothing reads, {UP}_scale",
    ),
    "integers beside": (
        lambda one: one.update({f"{UP[:-6]}g_idx": torch.ones(4, dtype=torch.int32)}),
        r"up_proj\.g_idx",
    ),
    "an adapter": (lambda one: one.update({f"{UP[:-6]}lora_A.weight": torch.ones(2, 32)}), r"nothing reads.*lora_A"),
    "a bias": (lambda one: one.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), r"q_proj\.bias"),
    "one layer more": (
        lambda one: one.update({UP.replace("2", "4"): one[UP].clone()}),
        r"nothing reads, model\.layers\.4",
    ),
    "a tower": (
        lambda one: one.update({"vision_tower.layers.0.weight": torch.ones(2)}),
        r"nothing reads, vision_tower",
    ),
    "one weight less": (lambda one: one.pop(UP), f"lacks 1 weights, {UP}"),
    "another shape": (lambda one: one.update({UP: torch.ones(48, 31)}), rf"gives {UP} the shape \(48, 31\)"),
    "other names": (lambda one: one.update({f"{UP}s": one.pop(UP)}), f"lacks 1 weights, {UP}.* holds 1.*{UP}s"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(what: str, tmp_path: Path) -> None:
    change, told = CHANGES[what]
    with pytest.raises(ModelError, match=told):
        checked(tmp_path, change)


@pytest.mark.parametrize(
    ("family", "name", "config"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", {}),
        ("gpt2", "transformer.h.0.attn.masked_bias", {}),
        ("deepseek_v3", "model.layers.4.eh_proj.weight", {"num_nextn_predict_layers": 1}),
    ],
)
def test_what_models_compute_or_only_draft_with_may_lie_in_a_checkpoint(
    family: str, name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    checked(tmp_path, lambda tensors: tensors.update({name: torch.ones(1)}), family=family, **config)


def test_another_part_of_a_model_of_several_may_lie_in_a_checkpoint(tmp_path: Path) -> None:
    checked(tmp_path, lambda tensors: None)
    tensors = load_file(tmp_path / SINGLE)
    save_file({**tensors, "model.vision_tower.0.weight": torch.ones(2)}, tmp_path / SINGLE)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "vision_config": {"model_type": "siglip_vision_model"}})
    )
    check_weights(resolve_model(ModelSpec(name=str(tmp_path))))
    save_file({**tensors, f"{UP}_scale": torch.ones(2)}, tmp_path / SINGLE)
    with pytest.raises(ModelError, match=f"{UP}_scale"):
        check_weights(resolve_model(ModelSpec(name=str(tmp_path))))


@pytest.mark.parametrize("stored", ["once", "twice", "apart", "as the head"])
def test_ties_are_those_of_the_weights(stored: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        if stored == "as the head":
            tensors[HEAD] = tensors.pop(EMBEDDING)
        elif stored != "once":
            tensors[HEAD] = tensors[EMBEDDING] + (1 if stored == "apart" else 0)

    found = checked(tmp_path, change, tie_word_embeddings=True)
    assert (found.untied, found.embedding_in_head) == ((HEAD,) if stored == "apart" else (), stored == "as the head")
    shape = describe_model(found)
    assert (shape.tied, shape.head_bytes) == ((stored != "apart"), 96 * 32 * 4 if stored == "apart" else 0)
