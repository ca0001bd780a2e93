"""Stands in for SGLang, as far as its host uses it: schedulers in processes of their own, plugins, RPCs, streams.

A test copies it to where `sglang` is imported from. Its signatures are compared with those of the published package.
`FAKE_SGLANG` says what goes wrong.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar

VOCAB, RISE = 8, 5.0
"""As in the fake host: the right token's logit, and 0 for all others."""
STEP_S = 0.01
PEAK_BYTES = 2**30
NO_MEMORY = "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."
_PLACE = SimpleNamespace(pp_rank=0, tp_rank=0)


class HookType(Enum):
    AROUND = "around"


class HookRegistry:
    _hooks: ClassVar[dict[str, Callable[..., Any]]] = {}

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        cls._hooks[target] = hook

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hook in cls._hooks.items():
            owner, _, name = target.rpartition(".")
            holder = pkgutil.resolve_name(owner)
            setattr(holder, name, around(getattr(holder, name), hook))
        cls._hooks.clear()


def around(inner: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: hook(inner, *args, **kwargs)


def load_plugins() -> None:
    for entry in importlib.metadata.entry_points(group="sglang.srt.plugins"):
        entry.load()()
    HookRegistry.apply_hooks()


def get_parallel() -> SimpleNamespace:
    return _PLACE


class ForwardMode(Enum):
    EXTEND = 1
    DECODE = 2

    def is_extend(self) -> bool:
        return self is ForwardMode.EXTEND


class ScheduleBatch:
    def __init__(self, forward_mode: ForwardMode, tokens: int) -> None:
        self.forward_mode, self.extend_num_tokens = forward_mode, tokens

    def batch_size(self) -> int:
        return 1


class TpModelWorker:
    def __init__(self, layers: tuple[int, int]) -> None:
        info = SimpleNamespace(start_layer=layers[0], end_layer=layers[1])
        self.model_runner = SimpleNamespace(layer_info=info)

    def forward_batch_generation(self, batch: ScheduleBatch) -> None:
        time.sleep(STEP_S / 10)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at_s = 0.0

    def record(self) -> None:
        self.at_s = time.monotonic()

    def synchronize(self) -> None:
        assert self.at_s

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at_s - self.at_s)


class DeviceModule:
    Event = Event
    peak_bytes = 0

    @staticmethod
    def synchronize() -> None:
        pass

    @classmethod
    def reset_peak_memory_stats(cls) -> None:
        cls.peak_bytes = PEAK_BYTES

    @classmethod
    def max_memory_allocated(cls) -> int:
        return cls.peak_bytes


class Scheduler:
    device_module = DeviceModule

    def __init__(self, counts: list[int]) -> None:
        first = sum(counts[: _PLACE.pp_rank])
        self.tp_worker = TpModelWorker((first, first + counts[_PLACE.pp_rank]))
        pool = SimpleNamespace(mem_usage=0.25)
        self.token_to_kv_pool_allocator = SimpleNamespace(get_kvcache=lambda: pool)

    def handle_rpc_request(self, recv_req: tuple[str, dict[str, Any]]) -> str:
        try:
            getattr(self, recv_req[0])(**recv_req[1])
        except Exception as error:
            return str(error)
        return ""


def run_scheduler_process(pp_rank: int, tp_rank: int, counts: list[int], pipe: Any) -> None:
    load_plugins()
    _PLACE.pp_rank, _PLACE.tp_rank = pp_rank, tp_rank
    scheduler = Scheduler(counts)
    if os.environ.get("FAKE_SGLANG") == "no memory":
        print("Traceback (most recent call last):", NO_MEMORY, sep="\n", file=sys.stderr, flush=True)
        # What SIGQUIT to it comes to.
        os.kill(os.getppid(), signal.SIGKILL)
    pipe.send("ready")
    while True:
        kind, value = pipe.recv()
        if kind == "rpc":
            pipe.send(scheduler.handle_rpc_request(value))
            continue
        if os.environ.get("FAKE_SGLANG") == "dies" and pp_rank == 1:
            os._exit(7)
        scheduler.tp_worker.forward_batch_generation(ScheduleBatch(*value))


class Engine:
    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs
        load_plugins()
        counts = [int(one) for one in os.environ["SGLANG_PP_LAYER_PARTITION"].split(",")]
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        for pp_rank in range(kwargs["pp_size"]):
            for tp_rank in range(kwargs["tp_size"]):
                ours, theirs = context.Pipe()
                context.Process(target=run_scheduler_process, args=(pp_rank, tp_rank, counts, theirs)).start()
                self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()
        # It detokenizes; here it does nothing.
        context.Process(target=time.sleep, args=(60,)).start()
        self.loop = asyncio.new_event_loop()

    def collective_rpc(self, method: str, **kwargs: Any) -> None:
        for pipe in self._pipes:
            pipe.send(("rpc", (method, kwargs)))
        said = [pipe.recv() for pipe in self._pipes]
        assert not any(said), said

    def generate(
        self,
        sampling_params: dict[str, Any],
        input_ids: list[int],
        return_logprob: bool,
        logprob_start_len: int,
        top_logprobs_num: int,
    ) -> dict[str, Any]:
        off = 1.0 if os.environ.get("FAKE_SGLANG") == "wrong" else 0.0
        best = RISE - math.log(math.exp(RISE) + VOCAB - 1)
        given = input_ids[logprob_start_len:]
        pairs = [(None if place == 0 else best - off, token, None) for place, token in enumerate(given)]
        top = [None, *([(best, token, None)] for token in given[1:])]
        return {"output_ids": [0], "meta_info": {"input_token_logprobs": pairs, "input_top_logprobs": top}}

    async def async_generate(
        self, sampling_params: dict[str, Any], input_ids: list[int], stream: bool
    ) -> AsyncIterator[dict[str, Any]]:
        return self._stream(input_ids, sampling_params)

    async def _stream(self, input_ids: list[int], sampling_params: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        tokens: list[int] = []
        for place in range(sampling_params["max_new_tokens"]):
            for pipe in self._pipes:
                how = (ForwardMode.DECODE, 0) if place else (ForwardMode.EXTEND, len(input_ids))
                pipe.send(("forward", how))
            await asyncio.sleep(STEP_S)
            tokens.append((input_ids[0] + place) % VOCAB)
            yield {"output_ids": tokens, "meta_info": {"finish_reason": None, "queue_time": 0.001}}
