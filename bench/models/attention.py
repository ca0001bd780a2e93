"""Attention kernels asked for by name: what cannot work here is refused before anything is loaded."""

from collections.abc import Callable, Sequence
from typing import Any

from pipetune.bench.errors import ModelError
from pipetune.bench.models import hf_private as hf
from pipetune.bench.spec import ModelSpec, device_kind

_FLASH: dict[str, tuple[Callable[[], bool], str]] = {
    "flash_attention_2": (hf.is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (hf.is_flash_attn_3_available, "flash-attn-3"),
}
"""Whether a kernel is installed for a GPU that is here, and the package that brings it."""


def check_attention(spec: ModelSpec, family: Any) -> None:
    """Refuses, by a ModelError, a kernel that a family, a class of models, does not have, or that is not installed.
    transformers itself would fetch some from the hub, or take another one than was asked for."""
    place = f"model.attention={spec.attention}"
    sdpa, flash, known = hf.kernels_of(family)
    if spec.attention == "sdpa" and not sdpa:
        raise ModelError(f"{place}: {family.__name__} has none; choose eager or auto")
    if spec.attention not in _FLASH:
        return
    if not flash or (known is not None and spec.attention not in known):
        others = sorted(set(known or ()) & set(_FLASH)) if flash else []
        others += ["sdpa"] if sdpa else ["eager"]
        raise ModelError(f"{place}: {family.__name__} does not support it; choose {' or '.join(others)}, or auto")
    if spec.dtype == "float32":
        raise ModelError(
            f"{place} computes in bfloat16 and float16 alone, and model.dtype is float32; choose another dtype, or sdpa"
        )
    is_available, package = _FLASH[spec.attention]
    if not is_available():
        raise ModelError(
            f"{place}: its package {package} is not installed here, or no GPU is; install it, or choose sdpa or auto"
        )


def check_attention_devices(spec: ModelSpec, devices: Sequence[str]) -> None:
    """Refuses, by a ModelError, a kernel that runs on GPUs alone where a stage may be on another device."""
    odd = next((name for name in devices if device_kind(name) != "cuda"), None)
    if spec.attention in _FLASH and odd is not None:
        raise ModelError(f"model.attention={spec.attention} runs on GPUs alone, and {odd} is none; choose sdpa or auto")
