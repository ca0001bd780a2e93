"""What a model's parts cost, and what fits under a cap: pure arithmetic on a `ModelShape`."""

from __future__ import annotations

import math

from pydantic import Field

from bench.errors import PlanError
from bench.record import Failure, FailureKind
from bench.schedule import micro_batch_sizes
from bench.spec import EffectivePlan, Plan, Value, device_kind

KV_ALIGNMENT = 16
"""On GPUs KV slots have a multiple of so many positions: kernels of attention pad them in every call otherwise."""


class LayerShape(Value):
    """One decoder layer."""

    weight_bytes: int
    active_params: int
    """Parameters that one token meets: routed experts count as many as are chosen."""
    kv_bytes_per_token: int
    kind: str = "full_attention"
    """`full_attention`, `sliding_attention`, `linear_attention` …"""


class ModelShape(Value):
    """What planning must know of a model; read from its modules, without weights."""

    architecture: str
    num_parameters: int
    layers_prefix: str
    """`model.layers`: the module list that is cut."""
    first_modules: tuple[str, ...]
    """Modules outside the layers that belong to the first device in a device map."""
    last_modules: tuple[str, ...]
    """Modules outside the layers that belong to the last device: final norm, head."""
    embedding_bytes: int
    head_bytes: int
    """Of an untied head; 0 when it shares the embedding."""
    other_bytes: int
    """Norms, learned positions and the like, kept on every stage."""
    tied: bool
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    dtype_bytes: int
    """Of a number computed with."""
    storage_bytes: int | None = None
    """Of a weight, and of a hidden state between layers, where they are kept in another dtype."""
    layers: tuple[LayerShape, ...] = Field(min_length=1)
    forbidden_cuts: tuple[int, ...] = ()
    """Layer indices before which the model must not be cut."""
    recurrent: bool = False
    """Some layers keep a state for whole micro-batches: prefill cannot be cut, neither by rows nor by tokens."""
    embedding_on_every_stage: bool = False
    """Its layers read the embedding of the tokens, too: each stage holds it and embeds for itself."""
    max_positions: int | None = None
    checkpoint_bytes: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kept_bytes(self) -> int:
        """Of a weight, and of a hidden state between layers."""
        return self.storage_bytes or self.dtype_bytes


class StageBytes(Value):
    """Predicted bytes of one stage."""

    weights: int
    kv_per_slot: int
    activations: int

    def total(self, in_flight: int) -> int:
        return self.weights + self.activations + in_flight * self.kv_per_slot


