"""One stage: the layers that this device holds, cut out of any Hugging Face causal LM without tracing it.

The model's own `forward` runs on every stage, with the real mask and positions, and the real ids where they are read,
so that masks, rotary and ALiBi are built by the model itself. Layers of other stages are replaced, index for index, by
modules that pass on what they get; a hook swaps the received hidden states in before the first own layer, another takes
them out before the layer behind the last own one and leaves by an exception, so that norm and head run on the last
stage alone.

Shapes: B rows, S new tokens, M values of a message, V vocabulary.
"""

import contextlib
import inspect
from typing import Any

import torch

from pipetune.bench.cuts import embeds_in_layers
from pipetune.bench.models.describe import build_on_meta
from pipetune.bench.models.layers import cache_name, find_layers
from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.runtime.device import TORCH_DTYPES
from pipetune.bench.runtime.packed_linear import PackedLinear, pack_linears, packed_bytes
from pipetune.bench.runtime.stage.attention import attention_on
from pipetune.bench.runtime.stage.boundary import Boundary, StageDone, probe
from pipetune.bench.runtime.stage.joined import JoinedCache, joining
from pipetune.bench.runtime.stage.kv_cache import SLOT_CACHES, SlotCache
from pipetune.bench.runtime.stage.parts import Parts, PlaceholderEmbedding
from pipetune.bench.spec import ModelSpec

_STATES_OF_MODULES = {"recurrent_gemma": ("conv1d_state", "recurrent_states")}
"""Names of what families keep in their modules from one forward pass to the next, and not in the cache."""


