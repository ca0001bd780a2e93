"""`torch.cuda` over the CPU: devices, streams, events, graphs, memory under a cap, and what tells of hidden waits."""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipetune.bench.runtime.stage.live_bytes import LiveBytes
from tests.rehearsal.stub import nccl
from tests.rehearsal.stub.machine import GIB, StubGpu, StubMachine

aten = torch.ops.aten
CPU = torch.device("cpu")
ASKS_HOST = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.nonzero.default)
"""Operations for which the host waits."""
_now = threading.local()


# Devices: what is asked for on `cuda` lies on the CPU.


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, torch.device):
        return value.type == kind
    return isinstance(value, str) and value.partition(":")[0] == kind


def _is_gpu(value: Any) -> bool:
    """Whether a device was asked for that is one; accelerate names a GPU by its number."""
    return _is_kind(value, "cuda") or type(value) is int


class Masquerade(TorchFunctionMode):
    """Puts on the CPU, and counts as a GPU's, what is asked for on one."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device and args and type(args[0]) is int:
            return torch.device("cuda", args[0])
        name = getattr(func, "__name__", "")
        if name == "pin_memory":
            return args[0]
        moves = name in ("to", "cuda", "cpu")
        if not moves and (not kwargs or "device" not in kwargs):
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        to_host = name == "cpu" or any(_is_kind(value, "cpu") for value in (*args[1:2], kwargs.get("device")))
        if moves and to_host and MEMORY.holds(args[0]):
            # From a GPU it is a copy; else it would be the tensor itself, which a graph writes again.
            with MEMORY.uncounted():
                return func(*args, **kwargs).clone()
        to_gpu = name == "cuda" or _is_gpu(kwargs.get("device"))
        if moves and any(map(_is_gpu, args[1:2])):
            to_gpu, args = True, (args[0], CPU, *args[2:])
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        if to_gpu and isinstance(result, torch.Tensor) and not MEMORY.holds(result):
            # What lies on the host stays there.
            result = result.detach().clone() if moves and result is args[0] else result
            MEMORY.take([result])
        return result


# Memory: what operations on a GPU's tensors give is a GPU's.


class Memory(TorchDispatchMode):
    """Counts a GPU's tensors; refuses what goes beyond the cap, as CUDA's allocator says it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = LiveBytes()
        self.cap: int | None = None
        self._is_counting = True

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is made within lies on the host."""
        self._is_counting = False
        try:
            yield
        finally:
            self._is_counting = True

    def holds(self, tensor: torch.Tensor) -> bool:
        return self.live.knows(tensor.untyped_storage()._cdata)

    def take(self, tensors: list[torch.Tensor]) -> None:
        """Counts tensors as the GPU's."""
        added = self.live.add(tensors)
        if self.cap is not None and added and self.live._most > self.cap and self.live.now() > self.cap:
            held, total = self.live.now() - added, own_gpu().memory_bytes
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {added / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{total / GIB:.2f} GiB of which {(total - GIB - held) / GIB:.2f} GiB is free. Including non-PyTorch "
                f"memory, this process has {(GIB + held) / GIB:.2f} GiB memory in use. {self.cap / 2**20:.2f} MiB "
                f"allowed; Of the allocated memory {held / 2**20:.2f} MiB is allocated by PyTorch, and 0 bytes is "
                "reserved by PyTorch but unallocated."
            )

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_counting:
            given = [tensor.untyped_storage()._cdata for tensor in _tensors(args)]
            if any(self.live.knows(storage) for storage in given):
                # What was written in place, or is a view, lies where it lay.
                made = [one for one in _tensors((result,)) if one.untyped_storage()._cdata not in given]
                if made:
                    self.take(made)
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    """Tensors among an operation's arguments; quicker than torch's own way through trees."""
    found = []
    for value in values:
        # A weight that a CPU worker packed for oneDNN has no storage to look at.
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _mapped(function: Callable[[Any], Any], values: Any) -> Any:
    """An operation's arguments with a function applied to each."""
    if isinstance(values, list | tuple):
        return [_mapped(function, value) for value in values]
    if isinstance(values, dict):
        return {name: _mapped(function, value) for name, value in values.items()}
    return function(values)


MEMORY = Memory()


def own_gpu(device: Any = None) -> StubGpu:
    """The GPU of a device, or of the one that was claimed."""
    index = device if isinstance(device, int) else getattr(torch.device(device) if device else None, "index", None)
    return StubMachine.read().in_cuda_order()[_claimed[0] if index is None else index]


