"""torch's private names and undocumented modules: all that pipetune uses, for whoever tries another version.

Tried with 2.13.0 alone.
"""

import contextlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten, _mkldnn = torch.ops.aten, torch.ops.mkldnn
ASKS = (_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default)
"""Operations for which the host waits."""
GROUPED_MM: Any = _aten._grouped_mm.default
tensors_of = attrgetter("_parameters", "_buffers")
"""A module's own parameters and buffers by name, to be looked at or changed."""
unsaved_buffers = attrgetter("_non_persistent_buffers_set")
"""Names of a module's buffers that no checkpoint holds."""
hooks_before = attrgetter("_forward_pre_hooks")
"""What runs before a module's forward pass."""
version_of = attrgetter("_version")
"""A number that grows with every change of a tensor in place."""
address_of: Callable[[torch.UntypedStorage], int] = attrgetter("_cdata")
"""What `StorageWeakRef` tells storages apart by."""


def end_allocation(device_index: int, pool: Any) -> None:
    """Ends an allocation to a pool, and lets go of the pool; nothing where there is none. Never ran on a GPU."""
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(device_index, pool)
        torch._C._cuda_releasePool(device_index, pool)


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Tensors among values, in lists, tuples and dicts of them at any depth."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def compilers() -> tuple[Any, Any]:
    """Dynamo and inductor, which are loaded at their first use."""
    return torch._dynamo, torch._inductor


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have the kernels for packed weights of a dtype."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (available and hasattr(_mkldnn, "_reorder_linear_weight")):
        return False
    return bool(_mkldnn._is_mkldnn_bf16_supported()) if dtype is torch.bfloat16 else dtype is torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight `[out_features, in_features]` in oneDNN's own layout."""
    packed: torch.Tensor = _mkldnn._reorder_linear_weight(weight)
    return packed


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias` of a packed weight."""
    output: torch.Tensor = _mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return output
