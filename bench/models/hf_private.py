"""transformers' private names and undocumented modules: all that pipetune uses, for whoever tries another version.

Tried with 5.17.0, which lacks `DummyLayer`, and 5.23.0.
"""

from operator import attrgetter
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, cache_utils

# fmt: off
from transformers.cache_utils import (  # isort: skip
    Cache, CacheLayerMixin, DynamicCache, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin, LinearAttentionLayer,
)
# fmt: on
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.models.minimax.modeling_minimax import MiniMaxCache
from transformers.models.xlstm.modeling_xlstm import xLSTMCache
from transformers.pytorch_utils import Conv1D
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

DummyLayer: Any = getattr(cache_utils, "DummyLayer", type("DummyLayer", (), {}))
"""Stands where a model keeps nothing for a layer; where transformers lacks it, no cache layer is of this kind."""
builder_of = attrgetter("_from_config")
"""What builds a model of a family, a class, as `AutoModelForCausalLM.from_config` does."""
device_map_hints = attrgetter("_no_split_modules", "_skip_keys_device_placement")
"""Modules that a device map keeps whole, and arguments that it leaves where they are."""
is_stateful = attrgetter("_is_stateful")
"""Whether a model says that its cache holds states of whole sequences."""


def family_of(config: Any) -> Any:
    """The class that `AutoModelForCausalLM` would build for a config; None where it knows none."""
    untyped: Any = AutoModelForCausalLM
    known = untyped._model_mapping
    return _get_model_class(config, known) if type(config) in known else None  # type: ignore[no-untyped-call]


def kernel_of(config: Any) -> str | None:
    """The attention kernel that was chosen for a model."""
    return getattr(config, "_attn_implementation", None)


def attends_by_registry(model: Any) -> bool:
    """Whether masks and attention are those that are registered, for the kernel that was chosen."""
    return bool(getattr(model, "_supports_attention_backend", False)) and kernel_of(model.config) == "sdpa"


def kernels_of(family: Any) -> tuple[bool, bool, tuple[str, ...] | None]:
    """Whether a family has SDPA and flash attention, and which kinds of the latter where it says so."""
    known = getattr(family, "_compatible_flash_implementations", None)
    return family._supports_sdpa, family._supports_flash_attn, known


def init_weights(owner: Any, module: nn.Module) -> None:
    """Has a family initialise a module, whether it was before or not."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if hasattr(tensor, "_is_hf_initialized"):
            del tensor._is_hf_initialized
    owner._init_weights(module)
