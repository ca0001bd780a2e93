"""The whole model as transformers itself builds it: for the unsplit reference, and for the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import AutoModelForCausalLM

from pipetune.bench.models.describe import build_on_meta
from pipetune.bench.models.dummy import init_dummy_weights
from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.runtime.device import TORCH_DTYPES
from pipetune.bench.runtime.stage.precision import compute_mixed
from pipetune.bench.spec import device_index, device_kind


def load_unsplit(resolved: ResolvedModel, devices: Sequence[str]) -> Any:
    """The whole model as transformers itself builds it: the truth that every plan is compared with.

    Args:
        devices: one device, or several GPUs over which the layers are spread as `device_map="auto"` does.

    Raises:
        MemoryError: it does not fit on these GPUs.
    """
    spec = resolved.spec
    kind = device_kind(devices[0])
    skeleton: Any = build_on_meta(resolved)
    spread = spread_over(skeleton, devices) if len(devices) > 1 else None
    if spec.load_format == "dummy":
        init_dummy_weights(skeleton, spec.seed)
        if spread is None:
            whole = skeleton.to(torch.device(devices[0]) if kind == "cuda" else torch.device("cpu"))
        else:
            whole = dispatch_model(skeleton, spread, skip_keys=skeleton._skip_keys_device_placement)
        compute_mixed(whole, spec, torch.device(kind))
        return whole.eval()
    placement: Any = spread or ({"": devices[0]} if kind == "cuda" else None)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        resolved.folder,
        dtype=TORCH_DTYPES[spec.kept_dtype],
        attn_implementation=spec.attn_implementation,
        use_safetensors=True,
        trust_remote_code=spec.trust_remote_code,
        device_map=placement,
    )
    compute_mixed(loaded, spec, torch.device(kind))
    return loaded.eval()


def spread_over(model: Any, gpus: Sequence[str]) -> dict[str, int]:
    """The map that `device_map="auto"` makes over these GPUs alone, with a tenth of what is free left for the KV cache.

    Raises:
        MemoryError: part of the model would end on the host or on disk.
    """
    limits = {device_index(name): int(0.9 * torch.cuda.mem_get_info(device_index(name))[0]) for name in gpus}
    whole = model._no_split_modules
    balanced = get_balanced_memory(model, max_memory=dict(limits), no_split_module_classes=whole)
    device_map: dict[str, Any] = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=whole)
    if not set(device_map.values()) <= set(limits):
        free = sum(limits.values()) / 2**30
        raise MemoryError(f"not enough memory: the unsplit model does not fit into {free:.1f} GiB of {', '.join(gpus)}")
    return device_map
