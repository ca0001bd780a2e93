"""Unpatched SGLang as an engine, driven as vLLM is. Never run yet: written after the source of SGLang 0.5.23."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.engines.vllm_args import Arguments, gpus_of
from pipetune.bench.spec import EngineName, Plan, RunSpec

NEVER_RUN = (
    "SGLang's host was written after SGLang's source and has never been run by pipetune's tests: doubt what it says"
)
_STATIC = 0.9
"""Part of a cap that weights and KV cache may take together, which SGLang limits alone: the rest is for activations."""


class SglangEngine(VllmEngine):
    """SGLang on GPUs; it starts anew for every other plan."""

    NAME = "sglang"
    TITLE = "SGLang"
    HOST = Path(__file__).parent / "sglang_host" / "pipetune_sglang_host.py"
    VERSIONS = ((0, 5, 23), (0, 5, 24))
    MOVES = SERVES = False
    NOTES: ClassVar[Mapping[str, tuple[str, ...]]] = {"cuda": (NEVER_RUN,)}

    def _arguments(self, spec: RunSpec) -> Arguments:
        plan, settings = spec.plan, spec.plan.engine
        assert settings is not None
        tokens = share = None
        if settings.kv_cache_memory_bytes is not None:
            held = (self.shape.layers[stage.first_layer : stage.end_layer] for stage in plan.stages)
            most = max(sum(layer.kv_bytes_per_token for layer in layers) for layers in held)
            tokens = settings.kv_cache_memory_bytes * plan.width // max(most, 1)
        else:
            sizes = ((stage, self.device_bytes[stage.device]) for stage in plan.stages)
            share = round(_STATIC * min(stage.cap_bytes(size) / size for stage, size in sizes), 4)
        told: Mapping[str, str | int | float | None] = {
            "model_path": str(self._fleet.folder),
            "dtype": self.model.dtype,
            "trust_remote_code": self.model.trust_remote_code,
            "device": "cuda",
            "random_seed": 0,
            "log_level": "info",
            "tp_size": plan.width,
            "chunked_prefill_size": settings.max_num_batched_tokens,
            "max_running_requests": settings.max_num_seqs,
            "max_total_tokens": tokens,
            "mem_fraction_static": share,
            "disable_cuda_graph": settings.enforce_eager,
        }
        return {name: value for name, value in told.items() if value is not None}

    def _environment(self, plan: Plan) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": gpus_of(plan, os.environ.get("CUDA_VISIBLE_DEVICES")), "HF_HUB_OFFLINE": "1"}


ENGINES: Mapping[EngineName, type[VllmEngine]] = {"vllm": VllmEngine, "sglang": SglangEngine}
"""By the name that a plan has for them."""
