"""Where a model can be cut: the module list of its decoder layers, and who may not be cut at all."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bench.errors import ModelError

UNSPLITTABLE: dict[str, str] = {
    "zamba2": "its shared blocks and their adapters live in several layers at once",
    "minimax": "its lightning attention keeps a cache that cannot be held in part",
    "longcat_flash": "each of its layers is two attention layers to the cache, so layer and cache indices differ",
    "hrm_text": "it runs the same layers several times over in each forward pass",
    "rwkv": "its recurrent state is no cache and crosses the layers as one tensor",
    "xlstm": "its recurrent state has a cache class of its own that cannot be held in part",
    "openai-gpt": "it has no KV cache",
}
"""Families, by `model_type`, that come out wrong when they are cut, and why."""


def check_splittable(model_type: str) -> None:
    """Refuses a family that is known to come out wrong when it is cut.

    Raises:
        ModelError: the family is one of `UNSPLITTABLE`.
    """
    reason = UNSPLITTABLE.get(model_type)
    if reason is not None:
        raise ModelError(f"model_type {model_type!r} cannot be split over devices: {reason}; choose another model")


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers: the shallowest module list with as many entries as the config has layers.

    Works on a pruned model too, as long as its foreign layers were replaced and not removed.

    Returns:
        The list's qualified name (`model.layers`) and the list.

    Raises:
        ModelError: there is no such list.
    """
    config = model.config.get_text_config(decoder=True)
    num_layers = getattr(config, "num_hidden_layers", None)
    untyped: Any = model
    for root in (untyped.get_decoder(), model):
        lists = [
            (name.count("."), name, module)
            for name, module in root.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == num_layers
        ]
        if not lists:
            continue
        # Modules of equal depth stay in the order of the model.
        _, name, layers = min(lists, key=lambda entry: entry[0])
        return _qualified(model, root, name), layers
    raise ModelError(
        f"{type(model).__name__} ({config.model_type}): no list of {num_layers} layers was found in it; "
        "pipetune can only cut models that keep their layers in one nn.ModuleList"
    )


def _qualified(model: nn.Module, part: nn.Module, name: str) -> str:
    prefix = next(prefix for prefix, module in model.named_modules() if module is part)
    return f"{prefix}.{name}".strip(".")
