"""Where a stage begins and ends: hooks that put in what the stage before sent, and take out what the next one needs.

Between two layers run hidden states, and in some families more: several streams of them, or a further tensor that each
layer hands on. `MessageFormat` packs all of it into one tensor `[B, S, M]`, the message; for most families that is the
hidden states as they are.

Shapes: B rows, S new tokens, M values of a message.
"""

# mypy: allow-untyped-calls
import contextlib
import inspect
import math
import typing
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipetune.bench.cuts import embeds_in_layers
from pipetune.bench.models.layers import CARRIED, find_layers
from pipetune.bench.models.torch_private import TorchDispatchMode, address_of, tensors_in

_ROWS, _TOKENS = 7, 11
"""Sizes by which a probe knows the two axes again."""


class StageDone(Exception):
    """Carries the message out of the model's forward."""

    def __init__(self, message: torch.Tensor) -> None:
        self.message = message


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageFormat:
    """How what a layer hands on is packed into one tensor `[B, S, M]`."""

    before: tuple[int, ...] = ()
    """Sizes of the axes of the hidden states that lie before the rows."""
    behind: tuple[int, ...]
    """Sizes of the axes of the hidden states that lie behind the tokens."""
    carried: tuple[tuple[str, int], ...] = ()
    """Further tensors `[B, S, width]`: the argument by which a layer takes each, and its width."""
    carried_dtype: torch.dtype
    dtype: torch.dtype
    """Dtype of the hidden states, and so of the message; never narrower than that of further tensors."""
    arguments: tuple[str, ...]
    """Names of what a layer takes, in order; the hidden states first."""
    returns_tuple_of: int
    """Length of the tuple that a layer returns; 0 if it returns a tensor."""
    needs_mask: bool = False
    """Whether the model, without a mask, looks into the ids for padding."""
    reads_ids: bool = True
    """Whether anything but the embedding may read the ids, so that every stage needs the real ones."""

    @property
    def values(self) -> int:
        """M: values per token."""
        return self._hidden_values + sum(width for _, width in self.carried)

    @property
    def _hidden_values(self) -> int:
        return math.prod(self.before + self.behind)

    @property
    def _is_plain(self) -> bool:
        return not self.before and len(self.behind) == 1 and not self.carried

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The message in what a layer is called with."""
        hidden, *further = (
            args[place] if (place := self.arguments.index(name)) < len(args) else kwargs[name]
            for name in self._crossing
        )
        if torch.is_autocast_enabled(hidden.device.type):
            # In mixed precision some layers take either; the wider one loses nothing.
            hidden = hidden.to(self.dtype)
        # The next stage's buffers have this dtype; NCCL would hang or tear on another.
        assert hidden.dtype == self.dtype, f"a layer hands on {hidden.dtype}, not {self.dtype}"
        if self._is_plain:
            return typing.cast("torch.Tensor", hidden)
        axes = len(self.before)
        hidden = hidden.permute(axes, axes + 1, *range(axes), *range(axes + 2, hidden.dim())).flatten(2)
        return torch.cat([hidden, *(tensor.to(self.dtype) for tensor in further)], -1)

    def unpack(
        self, message: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer's arguments, with those that crossed put in their place."""
        crossed = [message] if self._is_plain else self._tensors(message)
        positional, named = list(args), dict(kwargs)
        for name, tensor in zip(self._crossing, crossed, strict=True):
            place = self.arguments.index(name)
            if place < len(positional):
                positional[place] = tensor
            else:
                named[name] = tensor
        return tuple(positional), named

    @property
    def _crossing(self) -> tuple[str, ...]:
        return (self.arguments[0], *(name for name, _ in self.carried))

    def _tensors(self, message: torch.Tensor) -> list[torch.Tensor]:
        widths = [self._hidden_values, *(width for _, width in self.carried)]
        hidden, *further = torch.split(message, widths, dim=-1)
        rows, tokens = message.shape[:2]
        axes = len(self.before)
        hidden = hidden.reshape(rows, tokens, *self.before, *self.behind)
        order = (*range(2, 2 + axes), 0, 1, *range(2 + axes, hidden.dim()))
        return [hidden.permute(order).contiguous(), *(tensor.to(self.carried_dtype) for tensor in further)]