_claimed = [0]
_contexts: set[str] = set()


def meet_fault(gpu: StubGpu) -> None:
    """Raises what a broken GPU's driver says."""
    if gpu.fault is not None:
        raise torch.AcceleratorError(
            f"CUDA error: {gpu.fault}\nCUDA kernel errors might be asynchronously reported at some other API call, so "
            "the stacktrace below might be incorrect."
        )


def make_context(gpu: StubGpu) -> None:
    """The first use of a GPU in a process: torch holds the interpreter's lock until the driver has made a context."""
    seconds = 0 if gpu.uuid in _contexts else StubMachine.read().context_s
    _contexts.add(gpu.uuid)
    meet_fault(gpu)
    if seconds:
        ctypes.PyDLL("libc.so.6").sleep(seconds)


def set_device(device: Any) -> None:
    """Claims a device."""
    _claimed[0] = torch.device(device).index or 0
    make_context(own_gpu())


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes; contexts take one GiB."""
    make_context(own_gpu(device))
    total = own_gpu(device).memory_bytes
    return total - GIB - MEMORY.live.now(), total


def reset_peak_memory_stats(device: Any = None) -> None:
    MEMORY.live.peak = MEMORY.live.now()


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    """Caps what tensors of this process may take."""
    assert 0.0 <= fraction <= 1.0
    MEMORY.cap = int(fraction * own_gpu(device).memory_bytes)


# Streams and events: work is done once it is issued.


class Stream:
    """A stream of compute or copies."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority = device, priority

    def wait_event(self, event: Event) -> None:
        assert event.at is not None or not event.timing, "waited for an event that was never recorded"

    def wait_stream(self, other: Stream) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing to wait for: what waits for messages did so on the host."""

    def query(self) -> bool:
        return True


DEFAULT = Stream()


def current_stream(device: Any = None) -> Stream:
    return getattr(_now, "stream", DEFAULT)


class StreamContext:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before, _now.stream = current_stream(), self._stream

    def __exit__(self, *_: object) -> None:
        _now.stream = self._before


class Event:
    """A moment; recorded while a graph is captured, it is known only if it is external, and after each replay."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self.timing, self.external, self.at = enable_timing, external, None
        self._within_graph = False

    at: float | None

    def record(self, stream: Stream | None = None) -> None:
        graph: CUDAGraph | None = getattr(_now, "graph", None)
        self._within_graph = graph is not None and not self.external
        if graph is not None and self.external:
            # What was captured has not happened yet.
            self.at = None
            graph.note(self._tick)
        else:
            self._tick()

    def _tick(self) -> None:
        self.at = time.monotonic()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        """Done once issued."""
        meet_fault(own_gpu())

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        if not (self.timing and end.timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self.at is None or end.at is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        if self._within_graph or end._within_graph:
            raise RuntimeError("CUDA error: invalid argument: the event was recorded within a graph")
        return (end.at - self.at) * 1e3


def synchronize(device: Any = None) -> None:
    """Waits for every message, as the device does; nothing may wait while a graph is captured."""
    if getattr(_now, "graph", None) is not None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
    meet_fault(own_gpu(device))
    nccl.wait_for_messages()


# Graphs: operations are noted with the places of what they made, and done again on replay.


class _Place:
    """The place of a tensor that an earlier operation of the graph made."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Noted:
    """One operation; tensors that are alive when the capture has ended are outputs, and written on each replay."""

    def __init__(self, func: Any, args: Any, kwargs: Any, made: list[tuple[int, weakref.ref[torch.Tensor]]]) -> None:
        self.func, self.args, self.kwargs, self.made = func, args, kwargs, made


POOL = (0, 1)
_captured: weakref.WeakSet[CUDAGraph] = weakref.WeakSet()


class CUDAGraph:
    """A captured graph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.operations: list[_Noted | Callable[[], None]] = []
        self.is_captured = False

    def note(self, operation: _Noted | Callable[[], None]) -> None:
        self.operations.append(operation)

    def replay(self) -> None:
        assert self.is_captured, "replay of what was not captured"
        meet_fault(own_gpu())
        places: dict[int, torch.Tensor] = {}

        def resolved(value: Any) -> Any:
            return places[value.number] if isinstance(value, _Place) else value

        with torch.inference_mode():
            for operation in self.operations:
                if not isinstance(operation, _Noted):
                    operation()
                    continue
                result = operation.func(*_mapped(resolved, operation.args), **_mapped(resolved, operation.kwargs))
                for (number, reference), tensor in zip(operation.made, _tensors((result,)), strict=True):
                    places[number] = tensor
                    output = reference()
                    if output is not None and output is not tensor:
                        output.copy_(tensor)

    def reset(self) -> None:
        self.operations, self.is_captured = [], False

    def pool(self) -> tuple[int, int]:
        return POOL


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self._graph = graph
        self._places: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []
        """Until the capture ends: what is gone could have its identity given to another."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ASKS_HOST:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({func})")
        result = func(*args, **kwargs)

        def placed(value: Any) -> Any:
            return _Place(self._places[id(value)]) if id(value) in self._places else value

        noted_args, noted_kwargs = _mapped(placed, args), _mapped(placed, kwargs)
        made = []
        for leaf in _tensors((result,)):
            number = self._places.setdefault(id(leaf), len(self._places))
            self._alive.append(leaf)
            made.append((number, weakref.ref(leaf)))
        self._graph.note(_Noted(func, noted_args, noted_kwargs, made))
        return result


class graph:  # noqa: N801  the name of torch's own
    """Captures what is done within."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> None:
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        self._graph, self._context = cuda_graph, StreamContext(stream or Stream())

    def __enter__(self) -> None:
        synchronize()
        self._context.__enter__()
        assert current_stream() is not DEFAULT, "CUDA graphs must be captured on a non-default stream."
        self._recorder = _Recorder(self._graph)
        _now.graph = self._graph
        self._recorder.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._recorder.__exit__(*error)
        _now.graph = None
        self._graph.is_captured = error[0] is None
        _captured.add(self._graph)
        self._context.__exit__(*error)


# What makes the host wait without a word.


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKS_HOST:
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


_sync: dict[str, Any] = {"mode": 0, "watch": None, "warned": False}


def set_sync_debug_mode(mode: int | str) -> None:
    mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode) if isinstance(mode, str) else mode
    if not _sync["warned"]:
        _sync["warned"] = True
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=2,
        )
    if _sync["watch"] is not None:
        _sync["watch"].__exit__(None, None, None)
        _sync["watch"] = None
    if mode == 2:
        _sync["watch"] = _NoWaiting()
        _sync["watch"].__enter__()
    _sync["mode"] = mode


