"""Half-precision compute over weights kept in float32: torch's autocast around the model's forward pass.

Matrix products and attention run in the half dtype, norms, sums and the hidden states between layers stay in float32.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from pipetune.bench.runtime.device import TORCH_DTYPES
from pipetune.bench.spec import ModelSpec


def is_mixed(spec: ModelSpec) -> bool:
    """Whether weights are kept in another dtype than the model computes in."""
    return spec.kept_dtype != spec.dtype


def computing(spec: ModelSpec, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Around a forward pass: computes in the dtype of the spec, whatever weights are kept in."""
    if not is_mixed(spec):
        return contextlib.nullcontext()
    # Each weight is used once a pass: to keep the halved ones as well would only take memory.
    return torch.autocast(device.type, dtype=TORCH_DTYPES[spec.dtype], cache_enabled=False)


def compute_mixed(model: Any, spec: ModelSpec, device: torch.device) -> None:
    """Makes a whole model compute so in each of its forward passes, those of `generate` included."""
    if not is_mixed(spec):
        return
    forward = model.forward

    @functools.wraps(forward)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        with computing(spec, device):
            return forward(*args, **kwargs)

    model.forward = mixed