def stage_bytes(shape: ModelShape, plan: Plan, index: int, *, prompt_len: int, output_len: int) -> StageBytes:
    """Accounts for one stage of a plan.

    Weights are counted exactly. A KV slot holds `micro_batch_size` rows of `prompt_len + output_len` positions.
    Activations are the larger of prefill and decode: residual stream, attention projections and the gated
    MLP's intermediates live together (6 H + 3 I values a token), attention scores for eager kernels are not
    counted, and the last stage adds fp32 logits of one position a row; of all positions where texts are scored.
    Receive buffers take H values a token for each of two ring slots. Where weights are kept in a wider dtype, the
    largest of them is there in the narrower one as well while it is used, and weights are not packed.

    Args:
        prompt_len: longest prompt after padding, tokens.
        output_len: tokens generated, tokens; 0 where texts are scored.
    """
    stage = plan.stages[index]
    own = shape.layers[stage.first_layer : stage.end_layer]
    is_first, is_last = index == 0, index == len(plan.stages) - 1
    weights = shape.other_bytes + sum(layer.weight_bytes for layer in own)
    if is_first or shape.embedding_on_every_stage or (is_last and shape.tied):
        weights += shape.embedding_bytes
    if is_last:
        weights += shape.head_bytes
    mixed = shape.kept_bytes != shape.dtype_bytes
    if is_first and is_last and shape.tied and plan.packed_weights and not mixed and device_kind(stage.device) == "cpu":
        # Packed, the head lies in a layout of its own, which the embedding cannot share.
        weights += shape.embedding_bytes
    max_len = prompt_len + output_len
    if device_kind(stage.device) == "cuda":
        max_len = -(-max_len // KV_ALIGNMENT) * KV_ALIGNMENT
    kv_per_slot = plan.micro_batch_size * max_len * sum(layer.kv_bytes_per_token for layer in own)
    tokens = max(plan.prefill_size * min(plan.prefill_chunk_size or prompt_len, prompt_len), plan.micro_batch_size)
    activations = tokens * (6 * shape.hidden_size * shape.kept_bytes + 3 * shape.intermediate_size * shape.dtype_bytes)
    if mixed:
        widest = max(shape.intermediate_size, shape.vocab_size if is_last else 0)
        activations += widest * shape.hidden_size * shape.dtype_bytes
    if len(plan.stages) > 1:
        activations += 2 * tokens * shape.hidden_size * shape.kept_bytes
    if is_last:
        positions = plan.micro_batch_size if output_len else tokens
        activations += 2 * positions * shape.vocab_size * 4
    return StageBytes(weights=weights, kv_per_slot=kv_per_slot, activations=activations)


def resolve(
    shape: ModelShape, plan: Plan, *, num_prompts: int, prompt_len: int, output_len: int, device_bytes: dict[str, int]
) -> EffectivePlan | Failure:
    """How many micro-batches the memory caps let be in flight, or why not even one fits.

    Args:
        device_bytes: memory of each device, in bytes; a stage may take `memory_fraction` of it.

    Raises:
        PlanError: the plan does not cover the model's layers, cuts where it must not, or names an unknown device.
    """
    check_plan(shape, plan)
    for place, device in enumerate(plan.devices):
        if device not in device_bytes:
            replica, index = divmod(place, len(plan.stages))
            where = f"stages[{index}].device" if replica == 0 else f"replica_devices[{replica - 1}][{index}]"
            raise PlanError(f"plan.{where}: {device} is not among the devices {', '.join(device_bytes)}")
    in_flight = len(micro_batch_sizes(math.ceil(num_prompts / plan.replicas), plan.micro_batch_size))
    if plan.max_in_flight is not None:
        in_flight = min(in_flight, plan.max_in_flight)
    replicas = [plan.replica(number) for number in range(plan.replicas)]
    for index, stage in enumerate(plan.stages):
        need = stage_bytes(shape, plan, index, prompt_len=prompt_len, output_len=output_len)
        # Of its devices in all replicas, the one with the least memory decides.
        device = min((row.stages[index].device for row in replicas), key=lambda name: device_bytes[name])
        cap = int(stage.memory_fraction * device_bytes[device])
        if need.total(1) > cap:
            return Failure(
                kind=FailureKind.OVER_MEMORY_CAP,
                stage=index,
                device=device,
                phase="plan",
                bytes_wanted=need.total(1),
                bytes_had=cap,
                message=(
                    f"stage {index} on {device} needs {need.total(1) / 2**20:.0f} MiB for one micro-batch "
                    f"(weights {need.weights / 2**20:.0f}, KV {need.kv_per_slot / 2**20:.0f}, activations "
                    f"{need.activations / 2**20:.0f}) and its cap is {cap / 2**20:.0f} MiB; give it fewer layers, "
                    f"a smaller micro-batch or a larger memory_fraction than {stage.memory_fraction}"
                ),
            )
        if need.kv_per_slot:
            in_flight = min(in_flight, (cap - need.weights - need.activations) // need.kv_per_slot)
    return EffectivePlan(plan=plan, in_flight=in_flight)


def check_plan(shape: ModelShape, plan: Plan) -> None:
    """Refuses a plan that does not fit the model.

    Raises:
        PlanError: too few or too many layers, a forbidden cut, or prefill cut where a state covers the micro-batch.
    """
    if plan.num_layers != shape.num_layers:
        what = (
            f"layer {plan.num_layers} is missing" if plan.num_layers < shape.num_layers else "there are too many layers"
        )
        raise PlanError(
            f"plan.stages: layers 0-{plan.num_layers - 1} are given and {shape.architecture} has "
            f"{shape.num_layers} layers (0-{shape.num_layers - 1}); {what}"
        )
    if shape.recurrent and (plan.prefill_size < plan.micro_batch_size or plan.prefill_chunk_size is not None):
        name = "prefill_chunk_size" if plan.prefill_chunk_size is not None else "prefill_micro_batch_size"
        raise PlanError(
            f"plan.{name}: {shape.architecture} must be given whole prompts and whole micro-batches, since a state "
            "covers them or it masks otherwise once something is cached; leave it out"
        )
    cuts = {stage.first_layer for stage in plan.stages[1:]}
    bad = sorted(cuts & set(shape.forbidden_cuts))
    if bad:
        allowed = [cut for cut in range(1, shape.num_layers) if cut not in shape.forbidden_cuts]
        raise PlanError(
            f"plan.stages: {shape.architecture} must not be cut before layer {bad[0]}; possible cuts: {allowed}"
        )
