"""What to run: model, workload, plan and protocol, as frozen values that cross every border."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1

Dtype = Literal["float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
AttentionKernel = Literal["auto", "sdpa", "eager"]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

_DEVICE = re.compile(r"(cpu|cuda):(0|[1-9][0-9]*)")  # one spelling a device: cuda:01 would pass for another than cuda:1


def _check_device(value: str) -> str:
    if not _DEVICE.fullmatch(value):
        raise ValueError(f"device {value!r} is neither cpu:N nor cuda:N")
    return value


Device = Annotated[str, AfterValidator(_check_device)]


def parse_devices(text: str) -> tuple[str, ...]:
    """Expands a list of devices: `cpu:0-1` → `("cpu:0", "cpu:1")`; `cuda:0,cuda:2` stays as it is.

    A GPU may be named twice, for stages that share it: that proves correctness, never speed.

    Raises:
        ValueError: a part is not `cpu:N`, `cuda:N` or a range of them, or a CPU worker is named twice.
    """
    devices: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(cpu|cuda):(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise ValueError(f"devices: {part.strip()!r} is not a device; write cpu:0-1, cuda:0,cuda:1 or auto")
        kind, first, last = match[1], int(match[2]), int(match[3] or match[2])
        if last < first:
            raise ValueError(f"devices: {part.strip()!r} runs backwards; write {kind}:{last}-{first}")
        devices += [f"{kind}:{index}" for index in range(first, last + 1)]
    doubled = sorted({device for device in devices if devices.count(device) > 1 and device_kind(device) == "cpu"})
    if doubled:
        raise ValueError(f"devices: {', '.join(doubled)} named twice")
    return tuple(devices)


def device_kind(device: str) -> str:
    """`"cpu"` or `"cuda"`."""
    return device.partition(":")[0]


def device_index(device: str) -> int:
    """The number behind the colon."""
    return int(device.partition(":")[2])


class Value(BaseModel):
    """A frozen value that refuses unknown keys; every border is crossed by these alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self) -> str:
        """sha256 of the canonical JSON, 16 hex digits: equal values have equal digests."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class ModelSpec(Value):
    """What is served."""

    name: str = Field(min_length=1)
    """A Hugging Face id, a local folder, or a name that pipetune knows (`smollm2-135m`)."""
    dtype: Dtype = "float32"
    load_format: LoadFormat = "auto"
    """`auto` reads the checkpoint; `dummy` builds random weights from the config alone."""
    seed: int = 0
    """Seed of dummy weights."""
    attention: AttentionKernel = "auto"
    """`auto` takes what transformers picks for the architecture."""
    revision: str | None = None
    """Checkpoint revision or content hash; filled in when the model is resolved."""
    trust_remote_code: bool = False

    @property
    def attn_implementation(self) -> str | None:
        """In the words of transformers."""
        return None if self.attention == "auto" else self.attention


class Workload(Value):
    """Prompts, how many, and how much to generate for each."""

    num_prompts: int = Field(default=32, ge=1)
    input_len: int = Field(default=64, ge=1)
    """Length in tokens of random prompts; ignored when `prompts_file` is given."""
    output_len: int = Field(default=16, ge=1)
    """Tokens generated for each prompt."""
    random_range_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Random prompt lengths are uniform in `input_len · (1 ± ratio)`."""
    seed: int = 0
    """Seed of random prompts."""
    prompts_file: str | None = None
    """JSONL with `{"prompt": …}` or `{"prompt_token_ids": […]}` a line; the first `num_prompts` are used."""
    prompts_sha256: str | None = None
    """Hash of that file, part of the workload's identity."""


class StagePlan(Value):
    """The layers one device holds: `first_layer` included, `end_layer` excluded."""

    device: Device
    first_layer: int = Field(ge=0)
    end_layer: int = Field(ge=1)
    memory_fraction: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of the device's memory that weights, KV cache and activations may take."""

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.end_layer <= self.first_layer:
            raise ValueError(
                f"stage on {self.device} holds no layer: first_layer={self.first_layer}, end_layer={self.end_layer}"
            )
        return self


