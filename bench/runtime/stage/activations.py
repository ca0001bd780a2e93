"""What a task's tensors take while a stage works on it, found by running layers without memory, on the meta device.

Formulas for this would be as many as families: experts sort their tokens, states are scanned in chunks, scores are
written out or not. So a few tasks are run, and what lived at once is told apart by what it grows with.
"""

# mypy: allow-untyped-calls
from typing import Any

import torch

from pipetune.bench.memory import ModelShape, Samples, TaskBytes
from pipetune.bench.models.describe import build_on_meta
from pipetune.bench.models.layers import find_layers, kind_of
from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.models.torch_private import ASKS, GROUPED_MM, TorchDispatchMode, address_of, tensors_in
from pipetune.bench.runtime.stage.boundary import probe
from pipetune.bench.runtime.stage.kv_cache import SlotCache
from pipetune.bench.runtime.stage.live_bytes import LiveBytes
from pipetune.bench.runtime.stage.stage import Stage

META = torch.device("meta")
_CHUNK = 512
_LENGTHS = tuple(2**power for power in range(9, 18, 2))
"""Positions at which tasks are run: a mask and scores grow with them, and from some on they are the most of it."""
_LENGTHS_OF_STATES = (16, 128)
_BEHIND = 2
"""Layers that are run behind the first one of the last kind: the stream between them is then there as well."""
_aten = torch.ops.aten


class TaskMemory(TorchDispatchMode):
    """While entered, counts what operations make on a kind of device; what they are given was there before."""

    def __init__(self, kind: str = "meta") -> None:
        super().__init__()
        self.live = LiveBytes()
        self._kind = kind
        self._given: set[int] = set()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self.kernel(func, args, kwargs)
        for tensor in tensors_in((args, kwargs)):
            if not self.live.knows(address_of(tensor.untyped_storage())):
                self._given.add(address_of(tensor.untyped_storage()))
        made = (tensor for tensor in tensors_in(result) if tensor.device.type == self._kind)
        self.live.add(tensor for tensor in made if address_of(tensor.untyped_storage()) not in self._given)
        return result

    def kernel(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation's result; of kernels on GPUs that write nothing but their output, that alone. What asks for a
        number gets some, so that work goes on."""
        if func is _aten.scaled_dot_product_attention.default:
            query, _, value = args[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        if func is GROUPED_MM:
            return args[0].new_empty((args[0].shape[0], args[1].shape[-1]))
        if func in ASKS and args[0].device.type == self._kind:
            return {torch.bool: False}.get(args[0].dtype, 1)
        return func(*args, **kwargs)


def measure_tasks(resolved: ResolvedModel, shape: ModelShape) -> TaskBytes | None:
    """What tasks of a model take a token; None where the family cannot be run on the meta device."""
    lengths = _LENGTHS_OF_STATES if shape.recurrent else _LENGTHS
    lengths = tuple(length for length in lengths if length <= max(_LENGTHS[1], shape.max_positions or length))
    try:
        stage = _stage(resolved)
        slot = stage.new_cache(rows=1, max_len=lengths[-1])
        # The first task gives the slot its memory.
        _bytes(stage, slot, 1, 1, has_head=False)

        def samples(most: int) -> Samples:
            return tuple(
                (length, *(_bytes(stage, slot, min(most, length), length, has_head=has) for has in (False, True)))
                for length in lengths
            )

        prompt = samples(lengths[-1])
        chunk = prompt if shape.recurrent else samples(_CHUNK)
        return TaskBytes(prompt=prompt, chunk=chunk, decode=samples(1))
    # Families fail in every way there is where they look into numbers.
    except Exception:
        return None


def _stage(resolved: ResolvedModel) -> Stage:
    """All of a model on the meta device; layers like those before them pass on what they get."""
    stage, model = Stage(resolved, META), build_on_meta(resolved)
    _, layers = find_layers(model)
    kinds = [kind_of(layer) for layer in layers]
    returns = probe(build_on_meta(resolved)).returns_tuple_of

    def pass_on(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden, *(None,) * (returns - 1)) if returns else hidden

    for place in range(max(map(kinds.index, kinds)) + _BEHIND, len(layers)):
        layers[place].forward = pass_on
    stage._model, stage.own_layers, stage.is_first, stage.is_last = model, range(len(layers)), True, True
    stage._attach()
    return stage


def _bytes(stage: Stage, slot: SlotCache, new: int, length: int, *, has_head: bool) -> int:
    """Most bytes a token alive within a task of one padded row, the last `new` of so many positions."""
    ids = torch.zeros((1, length), dtype=torch.long, device=META)
    own = ids[:, length - new :]
    slot.seek(0, 1, length - new)
    memory = TaskMemory()
    with memory:
        stage.forward(own, ids, own, slot, without_logits=not has_head)
    return -(-memory.live.peak // new)
