"""The whole model as transformers itself builds it: the truth that plans are compared with, and the baseline."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import AutoModelForCausalLM

from pipetune.bench.models.describe import build_on_meta
from pipetune.bench.models.dummy import init_dummy_weights
from pipetune.bench.models.hf_private import device_map_hints
from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.runtime.device import TORCH_DTYPES
from pipetune.bench.runtime.stage.stage import computing, is_mixed
from pipetune.bench.spec import ModelSpec, device_index, device_kind


def load_unsplit(resolved: ResolvedModel, devices: Sequence[str]) -> Any:
    """The whole model on one device, or spread over GPUs as `device_map="auto"` does; MemoryError if it is too big."""
    spec = resolved.spec
    kind = device_kind(devices[0])
    skeleton: Any = build_on_meta(resolved)
    spread = spread_over(skeleton, devices) if len(devices) > 1 else None
    if spec.load_format == "dummy":
        init_dummy_weights(skeleton, spec.seed)
        if spread is None:
            whole = skeleton.to(torch.device(devices[0]) if kind == "cuda" else torch.device("cpu"))
        else:
            whole = dispatch_model(skeleton, spread, skip_keys=device_map_hints(skeleton)[1])
    else:
        placement: Any = spread or ({"": devices[0]} if kind == "cuda" else None)
        whole = AutoModelForCausalLM.from_pretrained(
            resolved.folder,
            dtype=TORCH_DTYPES[spec.kept_dtype],
            attn_implementation=spec.attn_implementation,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            device_map=placement,
        )
    _compute_mixed(whole, spec, torch.device(kind))
    return whole.eval()


def spread_over(model: Any, gpus: Sequence[str]) -> dict[str, int]:
    """The map that `device_map="auto"` makes over these GPUs alone, with a tenth of what is free left for the KV cache.
    MemoryError where part of the model would end on the host or on disk."""
    limits = {device_index(name): int(0.9 * torch.cuda.mem_get_info(device_index(name))[0]) for name in gpus}
    whole, _ = device_map_hints(model)
    balanced = get_balanced_memory(model, max_memory=dict(limits), no_split_module_classes=whole)
    device_map: dict[str, Any] = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=whole)
    if not set(device_map.values()) <= set(limits):
        free = sum(limits.values()) / 2**30
        raise MemoryError(f"not enough memory: the unsplit model does not fit into {free:.1f} GiB of {', '.join(gpus)}")
    return device_map


def _compute_mixed(model: Any, spec: ModelSpec, device: torch.device) -> None:
    """Makes a whole model compute so in each of its forward passes, those of `generate` included."""
    if not is_mixed(spec):
        return
    forward = model.forward

    @functools.wraps(forward)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        with computing(spec, device):
            return forward(*args, **kwargs)

    model.forward = mixed