class _Reads(TorchDispatchMode):
    """Counts what reads some ids, or a view of them."""

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self._storage = address_of(ids.untyped_storage())
        self.count = 0

    def shows(self, values: Any) -> bool:
        """Whether the ids are among these."""
        return any(address_of(tensor.untyped_storage()) == self._storage for tensor in tensors_in(values))

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += self.shows((args, kwargs)) and not self.shows(result)
        return result


def probe(model: Any) -> MessageFormat:
    """Asks a whole model on the meta device what its layers take and return. Where a kernel has no meta form, the
    length of the returned tuple is read from the layer's annotation."""
    _, layers = find_layers(model)
    config = model.config.get_text_config(decoder=True)
    taken: list[torch.Tensor] = []
    returned: list[int] = []

    def look_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append(args[0] if args else kwargs["hidden_states"])
        reads.count += reads.shows((args, kwargs))

    def look_behind(module: nn.Module, args: Any, output: Any) -> None:
        returned.append(len(output) if isinstance(output, tuple) else 0)
        raise StageDone(torch.empty(0))

    handles = (
        layers[0].register_forward_pre_hook(look_before, with_kwargs=True),
        layers[0].register_forward_hook(look_behind),
    )
    ids = torch.zeros((_ROWS, _TOKENS), dtype=torch.long, device="meta")
    reads, needs_mask = _Reads(ids), False
    # Some families look into the ids if there is no mask, others into the mask: on meta, neither can be done.
    for asked in ({}, {"attention_mask": torch.ones_like(ids)}):
        with contextlib.suppress(StageDone, RuntimeError, NotImplementedError), torch.no_grad(), reads:
            model(input_ids=ids, use_cache=True, **asked)
        if returned:
            needs_mask = bool(asked)
            break
        reads.count = 0
    for handle in handles:
        handle.remove()
    if not returned:
        annotation = typing.get_type_hints(type(layers[0]).forward).get("return")
        returned.append(len(typing.get_args(annotation)) if typing.get_origin(annotation) is tuple else 0)
    shape = tuple(taken[0].shape) if taken else (_ROWS, _TOKENS, int(config.hidden_size))
    rows = next(place for place in range(len(shape)) if shape[place : place + 2] == (_ROWS, _TOKENS))
    return MessageFormat(
        before=shape[:rows],
        behind=shape[rows + 2 :],
        carried=tuple(
            (name, int(getattr(config, width))) for name, width in CARRIED.get(config.model_type, {}).items()
        ),
        carried_dtype=model.dtype,
        dtype=taken[0].dtype if taken else model.dtype,
        arguments=tuple(inspect.signature(layers[0].forward).parameters),
        returns_tuple_of=returned[0],
        needs_mask=needs_mask,
        # The embedding itself is one.
        reads_ids=reads.count != 1 or embeds_in_layers(model.config),
    )


class Boundary:
    """The two ends of a stage within its model. The far end is where the next layer would be called: what the model
    itself does between two layers belongs to the stage before."""

    def __init__(self, message_format: MessageFormat) -> None:
        self._format = message_format
        self._hooks: list[Any] = []
        self.received: torch.Tensor | None = None
        """The message for the forward pass that is running."""

    def attach(self, first: nn.Module | None, following: nn.Module | None) -> None:
        """Puts hooks on the first own layer and on the one behind the last; None where the model begins or ends."""
        self.detach()
        for layer, hook in ((first, self._inject), (following, self._extract)):
            if layer is not None:
                self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _inject(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.received is not None, "a stage that is not the first was given no message"
        return self._format.unpack(self.received, args, kwargs)

    def _extract(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise StageDone(self._format.pack(args, kwargs))