class Stage:
    """The part of a model between two cuts, on one device, changed in place when the plan changes."""

    def __init__(self, resolved: ResolvedModel, device: torch.device) -> None:
        self.resolved = resolved
        self.device = device
        self.dtype = TORCH_DTYPES[resolved.spec.dtype]
        skeleton = build_on_meta(resolved)
        self.config: Any = skeleton.config
        message = probe(skeleton)
        self.message_values = message.values
        """Values per token that cross to the next stage."""
        self.message_dtype = message.dtype
        """Dtype of what crosses to the next stage: some families keep hidden states in fp32 under halved weights."""
        self.needs_mask = message.needs_mask
        """Whether the model would look for padding itself where there is no mask."""
        self.reads_ids = message.reads_ids
        """Whether a stage behind the first needs the real ids."""
        self._parts = Parts(resolved, skeleton, device, returns_tuple_of=message.returns_tuple_of)
        self._boundary = Boundary(message)
        self._embeds_always = embeds_in_layers(self.config)
        self._cache_name = cache_name(skeleton) or "past_key_values"
        self._accepts = frozenset(inspect.signature(type(skeleton).forward).parameters)
        self.own_layers, self.is_first, self.is_last = range(0), False, False
        self._model: Any = None
        self._head_hook: Any = None
        self._without_logits = False
        self._states: list[tuple[torch.nn.Module, str]] = []

    @property
    def model(self) -> Any:
        """The model with its own layers real and placeholders for the rest."""
        assert self._model is not None, "no layers were assigned to this stage"
        return self._model

    def assign(self, first_layer: int, end_layer: int, *, is_first: bool, is_last: bool) -> tuple[int, ...]:
        """Makes this stage hold layers `[first_layer, end_layer)`; loads, and returns, only what it does not hold yet.
        ModelError where the checkpoint lacks weights, or the model cannot be cut this way."""
        wanted = range(first_layer, end_layer)
        tied = self._parts.is_tied
        have_head = self._model is not None and self.is_last
        # Packed, a tied head needs no embedding beside it any more.
        shares = tied and not (have_head and isinstance(self.model.get_output_embeddings(), PackedLinear))
        need_embedding = is_first or self._embeds_always or (is_last and shares)
        embedding = self._model.get_input_embeddings() if self._model is not None else None
        have_embedding = self._model is not None and not isinstance(embedding, PlaceholderEmbedding)
        missing = tuple(layer for layer in wanted if layer not in self.own_layers)
        load_embedding = need_embedding and not have_embedding
        load_head = is_last and not have_head
        self._detach()
        if self._model is not None:
            # First of all: what was held and what comes may not fit the device together.
            gone = set(self.own_layers) - set(wanted)
            self._parts.drop(self._model, gone, embedding=not need_embedding, head=not is_last)
        if missing or load_embedding or load_head:
            # The head of a tied model needs its embedding beside it while it is loaded.
            with_embedding = load_embedding or (load_head and tied)
            donor = self._parts.load(missing, embedding=with_embedding, head=load_head)
            if self._model is None:
                self._model = donor
            else:
                self._parts.graft(self._model, donor, missing, embedding=with_embedding, head=load_head)
        self.own_layers, self.is_first, self.is_last = wanted, is_first, is_last
        self._attach()
        return missing

    def pack(self) -> None:
        """Lays the linear weights out for oneDNN, those that are not yet."""
        # A hooked layer is left alone.
        self._detach()
        pack_linears(self.model)
        self._attach()
        if self._parts.is_tied and self.is_last and not (self.is_first or self._embeds_always):
            packed = isinstance(self.model.get_output_embeddings(), PackedLinear)
            self._parts.drop(self.model, (), embedding=packed, head=False)

    def release(self) -> None:
        """Drops every layer, so that the device's memory is free for something else."""
        self._detach()
        self._model = None
        self.own_layers, self.is_first, self.is_last = range(0), False, False

    def weights_bytes(self) -> int:
        """Bytes of parameters, packed ones among them, and buffers; shared storage counted once."""
        if self._model is None:
            return 0
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in (*self.model.parameters(), *self.model.buffers())
        }
        return int(sum(storages.values())) + packed_bytes(self.model)

    def new_cache(self, *, rows: int, max_len: int) -> SlotCache:
        """An empty KV slot for this stage."""
        return SLOT_CACHES.get(self.config.model_type, SlotCache)(
            self.config,
            rows=rows,
            max_len=max_len,
            own_layers=self.own_layers,
            num_layers=len(find_layers(self.model)[1]),
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: SlotCache | JoinedCache,
        hidden_states: torch.Tensor | None = None,
        *,
        all_logits: bool = False,
        without_logits: bool = False,
    ) -> torch.Tensor:
        """Runs the own layers on `input_ids` `[B, S]`, the real ids on every stage, at `position_ids` `[B, S]`.

        `attention_mask` is `[B, past + S]`, 0 where a row is padded on the left, None where none is; `cache` is sought
        to the rows and to `past`; `hidden_states` are `[B, S, M]` from the stage before, M being `message_values`, None
        on the first. Gives `[B, S, M]` for the next stage, or on the last one the logits `[B, V]` of the last position,
        `[B, S, V]` of every one with `all_logits`. `without_logits` leaves out the head, as for a chunk of a prompt
        that is not its last: what is returned then means nothing.

        Of joined parts, all `[1, N]` and without a mask, each row has a last position, and logits are `[rows, V]`.
        """
        joined = cache if isinstance(cache, JoinedCache) else None
        kwargs: dict[str, Any] = {"input_ids": input_ids, self._cache_name: cache, "use_cache": True}
        # What has states alone takes the mask of the new tokens, and none once the padding lies behind.
        is_whole = attention_mask is not None and attention_mask.shape == input_ids.shape
        if self._cache_name == "past_key_values" or is_whole:
            kwargs["attention_mask"] = attention_mask
        if "position_ids" in self._accepts:
            kwargs["position_ids"] = position_ids
        if self.is_last and not all_logits and "logits_to_keep" in self._accepts:
            kwargs["logits_to_keep"] = 1 if joined is None else joined.last
        self._boundary.received = hidden_states
        self._without_logits = without_logits
        kept = cache if self._states and isinstance(cache, SlotCache) else None
        if kept is not None:
            for place, (module, name) in enumerate(self._states):
                setattr(module, name, kept.states_of_modules[place] if kept.states_of_modules else None)
        try:
            attention = attention_on(self.device) if joined is None else joining(joined)
            with computing(self.resolved.spec, self.device), attention:
                logits: torch.Tensor = self.model(**kwargs).logits
        except StageDone as done:
            return done.message
        finally:
            self._boundary.received = None
            if kept is not None:
                kept.states_of_modules = [getattr(*place) for place in self._states]
        if joined is not None:
            return logits[0] if "logits_to_keep" in self._accepts else logits[0, joined.last]
        return logits if all_logits else logits[:, -1]

    def _attach(self) -> None:
        _, layers = find_layers(self.model)
        own = self.own_layers
        names = _STATES_OF_MODULES.get(self.config.model_type, ())
        self._states = [(one, name) for one in self.model.modules() for name in names if hasattr(one, name)]
        self._boundary.attach(None if self.is_first else layers[own.start], None if self.is_last else layers[own.stop])
        head = self.model.get_output_embeddings() if self.is_last else None
        if head is not None:
            self._head_hook = head.register_forward_pre_hook(self._leave_before_head)

    def _detach(self) -> None:
        self._boundary.detach()
        if self._head_hook is not None:
            self._head_hook.remove()
            self._head_hook = None

    def _leave_before_head(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self._without_logits:
            raise StageDone(args[0])


def is_mixed(spec: ModelSpec) -> bool:
    """Whether weights are kept in another dtype than the model computes in."""
    return spec.kept_dtype != spec.dtype


def computing(spec: ModelSpec, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Around a forward pass: computes in the dtype of the spec, whatever weights are kept in.

    Over wider weights it is torch's autocast: matrix products and attention run in the half dtype; norms, sums and the
    hidden states between layers stay in float32.
    """
    if not is_mixed(spec):
        return contextlib.nullcontext()
    # Each weight is used once a pass: to keep the halved ones as well would only take memory.
    return torch.autocast(device.type, dtype=TORCH_DTYPES[spec.dtype], cache_enabled=False)