def install(module: Any) -> None:
    """Puts the stand-ins into torch, and all that it does from now on under their watch."""
    cuda = module.cuda
    properties = functools.partial(_properties)
    stand_ins: dict[str, Any] = {
        "is_available": lambda: bool(StubMachine.read().in_cuda_order()),
        "device_count": lambda: len(StubMachine.read().in_cuda_order()),
        "current_device": lambda: _claimed[0],
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: own_gpu(device).name,
        "is_bf16_supported": lambda *args, **given: True,
        "is_current_stream_capturing": lambda: getattr(_now, "graph", None) is not None,
        "init": lambda: None,
        "default_stream": lambda device=None: DEFAULT,
        "stream": StreamContext,
        "graph_pool_handle": lambda: POOL,
        "get_sync_debug_mode": lambda: _sync["mode"],
        "memory_reserved": lambda device=None: MEMORY.live.now(),
        "memory_allocated": lambda device=None: MEMORY.live.now(),
        "max_memory_allocated": lambda device=None: MEMORY.live.peak,
        "reset_peak_memory_stats": reset_peak_memory_stats,
        "empty_cache": lambda: None,
        "memory_snapshot": lambda *args, **given: [
            {"segment_pool_id": POOL, "total_size": 2**21 * len(_captured), "allocated_size": 0}
        ],
    }
    own = (set_device, mem_get_info, set_per_process_memory_fraction, current_stream, synchronize, set_sync_debug_mode)
    stand_ins |= {function.__name__: function for function in own}
    stand_ins |= {kind.__name__: kind for kind in (Stream, Event, CUDAGraph, graph)}
    for name, stand_in in stand_ins.items():
        setattr(cuda, name, stand_in)
    cuda.nccl.version = lambda: (2, 28, 9)
    import torch.distributed as dist

    nccl.install(dist)
    # A mode holds for the thread that entered it, and transformers would load in others.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    MEMORY.__enter__()
    Masquerade().__enter__()


def _properties(device: Any = None) -> SimpleNamespace:
    gpu = own_gpu(device)
    return SimpleNamespace(
        name=gpu.name,
        total_memory=gpu.memory_bytes,
        major=9,
        minor=0,
        multi_processor_count=132,
        uuid=gpu.uuid.removeprefix("GPU-"),
    )
