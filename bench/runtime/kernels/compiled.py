"""Decoder layers run through `torch.compile`: one graph serves all layers of a kind, all positions and all sizes.

A layer is compiled whole, without the hooks at the ends of a stage. In place of the cache it is given the one entry
that is its own, with the rows already chosen and the position as a number that may change, so that neither the layer's
index nor the step is part of the graph. What is left to differ are things like one token against many, or a mask
against none: a handful of graphs for a stage, however deep.

Every new graph is compared with the eager layer when it is first used. A layer that does not compile, or computes
something else, is no failure of the plan: the stage runs eagerly, and `notes` says why.
"""

import functools
import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pipetune.bench.files import cache_root
from pipetune.bench.models.hf_private import Cache
from pipetune.bench.models.layers import find_layers
from pipetune.bench.models.torch_private import compilers, packed_linear, tensors_in
from pipetune.bench.runtime.kernels.graphs import TOLERANCES
from pipetune.bench.runtime.kernels.static_step import StaticSlotLayer, disagreement
from pipetune.bench.runtime.packed_linear import PackedLinear
from pipetune.bench.runtime.stage.kv_cache import SlotLayer, compute_dtype

MAX_VARIANTS = 24
"""Graphs of one piece of code; layers that need more would be compiled on and on, and run eagerly instead."""


