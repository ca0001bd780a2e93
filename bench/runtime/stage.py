"""One stage: the layers that this device holds, cut out of any Hugging Face causal LM without tracing it.

The model's own `forward` runs on every stage, with the real ids, mask and positions, so that masks, rotary and ALiBi
are built by the model itself. Layers of other stages are replaced, index for index, by modules that pass on what they
get; a hook swaps the received hidden states in before the first own layer, another takes them out behind the last and
leaves by an exception, so that norm and head run on the last stage alone.

Shapes: B rows, S new tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import time
import typing
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bench.errors import ModelError
from bench.models.describe import build_on_meta
from bench.models.dummy import init_dummy_weights
from bench.models.layers import find_layers
from bench.models.resolve import ResolvedModel
from bench.runtime.cache import SlotCache
from bench.runtime.device import TORCH_DTYPES
from bench.runtime.standins import SkipLayer, StubEmbedding


class _StageDone(Exception):
    """Carries the hidden states out of the model's forward."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        self.hidden_states = hidden_states


def _returned_tuple_length(model: Any, layers: nn.ModuleList) -> int:
    """0 if the model's layers return a tensor, else the length of their tuple.

    Asked of the model itself on the meta device; where a kernel has no meta form, of the annotation.
    """
    seen: list[int] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(len(output) if isinstance(output, tuple) else 0)
        raise _StageDone(torch.empty(0))

    handle = layers[0].register_forward_hook(look)
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device="meta"), use_cache=True)
    except _StageDone:
        return seen[0]
    except (RuntimeError, NotImplementedError):
        annotation = typing.get_type_hints(type(layers[0]).forward).get("return")
        return len(typing.get_args(annotation)) if typing.get_origin(annotation) is tuple else 0
    finally:
        handle.remove()
    raise AssertionError(f"{type(model).__name__} never called its first layer")


