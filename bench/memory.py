"""What a model's parts cost, and what fits under a cap: pure arithmetic on a `ModelShape`."""

import math
from typing import Any, Self

from pydantic import Field

from pipetune.bench.errors import PlanError
from pipetune.bench.record import Count, Failure, FailureKind
from pipetune.bench.schedule import micro_batch_sizes
from pipetune.bench.spec import EffectivePlan, Lane, Plan, Value, device_kind, slots_needed

KV_ALIGNMENT = 16
"""On GPUs KV slots have a multiple of so many positions: kernels of attention pad them in every call otherwise."""
EDGE_DEPTH = 2
"""Messages that the rings at a stage's ends hold, each: one is computed with while the next one comes."""
GPU_WORKSPACE_BYTES = 54 * 2**20
"""What a stage keeps on a GPU once it has run: cuBLAS's workspace of the compute stream, 32 MiB on Hopper, and what the
allocator rounds up. The most seen on an H200 is 45 MiB (`make gpu-check`, section memory)."""
GRAPHS_WORKSPACE_BYTES = 32 * 2**20
"""The same of the stream that captures; the most seen of both is 79 MiB."""
CPU_FREE_SHARE = 0.25
"""Share of activations that glibc's heap holds in free pieces between them."""
CPU_WORKSPACE_BYTES = 42 * 2**20
"""What a CPU worker keeps once it has run tasks of a model: modules, generated kernels, pieces of the heap."""


class LayerShape(Value):
    """One decoder layer."""

    weight_bytes: Count
    active_params: Count
    """Parameters that one token meets: routed experts count as many as are chosen."""
    kv_bytes_per_token: Count
    state_bytes: Count = 0
    """Bytes of the recurrent states that a row keeps, whatever its length."""
    kind: str = "full_attention"
    """`full_attention`, `sliding_attention`, `linear_attention` …"""


Samples = tuple[tuple[Count, Count, Count], ...]
"""By the positions that a task's tokens attend to, rising: bytes a token, and with the head and one row's logits."""


class TaskBytes(Value):
    """What lived at once within tasks that were run without memory, beside weights and KV: as GPU kernels take it."""

    prompt: Samples
    """Tasks over whole prompts."""
    chunk: Samples
    """Tasks over chunks of 512 tokens, the last ones of their prompts."""
    decode: Samples


class ModelShape(Value):
    """What planning must know of a model; read from its modules, without weights."""

    architecture: str
    num_parameters: Count
    layers_prefix: str
    """`model.layers`: the module list that is cut."""
    first_modules: tuple[str, ...]
    """Modules outside the layers that belong to the first device in a device map."""
    last_modules: tuple[str, ...]
    """Modules outside the layers that belong to the last device: final norm, head."""
    embedding_bytes: Count
    head_bytes: Count
    """Bytes of an untied head; 0 when it shares the embedding."""
    other_bytes: Count
    """Norms, learned positions and the like, kept on every stage."""
    tied: bool
    hidden_size: Count
    intermediate_size: Count
    num_attention_heads: Count
    vocab_size: Count
    dtype_bytes: Count
    """Bytes of a number computed with."""
    storage_bytes: Count | None = None
    """Bytes of a weight, and of a hidden state between layers, where they are kept in another dtype."""
    layers: tuple[LayerShape, ...] = Field(min_length=1)
    forbidden_cuts: tuple[Count, ...] = ()
    """Layer indices before which the model must not be cut."""
    recurrent: bool = False
    """Some layers keep a state for whole micro-batches: prefill cannot be cut, neither by rows nor by tokens."""
    joins: bool = False
    """Under arrivals prompts of any lengths, and a decode step, go through one forward pass, without padding."""
    whole_slots: bool = False
    """Under arrivals prompts of one length come to an empty slot together: rows cannot be moved, or not be padded."""
    embedding_on_every_stage: bool = False
    """Its layers read the embedding of the tokens, too: each stage holds it and embeds for itself."""
    eager_attention: bool = False
    """Attention scores are written out."""
    message_bytes: Count | None = None
    """Bytes of a token's values that cross between stages, where these are not just its hidden state."""
    task_bytes: TaskBytes | None = None
    """What tasks take on a GPU, where the fleet has one and the family can be run without memory."""
    max_positions: Count | None = None
    checkpoint_bytes: Count | None = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def kept_bytes(self) -> int:
        """Bytes of a weight, and of a hidden state between layers."""
        return self.storage_bytes or self.dtype_bytes

    @property
    def crossing_bytes(self) -> int:
        """Bytes that a token's layers hand on from one stage to the next."""
        return self.hidden_size * self.kept_bytes if self.message_bytes is None else self.message_bytes

    def is_alike(self, other: Self) -> bool:
        """Whether it is the same model's; what tasks take is known only where a GPU took part, and how slots are
        filled not to the first profiles."""
        unlike: dict[str, Any] = {"task_bytes": None, "joins": False, "whole_slots": False}
        return self.model_copy(update=unlike) == other.model_copy(update=unlike)