class CompiledLayers:
    """The own layers of one stage, compiled; made once for a worker, whose graphs it keeps from plan to plan. `apply`
    after `Stage.assign` and packing, `remove` before the next: a stage takes its layers for what they are."""

    def __init__(self, *, backend: str = "inductor") -> None:
        self.graphs = 0
        """Compiled so far: if it grows over a pass, that pass's time contains compiling."""
        self.compile_s = 0.0
        """Spent since `apply` in calls that compiled, the comparison with the eager layer included."""
        self._where = ""
        self._layers: list[nn.Module] = []
        self._packed: list[PackedLinear] = []
        self._functions: dict[type[nn.Module], Callable[..., Any]] = {}
        self._known: set[tuple[Any, ...]] = set()
        self._failure: str | None = None
        self._left_out: dict[str, dict[int, None]] = {}
        self._make: Any = compilers()[0].lookup_backend(backend)

    @property
    def notes(self) -> tuple[str, ...]:
        """Where layers run eagerly, and why; empty if all that ran so far are compiled."""
        if self._failure is not None:
            return (f"compile: eager on {self._where}: {self._failure}",)
        return tuple(
            f"compile: eager on {self._where}, layers {', '.join(map(str, layers))}: {reason}"
            for reason, layers in self._left_out.items()
        )

    def apply(self, model: Any, own_layers: Iterable[int], *, where: str = "this stage") -> None:
        """Makes these layers run compiled; `where`, such as `stage 1`, is for the notes. Nothing is compiled yet: the
        first pass over each kind of input does that."""
        self.remove()
        _configure()
        self._where, self.compile_s = where, 0.0
        _, layers = find_layers(model)
        for index in own_layers:
            self._attach(layers[index], index)

    def remove(self) -> None:
        """Makes all layers eager again; graphs are kept for the next `apply`, unless there was a failure."""
        for layer in self._layers:
            del layer.forward
        for linear in self._packed:
            linear.__class__ = PackedLinear
        if self._failure is not None:
            torch.compiler.reset()
            self._known.clear()
        self._layers, self._packed, self._failure, self._left_out = [], [], None, {}

    def _attach(self, layer: nn.Module, index: int) -> None:
        eager = layer.forward
        if (function := self._functions.get(type(layer))) is None:
            function = self._functions[type(layer)] = torch.compile(type(layer).forward, backend=self._backend)
        places: set[Any] = {getattr(module, "layer_idx", None) for module in layer.modules()} - {None}
        place = places.pop() if len(places) == 1 else index

        @functools.wraps(eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
            held: Any = None if cache is None else cache.layers[place]
            if places or type(held) not in (SlotLayer, StaticSlotLayer, type(None)):
                self._left_out.setdefault(f"its cache is a {type(held).__name__}", {})[index] = None
            elif self._failure is None:
                return self._run(function, layer, eager, held, args, kwargs)
            return eager(*args, **kwargs)

        # On the object, so that hooks stay outside of it.
        layer.forward = forward
        self._layers.append(layer)
        for module in layer.modules():
            if type(module) is PackedLinear:
                _make_opaque(module)
                self._packed.append(module)

    def _run(
        self,
        compiled: Callable[..., Any],
        layer: nn.Module,
        eager: Callable[..., Any],
        held: SlotLayer | StaticSlotLayer | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The compiled layer's output; the eager layer's where a graph is new or compiling failed."""
        began, known = time.perf_counter(), self.graphs
        if isinstance(held, SlotLayer) and held.keys is None:
            # A slot gets its memory from an eager pass; what this one writes is written again.
            length = held._length
            eager(*args, **kwargs)
            held._length = length
        try:
            entry = None if held is None else _Entry(held)
            swap = [entry if isinstance(value, Cache) else value for value in args]
            swapped = {name: entry if isinstance(value, Cache) else value for name, value in kwargs.items()}
            kind = (compiled, entry is not None and entry.is_empty, *map(_kind, swap), *map(_kind, swapped.values()))
            if kind not in self._known:
                _mark_sizes(swap, swapped, None if entry is None else (entry.keys, entry.values))
            output = compiled(layer, *swap, **swapped)
            self._known.add(kind)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        # Compilers fail in every way there is, and none of them may cost the plan; what is not their fault the eager
        # layer raises again.
        except Exception as failure:
            expected = eager(*args, **kwargs)
            self._failure = _first_line(failure)
            self.compile_s += time.perf_counter() - began
            return expected
        if self.graphs == known:
            return output
        expected = eager(*args, **kwargs)
        pairs = list(zip(_outputs(expected), _outputs(output), strict=True))
        error = max(disagreement(one, other) for one, other in pairs)
        self.compile_s += time.perf_counter() - began
        if error > TOLERANCES[compute_dtype(pairs[0][0])]:
            self._failure = f"a compiled layer differs from the eager one by {error:.2g} of its size"
        return expected

    def _backend(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return self._make(graph, inputs)


class _Entry:
    """A layer's own entry of the cache, in the cache's place: whatever the index, keys and values go here."""

    def __init__(self, held: SlotLayer | StaticSlotLayer) -> None:
        assert held.keys is not None
        assert held.values is not None
        self.is_static = isinstance(held, StaticSlotLayer)
        self.is_empty = isinstance(held, SlotLayer) and held._length == 0
        if isinstance(held, StaticSlotLayer):
            self.keys, self.values, self.position = held.keys, held.values, held._position
            return
        rows = slice(held._first_row, held._end_row)
        self.keys, self.values = held.keys[rows], held.values[rows]
        window = held.sliding_window
        # The compiler takes 0 and 1 for constants, and these are none.
        self.kv_begin = held._length + 2
        self.kv_start = (0 if window is None else max(held._length - window + 1, 0)) + 2

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The update of the entry it stands for; `args` are the layer's index and what it has to say besides."""
        if self.is_static:
            self.keys.index_copy_(2, self.position, keys)
            self.values.index_copy_(2, self.position, values)
            return self.keys, self.values
        start, begin = self.kv_start - 2, self.kv_begin - 2
        end = begin + keys.shape[-2]
        self.keys[:, :, begin:end].copy_(keys)
        self.values[:, :, begin:end].copy_(values)
        return self.keys[:, :, start:end], self.values[:, :, start:end]


def _configure() -> None:
    """Settings of the whole process. Compiled code is kept in the user's cache, for every later process."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
    dynamo, inductor = compilers()
    dynamo.config.recompile_limit = MAX_VARIANTS
    dynamo.config.fail_on_recompile_limit_hit = True
    # The numbers in which layers and steps differ; all others that a module holds stay constants.
    dynamo.config.allow_unspec_int_on_nn_module = True
    torch.compiler.config.dynamic_sources = r".*\.kv_begin,.*\.kv_start,.*\.layer_idx"
    # Compilers in processes of their own would stay, beside what is measured.
    inductor.config.compile_threads = 1


def _kind(value: Any) -> Any:
    """What of an argument may lead to a graph of its own, as far as it is quickly told."""
    if isinstance(value, torch.Tensor):
        return tuple([size == 1 for size in value.shape])
    return value if value is None or isinstance(value, bool) else type(value)


def _mark_sizes(*values: Any) -> None:
    """Tells the compiler that every size may change; those that the layer's own code and weights fix, it still fixes.

    It takes as long as some of a layer's work, and is left out where a graph was made or found before. Else all are
    marked, always: a graph is not used for what has more marks than it was made with.
    """
    dynamo, _ = compilers()
    for tensor in tensors_in(values):
        for axis in range(tensor.dim()):
            dynamo.maybe_mark_dynamic(tensor, axis)


def _outputs(output: Any) -> list[torch.Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.dim() > 1]


def _first_line(error: Exception) -> str:
    # What compilers raise is wrapped in errors that only name the compiler.
    while isinstance(cause := getattr(error, "inner_exception", None), Exception):
        error = cause
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


# A weight in oneDNN's layout can be no input of a graph: the graph is given a number for it, as a tensor, since a plain
# number would be part of the graph and each layer would need its own.
_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
_library: Any = torch.library.Library("pipetune", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("packed_linear(Tensor input, Tensor handle, Tensor? bias, int out_features) -> Tensor")


def _packed_linear(x: torch.Tensor, handle: torch.Tensor, bias: torch.Tensor | None, out: int) -> torch.Tensor:
    return packed_linear(x, _by_handle[int(handle)]._packed, bias)


def _packed_linear_sizes(x: torch.Tensor, handle: torch.Tensor, bias: torch.Tensor | None, out: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out))


_library.impl("packed_linear", _packed_linear, "CPU")
torch.library.register_fake("pipetune::packed_linear", _packed_linear_sizes, lib=_library)


class _OpaqueLinear(PackedLinear):
    """A packed linear layer that a graph can call."""

    handle: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  as in nn.Linear
        output: torch.Tensor = torch.ops.pipetune.packed_linear(input, self.handle, self.bias, self.out_features)
        return output


def _make_opaque(linear: Any) -> None:
    """Changes the class in place: the layer that holds it is left as it is."""
    if not hasattr(linear, "handle"):
        linear.handle = torch.tensor(next(_handles))
        _by_handle[int(linear.handle)] = linear
    linear.__class__ = _OpaqueLinear