class Plan(Value):
    """How a model is split and run."""

    stages: tuple[StagePlan, ...] = Field(min_length=1)
    micro_batch_size: int = Field(ge=1)
    """Sequences that travel through the stages together while decoding; one KV slot holds them."""
    prefill_micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences prefilled together, at most `micro_batch_size`; None means the same."""
    max_in_flight: int | None = Field(default=None, ge=1)
    """Upper limit of micro-batches resident at once; None leaves it to the memory caps."""

    @model_validator(mode="after")
    def _contiguous(self) -> Self:
        expected = 0
        for index, stage in enumerate(self.stages):
            if stage.first_layer > expected:
                missing = f"{expected}" if stage.first_layer == expected + 1 else f"{expected}-{stage.first_layer - 1}"
                raise ValueError(f"plan.stages[{index}]: layer {missing} is missing before {stage.first_layer}")
            if stage.first_layer < expected:
                raise ValueError(f"plan.stages[{index}]: layer {stage.first_layer} is given twice")
            expected = stage.end_layer
        workers = [stage.device for stage in self.stages if device_kind(stage.device) == "cpu"]
        if len(set(workers)) < len(workers):
            raise ValueError(f"plan.stages: a CPU worker holds two stages: {', '.join(workers)}; give each its own")
        prefill = self.prefill_micro_batch_size
        if prefill is not None and prefill > self.micro_batch_size:
            raise ValueError(
                f"plan.prefill_micro_batch_size={prefill} is larger than micro_batch_size={self.micro_batch_size}"
            )
        return self

    @property
    def num_layers(self) -> int:
        return self.stages[-1].end_layer

    @property
    def layer_counts(self) -> tuple[int, ...]:
        return tuple(stage.num_layers for stage in self.stages)

    @property
    def prefill_size(self) -> int:
        return self.prefill_micro_batch_size or self.micro_batch_size

    @classmethod
    def from_layer_counts(
        cls,
        counts: tuple[int, ...],
        devices: tuple[str, ...],
        micro_batch_size: int,
        *,
        prefill_micro_batch_size: int | None = None,
        memory_fraction: float = 0.9,
    ) -> Plan:
        """Builds a plan from a count of layers per stage: stage i lands on `devices[i]`.

        Raises:
            ValueError: more stages than devices, or a count below one.
        """
        if len(counts) > len(devices):
            raise ValueError(f"{len(counts)} stages need as many devices; given are {len(devices)}: {devices}")
        stages, first = [], 0
        for count, device in zip(counts, devices, strict=False):
            stages.append(
                StagePlan(device=device, first_layer=first, end_layer=first + count, memory_fraction=memory_fraction)
            )
            first += count
        return cls(
            stages=tuple(stages),
            micro_batch_size=micro_batch_size,
            prefill_micro_batch_size=prefill_micro_batch_size,
        )

    def describe(self) -> str:
        """One short line for people: `17+13 · micro-batch 16 (prefill 8)`."""
        text = "+".join(str(count) for count in self.layer_counts) + f" · micro-batch {self.micro_batch_size}"
        return text if self.prefill_size == self.micro_batch_size else f"{text} (prefill {self.prefill_size})"


class EffectivePlan(Value):
    """A plan with what its memory caps resolve to; two caps that resolve alike are one plan."""

    plan: Plan
    in_flight: int = Field(ge=1)

    @property
    def key(self) -> str:
        """Identity: equal for plans that run the same way on the same devices."""
        stages = ",".join(f"{stage.device}[{stage.first_layer}:{stage.end_layer}]" for stage in self.plan.stages)
        return f"{stages} mb={self.plan.micro_batch_size} prefill={self.plan.prefill_size} in_flight={self.in_flight}"


class Protocol(Value):
    """How one plan is measured."""

    num_iters: int = Field(default=3, ge=1)
    """Timed repetitions of the whole workload."""
    num_iters_warmup: int = Field(default=1, ge=0)
    """Repetitions before timing; more are added until steady, up to `max_warmup`."""
    max_warmup: int = Field(default=3, ge=0)
    steady_tolerance: float = Field(default=0.10, gt=0.0)
    """Warm when two repetitions in a row differ by less than this share."""
    check_outputs: bool = True
    """Compare logits and tokens with the study's reference before timing."""
    check_prompts: int = Field(default=4, ge=1)
    check_tokens: int = Field(default=8, ge=1)
    instrument: bool = True
    """Record compute spans and receive waits per stage and micro-batch."""
    timeout_s: float = Field(default=600.0, gt=0.0)
    """Longest time one plan may take, loading included."""
    hang_timeout_s: float = Field(default=10.0, gt=0.0)
    """A worker that is silent for so long is taken for hung."""


class RunSpec(Value):
    """One run, whole: the same spec on the same hardware is the same experiment."""

    model: ModelSpec
    workload: Workload
    plan: Plan
    protocol: Protocol = Protocol()
