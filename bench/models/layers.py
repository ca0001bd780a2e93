"""Where a model can be cut: the module list of its decoder layers, and what may not be cut at all."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from bench.errors import ModelError

UNSPLITTABLE: dict[str, str] = {
    "zamba": "its shared blocks read the embeddings in later layers, too",
    "zamba2": "its shared blocks read the embeddings in later layers, too",
    "gemma3n": "its layers hand on four streams of hidden states and read the embeddings",
    "gemma3n_text": "its layers hand on four streams of hidden states and read the embeddings",
    "deepseek_v4": "its layers hand on several streams of hidden states",
    "hy_v4": "its layers hand on several streams of hidden states and the indices they attend to",
    "mllama": "without an image it leaves out some of its layers",
    "minimax": "it insists on a cache class of its own",
    "xlstm": "it insists on a cache class of its own",
    "rwkv": "its layers share one recurrent state",
    "longcat_flash": "each of its layers is two attention layers to the cache",
    "hrm_text": "it runs the same layers several times in one forward pass",
    "openai-gpt": "it has no KV cache",
    "xlm": "it has no KV cache, and its layers lie in several lists",
    "cpmant": "it puts tokens of its own before the prompt",
}
"""Families, by `model_type`, that come out wrong when they are cut, and why."""

_ENCODERS = ("bert", "bert-generation", "big_bird", "ernie", "megatron-bert", "roc_bert", "roformer", "xlm-roberta-xl")
_CACHES = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, DummyLayer)
"""Kinds of cache layer, exactly these classes, that a stage can hold in part."""


def check_family(model_type: str) -> None:
    """Refuses a family that is known to come out wrong when it is cut.

    Raises:
        ModelError: the family is one of `UNSPLITTABLE`, or an encoder.
    """
    reason = "it is an encoder" if model_type in _ENCODERS else UNSPLITTABLE.get(model_type)
    if reason is not None:
        raise _refusal(model_type, reason)


def check_splittable(model: PreTrainedModel) -> None:
    """Refuses a model whose family, config or cache says that it comes out wrong when it is cut.

    Raises:
        ModelError: with the reason.
    """
    config = model.config.get_text_config(decoder=True)
    for model_type in (model.config.model_type, config.model_type):
        check_family(model_type)
    # Some decoders carry the mark as well, and mean nothing by it.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False:
        raise _refusal(config.model_type, "it is an encoder (is_decoder is false in its config)")
    if "past_key_values" not in inspect.signature(type(model).forward).parameters:
        raise _refusal(config.model_type, "its forward pass takes no past_key_values")
    if getattr(config, "hidden_size_per_layer_input", None):
        raise _refusal(config.model_type, "its layers read the embeddings (hidden_size_per_layer_input)")
    strange = sorted(
        {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) not in _CACHES}
    )
    if strange:
        raise _refusal(config.model_type, f"its cache cannot be held in part ({', '.join(strange)})")


def _refusal(model_type: str, reason: str) -> ModelError:
    return ModelError(f"model_type {model_type!r} cannot be split over devices: {reason}; choose another model")


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
