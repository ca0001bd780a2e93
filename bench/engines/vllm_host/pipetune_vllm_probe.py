"""What runs inside vLLM's workers, by `worker_extension_cls`: spans of compute and of waits, memory, another split.

Instances are wrapped, and vLLM's code is left as it is. Every name of vLLM's that is used is asked for by name, so that
a version without it says so.
"""

import gc
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def status_bytes(name: str) -> int:
    """A size that the kernel tells of this process, such as VmRSS; 0 where it does not."""
    found = re.search(rf"^{name}:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


BASELINE_BYTES = status_bytes("VmRSS")
"""What a worker takes before it loads a model: it imports this just before."""


def need(owner: Any, *names: str) -> Any:
    """What stands at the end of a chain of attributes; AttributeError where vLLM is not as was expected."""
    place = type(owner).__name__
    for name in names:
        if not hasattr(owner, name):
            raise AttributeError(f"this version of vLLM has no {place}.{name}, which the probe needs")
        owner, place = getattr(owner, name), f"{place}.{name}"
    return owner


def _recorded() -> Any:
    """An event behind all that the device was given so far."""
    import torch

    make: Any = torch.cuda.Event
    event = make(enable_timing=True)
    event.record()
    return event


class StageProbe:
    """Becomes a base class of vLLM's worker, which refuses names that it has itself."""

    def pipetune_install(self) -> dict[str, Any]:
        """Wraps what the present runner does, and says which layers it holds."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        group, runner = get_pp_group(), need(self, "model_runner")
        model = need(runner, "get_model")()
        self.pipetune_spans: list[tuple[Any, ...]] = []
        self.pipetune_on, self.pipetune_device = False, need(runner, "device").type
        self.pipetune_entered: Any = None
        self.pipetune_zero: Any = None
        if self.pipetune_device == "cpu" and not group.is_first_rank and need(runner, "intermediate_tensors") is None:
            # On CPUs vLLM 0.32 makes them in a dummy run, which eager mode has none of, and then fails an assertion.
            how = {"dtype": need(runner, "model_config", "dtype"), "device": need(runner, "device")}
            make = need(model, "make_empty_intermediate_tensors")
            runner.intermediate_tensors = make(batch_size=need(runner, "max_num_tokens"), **how)
        self._pipetune_wrap(runner, "execute_model", "compute", received=True)
        self._pipetune_wrap(runner, "sample_tokens", "sample")
        if "execute_model" not in vars(self):
            inner = need(self, "execute_model")

            def entered(*args: Any, **kwargs: Any) -> Any:
                self.pipetune_entered = self._pipetune_now()
                return inner(*args, **kwargs)

            self.execute_model = entered
            if group.world_size > 1:
                self._pipetune_wrap(group, "irecv_tensor_dict", "receive")
                self._pipetune_wrap(group, "isend_tensor_dict", "send")
        layers = need(getattr(model, "model", model), "layers")
        kept = [index for index, layer in enumerate(layers) if type(layer).__name__ != "PPMissingLayer"]
        caches = {one.data_ptr(): one.numel() * one.element_size() for one in need(runner, "kv_caches")}
        return {
            "stage": group.rank_in_group,
            "shard": get_tp_group().rank_in_group,
            "pid": os.getpid(),
            "first_layer": min(kept),
            "end_layer": max(kept) + 1,
            "kv_bytes": sum(caches.values()),
            "baseline_bytes": BASELINE_BYTES if self.pipetune_device == "cpu" else 0,
        }

    def _pipetune_wrap(self, owner: Any, name: str, kind: str, *, received: bool = False) -> None:
        """Notes when a method begins and ends; `received` waits for its input first, outside of its span."""
        inner: Callable[..., Any] = need(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.pipetune_on:
                return inner(*args, **kwargs)
            sizes, start, spans = (0, 0), self._pipetune_now(), self.pipetune_spans
            if self.pipetune_entered is not None:
                # Until here the worker waited for what it sent before.
                spans.append(("send", self.pipetune_entered, start, *sizes))
                self.pipetune_entered = None
            if received:
                batch = args[0]
                sizes = (len(batch.num_scheduled_tokens), batch.total_num_scheduled_tokens)
                if len(args) > 1 and hasattr(args[1], "wait_for_comm"):
                    args[1].wait_for_comm()
                    spans.append(("receive", start, self._pipetune_now(), 0, 0))
                    start = self._pipetune_now()
            try:
                return inner(*args, **kwargs)
            finally:
                spans.append((kind, start, self._pipetune_now(), *sizes))

        setattr(owner, name, timed)

    def _pipetune_now(self) -> Any:
        """Now: on GPUs an event behind what was given to the device, as the host runs ahead of it."""
        return time.monotonic() if self.pipetune_zero is None else _recorded()

    def pipetune_begin(self) -> bool:
        """Starts to record; whether the peak of memory starts anew as well."""
        self.pipetune_spans.clear()
        self.pipetune_on = True
        if self.pipetune_device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            # An event that is done at a time which is known: all others are told from it.
            zero = _recorded()
            zero.synchronize()
            self.pipetune_zero = zero, time.monotonic()
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def pipetune_end(self) -> dict[str, Any]:
        """What was recorded, and the largest resident set meanwhile."""
        self.pipetune_on = False
        if self.pipetune_zero is None:
            return {"spans": list(self.pipetune_spans), "peak_bytes": status_bytes("VmHWM")}
        import torch

        torch.cuda.synchronize()
        (zero, zero_s), self.pipetune_zero = self.pipetune_zero, None
        spans = [
            (kind, *(zero_s + 1e-3 * zero.elapsed_time(event) for event in (start, end)), *sizes)
            for kind, start, end, *sizes in self.pipetune_spans
        ]
        return {"spans": spans, "peak_bytes": torch.cuda.max_memory_allocated()}

    def pipetune_repartition(self, layers: list[int]) -> None:
        """Another runner with other layers, in the same process; its KV cache is the engine's to make."""
        import vllm.envs
        from vllm.config import set_current_vllm_config

        os.environ["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, layers))
        need(vllm.envs, "disable_envs_cache")()
        config = need(self, "vllm_config")
        need(config, "compilation_config", "static_forward_context").clear()
        kind = type(need(self, "model_runner"))
        self.model_runner: Any = None
        gc.collect()
        with set_current_vllm_config(config):
            self.model_runner = kind(config, need(self, "device"))
            need(self, "load_model")()
