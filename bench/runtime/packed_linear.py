"""Linear weights laid out once for oneDNN's kernels, where the eager CPU path lays them out anew in every call.

What it gains depends on the machine: on AMD processors much, since MKL, which eager fp32 goes through, keeps to AVX2
there; see docs/performance.md. The packed weight takes the place of the plain one, so that memory stays what it was.
"""

from typing import Any

import torch
from torch import nn

from pipetune.bench.models.hf_private import Conv1D
from pipetune.bench.models.torch_private import can_pack, hooks_before, pack, packed_linear


class PackedLinear(nn.Module):
    """A linear layer over a weight in oneDNN's own layout: `[..., in_features]` → `[..., out_features]`. Made from a
    plain weight `[out_features, in_features]`, which is not kept."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed_bytes = int(weight.nbytes)
        # Neither a parameter nor a buffer: nothing but the kernel can read its layout.
        self._packed = pack(weight.detach().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, made anew: for the few models that read one beside using the layer."""
        return self._packed.to_dense()

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  as in nn.Linear
        """`input @ weight.T + bias`."""
        return packed_linear(input, self._packed, self.bias)


def pack_linears(model: Any) -> int:
    """Packs every plain linear layer (and GPT-2's transposed kind) that is not packed yet, in place; returns how many.
    Subclasses of `nn.Linear` have a forward of their own and are left alone, as are the embeddings of a tied head."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (packed := _packed(child)) is not None:
                setattr(parent, name, packed)
                count += 1
    return count


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all packed weights, which are no parameters."""
    return sum(module.packed_bytes for module in model.modules() if isinstance(module, PackedLinear))


def _packed(module: nn.Module) -> PackedLinear | None:
    if type(module) not in (nn.Linear, Conv1D):
        return None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    # Hooks (of accelerate and others) would be lost.
    if weight.is_meta or weight.device.type != "cpu" or not can_pack(weight.dtype) or hooks_before(module):
        return None
    bias: Any = module.bias
    return PackedLinear(weight if type(module) is nn.Linear else weight.T, bias)