class Stage:
    """The part of a model between two cuts, on one device, changed in place when the plan changes."""

    def __init__(self, resolved: ResolvedModel, device: torch.device) -> None:
        self.resolved = resolved
        self.device = device
        self.dtype = TORCH_DTYPES[resolved.spec.dtype]
        skeleton = build_on_meta(resolved)
        self._class, self.config = type(skeleton), skeleton.config
        # Not always the width between the layers: some families project in between.
        embedding: Any = skeleton.get_input_embeddings()
        self._embedding_size = int(embedding.weight.shape[-1])
        self.own_layers = range(0)
        self.is_first = False
        self.is_last = False
        self.loaded_layers: tuple[int, ...] = ()
        self.load_s = 0.0
        self._model: Any = None
        self._returns_tuple_of = -1
        self._hooks: list[Any] = []
        self._received: torch.Tensor | None = None
        self._accepts: frozenset[str] = frozenset(inspect.signature(self._class.forward).parameters)

    @property
    def hidden_size(self) -> int:
        text_config = self.config.get_text_config(decoder=True)
        return int(text_config.hidden_size)

    @property
    def model(self) -> Any:
        assert self._model is not None, "no layers were assigned to this stage"
        return self._model

    def assign(self, first_layer: int, end_layer: int, *, is_first: bool, is_last: bool) -> tuple[int, ...]:
        """Makes this stage hold layers `[first_layer, end_layer)`; loads only what it does not hold yet.

        Returns:
            The layers that were loaded.

        Raises:
            ModelError: the checkpoint lacks weights, or the model cannot be cut this way.
        """
        began = time.perf_counter()
        wanted = range(first_layer, end_layer)
        tied_on_last = is_last and self._is_tied()
        need_embedding = is_first or tied_on_last
        have_embedding = self._model is not None and (self.is_first or (self.is_last and self._is_tied()))
        have_head = self._model is not None and self.is_last
        missing = tuple(layer for layer in wanted if layer not in self.own_layers)
        load_embedding = need_embedding and not have_embedding
        load_head = is_last and not have_head
        self._remove_hooks()
        if self._model is not None:
            # First of all: what was held and what comes may not fit the device together.
            self._drop(set(self.own_layers) - set(wanted), embedding=not need_embedding, head=not is_last)
        if missing or load_embedding or load_head:
            # The head of a tied model needs its embedding beside it while it is loaded.
            with_embedding = load_embedding or (load_head and self._is_tied())
            donor = self._load(missing, embedding=with_embedding, head=load_head)
            if self._model is None:
                self._model = donor
            else:
                self._graft(donor, missing, embedding=with_embedding, head=load_head)
        self.own_layers, self.is_first, self.is_last = wanted, is_first, is_last
        self._add_hooks()
        self.loaded_layers = missing
        self.load_s = time.perf_counter() - began
        return missing

    def release(self) -> None:
        """Drops every layer, so that the device's memory is free for something else."""
        self._remove_hooks()
        self._model = None
        self.own_layers, self.is_first, self.is_last = range(0), False, False

    def weights_bytes(self) -> int:
        """Bytes of parameters and buffers, shared storage counted once."""
        if self._model is None:
            return 0
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in (*self.model.parameters(), *self.model.buffers())
        }
        return sum(storages.values())

    def new_cache(self, *, rows: int, max_len: int) -> SlotCache:
        """An empty KV slot for this stage."""
        return SlotCache(self.config, rows=rows, max_len=max_len, own_layers=self.own_layers)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: SlotCache,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the own layers.

        Args:
            input_ids: `[B, S]`, the real ids on every stage.
            attention_mask: `[B, past + S]`, 0 where a row is padded on the left.
            position_ids: `[B, S]`.
            cache: sought to the rows and to `past`.
            hidden_states: `[B, S, H]` from the stage before; None on the first.

        Returns:
            `[B, S, H]` for the next stage, or on the last one the logits `[B, V]` of the last position.
        """
        kwargs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in self._accepts:
            kwargs["position_ids"] = position_ids
        if self.is_last and "logits_to_keep" in self._accepts:
            kwargs["logits_to_keep"] = 1
        self._received = hidden_states
        try:
            logits: torch.Tensor = self.model(**kwargs).logits
        except _StageDone as done:
            return done.hidden_states
        finally:
            self._received = None
        return logits[:, -1]

    def _is_tied(self) -> bool:
        return bool(getattr(self.config, "tie_word_embeddings", False)) and bool(
            getattr(self._class, "_tied_weights_keys", None)
        )

    def _load(self, own: Iterable[int], *, embedding: bool, head: bool) -> Any:
        """Builds the model with only these parts real, and reads only their weights."""
        keep = set(own)
        stage = self

        def prune(model: Any) -> None:
            _, layers = find_layers(model)
            if stage._returns_tuple_of < 0:
                stage._returns_tuple_of = _returned_tuple_length(model, layers)
            for index, layer in enumerate(layers):
                if index not in keep:
                    layers[index] = SkipLayer(layer, stage._returns_tuple_of)
            if not embedding:
                model.set_input_embeddings(StubEmbedding(stage._embedding_size, stage.dtype))
            if not head:
                model.set_output_embeddings(nn.Identity())
            if not (embedding and head):
                model.all_tied_weights_keys = {}

        if self.resolved.spec.load_format == "dummy":
            return self._build_dummy(prune)
        # A subclass of the same name that prunes itself: `from_pretrained` then reads only what is left, and its
        # conversions of old or fused checkpoints still apply.
        base: Any = self._class

        def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            base.__init__(self, config, *args, **kwargs)
            prune(self)

        pruned: Any = type(
            base.__name__,
            (base,),
            {"__init__": init, "__module__": base.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]},
        )
        target = {"": str(self.device)} if self.device.type == "cuda" else None
        _quiet_transformers()
        model, info = pruned.from_pretrained(
            self.resolved.folder,
            config=self.config,
            dtype=self.dtype,
            attn_implementation=self.resolved.spec.attn_implementation,
            use_safetensors=True,
            trust_remote_code=self.resolved.spec.trust_remote_code,
            device_map=target,
            output_loading_info=True,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelError(
                f"model {self.resolved.spec.name!r}: the checkpoint lacks {len(missing)} weights, {missing[0]} first; "
                "it is incomplete or of another architecture than its config says"
            )
        return model.eval()

    def _build_dummy(self, prune: Callable[[Any], None]) -> Any:
        family: Any = self._class
        with torch.device("meta"):
            model = family._from_config(
                self.config, dtype=self.dtype, attn_implementation=self.resolved.spec.attn_implementation
            )
        prune(model)
        init_dummy_weights(model, self.resolved.spec.seed)
        return model.to(self.device).eval()

    def _graft(self, donor: Any, layers: Iterable[int], *, embedding: bool, head: bool) -> None:
        _, own = find_layers(self.model)
        _, given = find_layers(donor)
        for index in layers:
            own[index] = given[index]
        if embedding:
            self.model.set_input_embeddings(donor.get_input_embeddings())
        if head:
            self.model.set_output_embeddings(donor.get_output_embeddings())

    def _drop(self, layers: Iterable[int], *, embedding: bool, head: bool) -> None:
        _, own = find_layers(self.model)
        for index in layers:
            own[index] = SkipLayer(own[index], self._returns_tuple_of)
        if embedding and not isinstance(self.model.get_input_embeddings(), StubEmbedding):
            stub = StubEmbedding(self._embedding_size, self.dtype).to(self.device)
            self.model.set_input_embeddings(stub)
        if head and not isinstance(self.model.get_output_embeddings(), nn.Identity):
            self.model.set_output_embeddings(nn.Identity())

    def _add_hooks(self) -> None:
        _, layers = find_layers(self.model)
        if not self.is_first:
            first = layers[self.own_layers.start]
            self._hooks.append(first.register_forward_pre_hook(self._inject, with_kwargs=True))
        if not self.is_last:
            last = layers[self.own_layers.stop - 1]
            self._hooks.append(last.register_forward_hook(self._extract))

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _inject(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._received, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received}

    def _extract(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden_states = output[0] if isinstance(output, tuple) else output
        # The next stage's buffers have this dtype; NCCL would hang or tear on another.
        assert hidden_states.dtype == self.dtype, f"{self._class.__name__} hands on {hidden_states.dtype}"
        raise _StageDone(hidden_states)


def _quiet_transformers() -> None:
    """Unexpected keys are expected here: they are the other stages' weights."""
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
