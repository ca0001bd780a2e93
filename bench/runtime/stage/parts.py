"""Parts of a model: built with some layers real and placeholders for the rest, and moved between such models.

A placeholder has its part's place and kind of return value, and no weights.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pipetune.bench.errors import ModelError
from pipetune.bench.models.dummy import init_dummy_weights
from pipetune.bench.models.hf_private import builder_of
from pipetune.bench.models.layers import find_layers
from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.models.torch_private import tensors_of, unsaved_buffers
from pipetune.bench.runtime import allocator

_PLAIN = str | int | float | bool | None
_OF_EVERY_MODULE = frozenset(vars(nn.Module)) | {"training"}


class Placeholder(nn.Module):
    """What is left of a module without its weights: plain attributes, and the same of every part of it.

    Models read attributes of layers, and initialise tables inside of them, that may be another stage's. Such tables
    stay until `empty` is called.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for holder in (*(vars(kind) for kind in reversed(type(module).__mro__)), vars(module)):
            for name, value in holder.items():
                if not name.startswith("_") and name not in _OF_EVERY_MODULE and isinstance(value, _PLAIN):
                    setattr(self, name, value)
        for name, table in module.named_buffers(recurse=False):
            if name in unsaved_buffers(module):
                self.register_buffer(name, table, persistent=False)
        for name, part in module.named_children():
            self.add_module(name, _placeholder(part))

    def empty(self) -> None:
        """Lets go of every tensor."""
        for module in self.modules():
            tensors_of(module)[1].clear()


def _placeholder(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: _placeholder(part) for name, part in module.items()})
    return Placeholder(module)