class StageBytes(Value):
    """Predicted bytes of one stage."""

    weights: int
    kv_per_slot: int
    activations: int

    def total(self, in_flight: int) -> int:
        """Bytes with so many micro-batches in flight."""
        return self.weights + self.activations + in_flight * self.kv_per_slot


def stage_bytes(shape: ModelShape, plan: Plan, index: int, *, prompt_len: int, output_len: int) -> StageBytes:
    """Accounts for one stage of a plan; `prompt_len` is the longest prompt after padding, `output_len` what is
    generated, both in tokens; 0 where texts are scored.

    Weights are counted exactly. A KV slot holds `micro_batch_size` rows of `prompt_len + output_len` positions, and
    what states a row keeps. Activations are those of the larger of prefill and decode, `_task_bytes`; and on a CPU what
    the heap and the libraries hold beside them.
    """
    stage = plan.stages[index]
    own = shape.layers[stage.first_layer : stage.end_layer]
    is_first, is_last = index == 0, index == len(plan.stages) - 1
    on_cpu = device_kind(stage.device) == "cpu"
    weights = shape.other_bytes + sum(layer.weight_bytes for layer in own)
    if is_first or shape.embedding_on_every_stage or (is_last and shape.tied):
        weights += shape.embedding_bytes
    if is_last:
        weights += shape.head_bytes
    mixed = shape.kept_bytes != shape.dtype_bytes
    if is_first and is_last and shape.tied and plan.packed_weights and not mixed and on_cpu:
        # Packed, the head lies in a layout of its own, which the embedding cannot share.
        weights += shape.embedding_bytes
    max_len = prompt_len + output_len
    if not on_cpu:
        max_len = -(-max_len // KV_ALIGNMENT) * KV_ALIGNMENT
    kv_per_slot = plan.micro_batch_size * sum(max_len * layer.kv_bytes_per_token + layer.state_bytes for layer in own)
    activations = _task_bytes(shape, plan, is_first, is_last, prompt_len, output_len)
    if on_cpu:
        activations = int(activations * (1 + CPU_FREE_SHARE)) + CPU_WORKSPACE_BYTES
    else:
        activations += gpu_workspace_bytes(plan)
    return StageBytes(weights=weights, kv_per_slot=kv_per_slot, activations=activations)


def gpu_workspace_bytes(plan: Plan) -> int:
    """The part of a stage's activations on a GPU that does not depend on its tasks, bytes."""
    return GPU_WORKSPACE_BYTES + plan.cuda_graphs * GRAPHS_WORKSPACE_BYTES


def _task_bytes(shape: ModelShape, plan: Plan, is_first: bool, is_last: bool, prompt_len: int, output_len: int) -> int:
    """What a stage holds at most while it works on a task, beside weights and KV.

    On GPUs it is what tasks took that were run without memory, where the family could be. Elsewhere it is a formula:
    residual stream, attention projections and the gated MLP's intermediates live together (6 H + 3 I values a token).
    Attention takes a mask over all positions of each row, and scores of every head twice where kernels write them out.
    Towards each neighbour a ring of messages is received into, or held until it is sent. The last stage adds logits of
    one position a row, twice in fp32; of all positions where texts are scored, once, and one text's in fp32. Where
    weights are kept in a wider dtype, the largest of them is there in the narrower one as well while it is used.
    """
    chunk = min(plan.prefill_chunk_size or prompt_len, prompt_len)
    tokens = max(plan.prefill_size * chunk, plan.micro_batch_size)
    pairs = max(plan.prefill_size * chunk * prompt_len, plan.micro_batch_size * (prompt_len + output_len))
    measured = shape.task_bytes if device_kind(plan.stages[0].device) == "cuda" else None
    if measured is not None:
        has_head, prefill = is_last and output_len > 0, measured.chunk if chunk < prompt_len else measured.prompt
        size = plan.prefill_size * chunk * _bytes_at(prefill, prompt_len, has_head)
        if chunk < prompt_len:
            # What a row takes for each position behind it counts the more, the fewer tokens share it.
            size += plan.prefill_size * _bytes_at(measured.decode, prompt_len, False)
        size = max(size, plan.micro_batch_size * _bytes_at(measured.decode, prompt_len + output_len, has_head))
    else:
        size = tokens * (6 * shape.hidden_size * shape.kept_bytes + 3 * shape.intermediate_size * shape.dtype_bytes)
        size += pairs * (1 + shape.dtype_bytes)
        if shape.eager_attention:
            size += 2 * pairs * shape.num_attention_heads * shape.dtype_bytes
    if shape.kept_bytes != shape.dtype_bytes:
        widest = max(shape.intermediate_size, shape.vocab_size if is_last else 0)
        size += widest * shape.hidden_size * shape.dtype_bytes
    neighbours = (not is_first) + (not is_last)
    size += neighbours * EDGE_DEPTH * tokens * shape.crossing_bytes
    if is_last and output_len:
        size += 2 * plan.micro_batch_size * shape.vocab_size * 4
    elif is_last:
        size += tokens * shape.vocab_size * shape.dtype_bytes + prompt_len * shape.vocab_size * 4
    return size


def _bytes_at(samples: Samples, positions: int, has_head: bool) -> int:
    """Bytes a token between samples, or in line with the two nearest ones beyond them."""
    end = next((place for place in range(1, len(samples) - 1) if samples[place][0] >= positions), len(samples) - 1)
    low, high = samples[end - 1], samples[end]
    slope = (high[1 + has_head] - low[1 + has_head]) / (high[0] - low[0])
    return math.ceil(low[1 + has_head] + slope * max(positions - low[0], 0))


def resolve(
    shape: ModelShape, plan: Plan, *, num_prompts: int, prompt_len: int, output_len: int, device_bytes: dict[str, int]
) -> EffectivePlan | Failure:
    """How many micro-batches the memory caps let be in flight, or why not even one fits. Raises as `check_plan`, and
    PlanError for an unknown device."""
    check_plan(shape, plan)
    for place, device in enumerate(plan.devices):
        if device not in device_bytes:
            replica, index = divmod(place, len(plan.stages))
            where = f"stages[{index}].device" if replica == 0 else f"replica_devices[{replica - 1}][{index}]"
            raise PlanError(f"plan.{where}: {device} is not among the devices {', '.join(device_bytes)}")
    in_flight = len(micro_batch_sizes(math.ceil(num_prompts / plan.replicas), plan.micro_batch_size))
    if plan.max_in_flight is not None:
        in_flight = min(in_flight, plan.max_in_flight)
    devices = plan.devices
    for index, stage in enumerate(plan.stages):
        need = stage_bytes(shape, plan, index, prompt_len=prompt_len, output_len=output_len)
        # Of its devices in all replicas, the one with the least memory decides.
        device = min(devices[index :: len(plan.stages)], key=lambda name: device_bytes[name])
        cap = stage.cap_bytes(device_bytes[device])
        if need.total(1) > cap:
            in_bytes = cap == stage.max_memory_bytes
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
                    f"a smaller micro-batch or a larger "
                    + ("max_memory_per_device" if in_bytes else f"memory_fraction than {stage.memory_fraction}")
                ),
            )
        if need.kv_per_slot:
            in_flight = min(in_flight, (cap - need.weights - need.activations) // need.kv_per_slot)
    return EffectivePlan(plan=plan, in_flight=in_flight)


def resolve_slots(
    shape: ModelShape, plan: Plan, *, prompt_len: int, output_len: int, device_bytes: dict[str, int]
) -> EffectivePlan | Failure:
    """Slots of a plan whose requests come over time: what its lanes need, at most two a stage, and one of a stage
    alone, where a second one's steps would be in the way. Raises as `resolve`. Prompts are prefilled beside them, which
    takes the room of one slot's prefill more than there are slots; of a model with whole slots, in them."""
    usual = 2 * len(plan.stages) if len(plan.stages) > 1 else 1
    most = plan.max_in_flight or max(usual, slots_needed(plan.lanes))
    prefill = 0 if shape.whole_slots else plan.prefill_size * prompt_len
    share = prefill / (plan.micro_batch_size * (prompt_len + output_len))
    # As many micro-batches as slots and their prefills could come to.
    count = (2 * most + 1) * plan.micro_batch_size * plan.replicas
    lens = {"num_prompts": count, "prompt_len": prompt_len, "output_len": output_len}
    unlimited = plan.model_copy(update={"max_in_flight": None})
    resolved = resolve(shape, unlimited, **lens, device_bytes=device_bytes)
    if isinstance(resolved, Failure):
        return resolved
    slots = max(1, min(most, math.floor((resolved.in_flight - share) / (1 + share))))
    if (needed := slots_needed(plan.lanes)) > slots:
        why = f"plan.lanes: they need {needed} slots, and the plan has room for {slots}; give them fewer of their own"
        return Failure(kind=FailureKind.OVER_MEMORY_CAP, phase="plan", message=why)
    if shape.joins and slots == len(plan.stages) == 1:
        # Each prefill takes the slot's step along: none comes between two of them that could let one go first.
        lanes = [
            one.model_copy(update={"prefills_per_decode": None}) if (one.prefills_per_decode or 0) >= 1 else one
            for one in plan.lanes
        ]
        plan = plan.model_copy(update={"lanes": () if lanes == [Lane()] else tuple(lanes)})
    return EffectivePlan(plan=plan, in_flight=slots)


def check_plan(shape: ModelShape, plan: Plan) -> None:
    """Refuses, by a PlanError, other layers than the model's, a forbidden cut, or prefill cut where a state covers a
    whole micro-batch."""
    if plan.num_layers != shape.num_layers:
        is_short = plan.num_layers < shape.num_layers
        what = f"layer {plan.num_layers} is missing" if is_short else "there are too many layers"
        raise PlanError(
            f"plan.stages: layers 0-{plan.num_layers - 1} are given and {shape.architecture} has "
            f"{shape.num_layers} layers (0-{shape.num_layers - 1}); {what}"
        )
    cut = {
        "prefill_chunk_size": plan.prefill_chunk_size is not None,
        "prefill_micro_batch_size": plan.prefill_size < plan.micro_batch_size,
        "lanes.prefill_chunk_size": any(one.prefill_chunk_size is not None for one in plan.lanes),
    }
    if shape.recurrent and (name := next((name for name, is_cut in cut.items() if is_cut), None)):
        raise PlanError(
            f"plan.{name}: {shape.architecture} must be given whole prompts and whole micro-batches, since a state "
            "covers them or it masks otherwise once something is cached; leave it out"
        )
    cuts = {stage.first_layer for stage in plan.stages[1:]}
    if bad := sorted(cuts & set(shape.forbidden_cuts)):
        allowed = [cut for cut in range(1, shape.num_layers) if cut not in shape.forbidden_cuts]
        where = f"plan.stages: {shape.architecture} must not be cut before layer {bad[0]}"
        raise PlanError(f"{where}; possible cuts: {allowed}")