class PlaceholderLayer(Placeholder):
    """Stands in for a layer of another stage: same plain attributes, same kind of return value, no weights.

    `returns_tuple_of` is the length of the tuple that the layer returns, 0 if it returns a tensor. Parts that are
    `shared`, by name, have weights tied to those of own layers, and must be there until the weights are loaded.
    """

    def __init__(self, layer: nn.Module, returns_tuple_of: int, shared: Iterable[str] = ()) -> None:
        super().__init__(layer)
        self._returns_tuple_of = returns_tuple_of
        self._hands_on_state = list(inspect.signature(layer.forward).parameters)[1:2] == ["state"]
        for name in shared:
            self.add_module(name, layer.get_submodule(name))

    def empty(self) -> None:
        """Lets go of every tensor, and of shared parts."""
        for name, part in self.named_children():
            self.add_module(name, _placeholder(part))
        super().empty()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What it was given; a state behind the hidden states is handed on, too."""
        if self._returns_tuple_of == 0:
            return hidden_states
        state = args[0] if args and self._hands_on_state else None
        return (hidden_states, state) + (None,) * (self._returns_tuple_of - 2)


class PlaceholderEmbedding(nn.Module):
    """Stands in for the embedding of another stage: zeros of the right shape, since the result is replaced."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._hidden_size = hidden_size
        # Some models read the dtype of this weight.
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Zeros `[..., hidden_size]`."""
        return self.weight.new_zeros((*input_ids.shape, self._hidden_size))


class PlaceholderHead(nn.Module):
    """Stands in for the head of another stage: never called, but some families initialise its weight by name."""

    bias = None

    def __init__(self) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.empty(0), persistent=False)


class Parts:
    """What can be taken from one model, of which `skeleton` is the whole on the meta device, for one device."""

    def __init__(self, resolved: ResolvedModel, skeleton: Any, device: torch.device, *, returns_tuple_of: int) -> None:
        self._resolved = resolved
        self._family, self._config = type(skeleton), skeleton.config
        self._dtype: torch.dtype = skeleton.dtype
        self._device = device
        self._returns_tuple_of = returns_tuple_of
        self._prefix, _ = find_layers(skeleton)
        embedding: Any = skeleton.get_input_embeddings()
        # Not always the width between the layers: some families project in between.
        self._embedding_size = int(embedding.weight.shape[-1])
        head: Any = skeleton.get_output_embeddings()
        self.is_tied: bool = head is not None and getattr(head, "weight", None) is embedding.weight
        """Whether head and embedding are one."""
        every = skeleton.named_modules(remove_duplicate=False)
        self._head_names = tuple(name for name, module in every if module is head)
        self._ties: dict[str, str] = dict(skeleton.all_tied_weights_keys)

    def load(self, own: Iterable[int], *, embedding: bool, head: bool) -> Any:
        """Builds the model with only these parts real, and reads only their weights; ModelError if some are missing."""
        # An embedding that is stored as the head needs it beside it, too.
        with_head = head or (embedding and self._resolved.embedding_in_head)
        prune = functools.partial(self._prune, keep=set(own), embedding=embedding, head=with_head)
        model = self._build_dummy(prune) if self._resolved.spec.load_format == "dummy" else self._read(prune)
        for layer in find_layers(model)[1]:
            if isinstance(layer, PlaceholderLayer):
                layer.empty()
        if with_head and not head:
            self._set_head(model, PlaceholderHead())
        return model

    def graft(self, model: Any, donor: Any, layers: Iterable[int], *, embedding: bool, head: bool) -> None:
        """Moves parts of a donor into a model."""
        _, own = find_layers(model)
        _, given = find_layers(donor)
        for index in layers:
            own[index] = given[index]
        if embedding:
            model.set_input_embeddings(donor.get_input_embeddings())
        if head:
            self._set_head(model, donor.get_output_embeddings())
        self._tie_again(model)

    def drop(self, model: Any, layers: Iterable[int], *, embedding: bool, head: bool) -> None:
        """Puts placeholders in the place of parts."""
        _, own = find_layers(model)
        for index in layers:
            own[index] = placeholder = PlaceholderLayer(own[index], self._returns_tuple_of)
            placeholder.empty()
        if embedding and not isinstance(model.get_input_embeddings(), PlaceholderEmbedding):
            model.set_input_embeddings(PlaceholderEmbedding(self._embedding_size, self._dtype).to(self._device))
        if head:
            self._set_head(model, PlaceholderHead())

    def _prune(self, model: Any, *, keep: set[int], embedding: bool, head: bool) -> None:
        _, layers = find_layers(model)
        shared = self._shared_with(keep)
        for index, layer in enumerate(layers):
            if index not in keep:
                parts = (name for owner, name in shared if owner == index)
                layers[index] = PlaceholderLayer(layer, self._returns_tuple_of, parts)
        if not embedding:
            model.set_input_embeddings(PlaceholderEmbedding(self._embedding_size, self._dtype))
        if not head:
            self._set_head(model, PlaceholderHead())
        present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ties = model.all_tied_weights_keys.items()
        model.all_tied_weights_keys = {name: source for name, source in ties if {name, source} <= present}

    def _set_head(self, model: Any, head: nn.Module) -> None:
        """Only the module itself: `set_output_embeddings` of some families moves its bias about as well."""
        for name in self._head_names:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, head)

    def _shared_with(self, keep: set[int]) -> set[tuple[int, str]]:
        """Layer and name of the parts whose weights, in a checkpoint, stand for those of own layers as well."""
        sources = (source for name, source in self._ties.items() if self._layer_of(name)[0] in keep)
        found = {self._layer_of(source) for source in sources}
        return {(owner, name) for owner, name in found if owner not in keep and owner >= 0}

    def _layer_of(self, parameter: str) -> tuple[int, str]:
        """Index of the layer that a parameter belongs to, and its child there; -1 outside the layers."""
        if not parameter.startswith(f"{self._prefix}."):
            return -1, ""
        index, child, *_ = parameter[len(self._prefix) + 1 :].split(".")
        return int(index), child

    def _tie_again(self, model: Any) -> None:
        """Parts that came at different times bring what they share each for themselves; one of them is enough."""
        kept: dict[str, nn.Parameter] = {}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            one = kept.setdefault(self._ties.get(name, name), parameter)
            if one is not parameter:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, one)

    def _build_dummy(self, prune: Callable[[Any], None]) -> Any:
        spec = self._resolved.spec
        with torch.device("meta"):
            build = builder_of(self._family)
            model = build(self._config, dtype=self._dtype, attn_implementation=spec.attn_implementation)
        prune(model)
        init_dummy_weights(model, spec.seed)
        return model.to(self._device).eval()

    def _read(self, prune: Callable[[Any], None]) -> Any:
        # A subclass of the same name that prunes itself: `from_pretrained` then reads only what is left, and its
        # conversions of old or fused checkpoints still apply.
        spec, base = self._resolved.spec, self._family

        def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            base.__init__(self, config, *args, **kwargs)
            prune(self)

        pruned: Any = type(
            base.__name__,
            (base,),
            {"__init__": init, "__module__": base.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]},
        )
        # Unexpected keys are expected here: they are the other stages' weights.
        logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
        model, info = pruned.from_pretrained(
            self._resolved.folder,
            config=self._config,
            dtype=self._dtype,
            attn_implementation=spec.attn_implementation,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            device_map={"": str(self._device)} if self._device.type == "cuda" else None,
            output_loading_info=True,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelError(
                f"model {spec.name!r}: the checkpoint lacks {len(missing)} weights, {missing[0]} first; "
                "it is incomplete or of another architecture than its config says"
            )
        if self._device.type == "cpu":
            allocator.own((*model.parameters(), *model.buffers()), self._resolved.folder)
        return model.eval()
