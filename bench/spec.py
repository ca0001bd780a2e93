"""What to run: model, workload, plan and protocol, as frozen values that cross every border."""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)

SchemaVersion = Literal[1]

_DTYPES = {"float": "float32", "fp32": "float32", "bf16": "bfloat16", "half": "float16", "fp16": "float16"}


def _spelled_out(value: object) -> object:
    """A dtype's own name for what others call it: `half`, `bf16`, `torch.bfloat16` or the dtype itself."""
    name = str(value).lower().removeprefix("torch.")
    return _DTYPES.get(name, name)


Dtype = Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(_spelled_out)]
AnyDtype = Annotated[Literal["float32", "bfloat16", "float16", "auto"], BeforeValidator(_spelled_out)]
LoadFormat = Literal["auto", "dummy"]
AttentionKernel = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
WorkloadKind = Literal["generate", "score"]

SMOLLM2 = "smollm2-135m"
"""Name of the model that needs no hub; a folder of that name does not hide it."""
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# One spelling a device: cuda:01 would pass for another than cuda:1.
_DEVICE = re.compile(r"(host(0|[1-9][0-9]*)/)?(cpu|cuda):(0|[1-9][0-9]*)")


def _check_device(value: str) -> str:
    if not _DEVICE.fullmatch(value):
        raise ValueError(f"device {value!r} is neither cpu:N nor cuda:N, nor one of those behind hostN/")
    return value


Device = Annotated[str, AfterValidator(_check_device)]

_BYTE_SIZE = TypeAdapter(ByteSize)


def _count_bytes(value: object) -> int:
    try:
        return _BYTE_SIZE.validate_python(value)
    except ValueError:
        raise ValueError(f"{value!r} is no amount of memory; write 600MiB, 2.5GiB or a number of bytes") from None


Bytes = Annotated[int, BeforeValidator(_count_bytes), Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
Factor = Annotated[float, Field(gt=0.0, le=1e9)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]


def parse_devices(text: str) -> tuple[str, ...]:
    """Expands a list of devices: `cpu:0-1` → `("cpu:0", "cpu:1")`; `cuda:0,cuda:2` stays as it is.

    Several hosts are named by their node ranks: `host0/cuda:0-3,host1/cuda:0-3`. A GPU may be named twice, for stages
    that share it: that proves correctness, never speed. ValueError where a part is not `cpu:N`, `cuda:N` or a range of
    them, a CPU worker is named twice, or some devices have a host and others none, or hosts are left out.
    """
    devices: list[str] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"\s*((?:host\d+/)?(?:cpu|cuda)):(\d+)(?:-(\d+))?\s*", part)):
            raise ValueError(f"devices: {part.strip()!r} is not a device; write cpu:0-1, cuda:0,cuda:1 or auto")
        kind, first, last = match[1], int(match[2]), int(match[3] or match[2])
        if last < first:
            raise ValueError(f"devices: {part.strip()!r} runs backwards; write {kind}:{last}-{first}")
        devices += [f"{kind}:{index}" for index in range(first, last + 1)]
    if doubled := sorted({device for device in devices if devices.count(device) > 1 and device_kind(device) == "cpu"}):
        raise ValueError(f"devices: {', '.join(doubled)} named twice")
    hosts = hosts_of(devices)
    if hosts != ("",) and hosts != tuple(f"host{rank}" for rank in range(len(hosts))):
        named = ", ".join(host or "none" for host in hosts)
        raise ValueError(f"devices: hosts are {named}; name every device's host, from host0 on in order")
    return tuple(devices)


def device_kind(device: str) -> str:
    """`"cpu"` or `"cuda"`."""
    return local_name(device).partition(":")[0]


def local_name(device: str) -> str:
    """What a device's own host calls it: `cuda:0` of `host1/cuda:0`."""
    return device.rpartition("/")[2]


def device_host(device: str) -> str:
    """`"host1"` of `host1/cuda:0`; empty where there is one host."""
    return device.rpartition("/")[0]


def hosts_of(devices: Iterable[str]) -> tuple[str, ...]:
    """Hosts in the order in which devices name them; one empty name where there is one host."""
    return tuple(dict.fromkeys(map(device_host, devices)))


def on_host(devices: Sequence[str], host: str) -> tuple[str, ...]:
    """Devices of one host, as that host itself calls them: `cuda:0`."""
    return tuple(local_name(device) for device in devices if device_host(device) == host)


def devices_here(devices: Sequence[str]) -> tuple[str, ...]:
    """Those of the host that runs the command, as it calls them itself."""
    return tuple(local_name(device) for device in devices if device_host(device) in ("", "host0"))


def device_index(device: str) -> int:
    """The number behind the colon."""
    return int(device.partition(":")[2])


class Value(BaseModel):
    """A frozen value that refuses unknown keys; every border is crossed by these alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self, *, exclude_defaults: bool = True, exclude: Mapping[str, Any] | None = None) -> str:
        """sha256 of the canonical JSON, 16 hex digits: equal values have equal digests. What is at its default is left
        out unless told otherwise, so that a field added later changes no digest."""
        return digest_of(self.model_dump(mode="json", exclude_defaults=exclude_defaults, exclude=exclude))


def digest_of(values: object) -> str:
    """sha256 of the canonical JSON, 16 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Flag:
    """How a field is given on the command line; stands in the field's annotation and says nothing of its default."""

    panel: str
    """Heading that the option stands under in `--help`."""
    help: str
    """One line for `--help` and the reference page."""
    _: KW_ONLY
    name: str | None = None
    """`num_prompts` for `--num-prompts` and `PIPETUNE_NUM_PROMPTS`; None: the field's name."""
    metavar: str | None = None
    """Placeholder of the value; None shows its type."""
    short: str | None = None
    """One-letter form, such as `-o`."""
    repeats: bool = False
    """Whether the option is given once for each value of a list, instead of once with commas."""
    also: tuple[str, ...] = ()
    """Dotted keys of further fields that are set to the same value."""
    before: str | None = None
    """Setting that its option is listed before, where fields are declared in another order."""


class ModelSpec(Value):
    """What is served."""

    name: Annotated[str, Flag("Model", "Hugging Face id, local folder, or smollm2-135m.", name="model")] = Field(
        min_length=1
    )
    dtype: Annotated[AnyDtype, Flag("Model", "float32, bfloat16, float16, or auto: the checkpoint's own.")] = "float32"
    """Dtype that is computed in; `auto` becomes the checkpoint's own when the model is resolved."""
    storage_dtype: Annotated[Dtype | None, Flag("Model", "Dtype of the weights: float32. [that of --dtype]")] = None
    """Dtype that weights are kept in, where it differs: `float32` under half-precision compute; None means `dtype`."""
    load_format: Annotated[LoadFormat, Flag("Model", "auto, or dummy for random weights.")] = "auto"
    """`auto` reads the checkpoint; `dummy` builds random weights from the config alone."""
    seed: int = 0
    """Seed of dummy weights."""
    attention: Annotated[
        AttentionKernel, Flag("Model", "auto, sdpa, eager, flash_attention_2 or flash_attention_3.")
    ] = "auto"
    """`auto` takes what transformers picks for the architecture."""
    revision: Annotated[str | None, Flag("Model", "Commit or tag of the checkpoint. [the newest]")] = None
    """Checkpoint revision or content hash; filled in when the model is resolved."""
    trust_remote_code: Annotated[bool, Flag("Model", "Run code from the model's folder.")] = False

    @model_validator(mode="after")
    def _storage_is_wider(self) -> Self:
        if self.storage_dtype not in (None, self.dtype, "float32"):
            raise ValueError(
                f"model.storage_dtype={self.storage_dtype} under dtype={self.dtype}: weights are kept in float32 or in "
                "the dtype itself"
            )
        return self

    @property
    def by_content(self) -> Self:
        """The model without its place: one and the same for a folder wherever it lies, if its revision is a hash."""
        hashed = (self.revision or "").startswith(("sha256:", "quick:"))
        return self.model_copy(update={"name": "a folder"}) if hashed else self

    @property
    def kept_dtype(self) -> AnyDtype:
        """What weights, and the hidden states between layers, are kept in."""
        return self.storage_dtype or self.dtype

    @property
    def attn_implementation(self) -> str | None:
        """The kernel's name in transformers; None for `auto`."""
        return None if self.attention == "auto" else self.attention


class Sampling(Value):
    """How tokens are drawn: each draw depends on the seed, the prompt and the place alone, and not on the plan."""

    temperature: Annotated[Positive, Flag("Workload", "Draw tokens, not the likeliest; divides logits.")] = 1.0
    top_k: Annotated[int, Flag("Workload", "Draw among the k likeliest tokens alone; 0: all.")] = Field(default=0, ge=0)
    top_p: Annotated[Share, Flag("Workload", "Draw among the likeliest tokens of that probability.")] = 1.0
    """Only the fewest likeliest tokens that together have this probability can be drawn."""
    seed: Annotated[int, Flag("Workload", "Seed of draws.", name="sampling_seed")] = 0


class Goodput(Value):
    """Most milliseconds that a good request takes: `ttft:500 tpot:50 e2el:2000`, as vLLM has it."""

    ttft: float | None = Field(default=None, gt=0.0)
    tpot: float | None = Field(default=None, gt=0.0)
    e2el: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        if not isinstance(value, (list, tuple)):
            return value
        pairs = [str(part).partition(":")[::2] for part in value]
        names = ", ".join(cls.model_fields)
        for name, limit in pairs:
            if name not in cls.model_fields:
                raise ValueError(f"{name!r} is no latency of a request; there are {names}, as in ttft:500")
            try:
                valid = 0.0 < float(limit) < math.inf
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"{name}:{limit}: must be milliseconds above 0, as in {name}:500")
        if len(dict(pairs)) < max(len(pairs), 1):
            raise ValueError(f"give a limit for one or more of {names}, once each, as in ttft:500")
        # Records are read strictly: no text is a number there.
        return {name: float(limit) for name, limit in pairs}

    @model_serializer
    def _text(self) -> str:
        return " ".join(f"{name}:{limit:.12g}" for name, limit in self.limits.items())

    @property
    def limits(self) -> dict[str, float]:
        """By latency."""
        return {name: limit for name in type(self).model_fields if (limit := getattr(self, name)) is not None}


HIGHEST_RATE = 1e6
Rate = Annotated[float, Field(gt=0.0, le=HIGHEST_RATE)]
"""Requests a second."""


class Arrivals(Value):
    """How requests come, in place of all at time 0."""

    request_rate: Annotated[Rate | None, Flag("Load", "Requests a second, that come one by one.")] = None
    burstiness: Annotated[Factor, Flag("Load", "Of the gaps: 1 is Poisson, below bursty, above even.")] = 1.0
    """Shape of the gamma distribution that gaps are drawn from."""
    ramp_up_strategy: Annotated[Literal["linear", "exponential"] | None, Flag("Load", "linear or exponential.")] = None
    """How the rate grows from `ramp_up_start_rps` to `ramp_up_end_rps` over the requests, in place of one rate."""
    ramp_up_start_rps: Annotated[Rate | None, Flag("Load", "Rate that a ramp begins with.")] = None
    ramp_up_end_rps: Annotated[Rate | None, Flag("Load", "Rate that a ramp ends with.")] = None
    trace: Annotated[
        str | None, Flag("Load", "Mooncake's, Azure's or BurstGPT's, or JSONL with timestamp.", metavar="FILE")
    ] = None
    """File of recorded arrivals and lengths, in place of a rate."""
    time_scale: Annotated[Factor, Flag("Load", "Factor on the trace's times; 0.5 doubles its rate.")] = 1.0
    max_concurrency: Annotated[int | None, Flag("Load", "Most requests in the system at once.")] = Field(
        default=None, ge=1
    )
    """What arrives beyond it waits, and its latency counts from when it was to arrive."""
    num_warmups: Annotated[
        int | None, Flag("Load", "Requests before the timed ones, all at once. [what fills all slots twice]")
    ] = Field(default=None, ge=1)
    slo_attainment: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Each measurement looks for the highest rate at which so large a share of the requests keeps the limits, from
    `request_rate` on, or near what a study thinks the plan sustains; filled in where `max_request_rate` is asked for.
    None: it is made at `request_rate`."""
    most_rates: Annotated[int, Flag("Load", "Rates that a search for the highest one tries at most.")] = Field(
        default=8, ge=2
    )
    times_s: tuple[Annotated[float, Field(ge=0.0)], ...] | None = None
    """When each request of the trace comes, seconds; filled in when that is read."""
    seed: Annotated[int, Flag("Load", "Seed of the gaps.", name="arrival_seed")] = 0

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        ends = (self.ramp_up_start_rps, self.ramp_up_end_rps)
        if self.ramp_up_strategy is None:
            if any(ends):
                raise ValueError("ramp_up_start_rps, ramp_up_end_rps: give ramp_up_strategy as well")
        elif None in ends:
            raise ValueError(f"ramp_up_strategy={self.ramp_up_strategy}: give ramp_up_start_rps and ramp_up_end_rps")
        given = {"request_rate": self.request_rate, "trace": self.trace, "ramp_up_strategy": self.ramp_up_strategy}
        if len(named := [name for name, value in given.items() if value is not None]) > 1:
            raise ValueError(f"{named[0]}: {named[1]} says when requests come as well; leave one of them out")
        if not named:
            raise ValueError("request_rate: nothing says when requests come; give a rate, a trace or a ramp")
        if self.slo_attainment is not None and self.request_rate is None:
            raise ValueError(f"{named[0]}: a search for the highest rate begins with one; give request_rate")
        if self.slo_attainment is not None and self.max_concurrency is not None:
            raise ValueError("max_concurrency: it hides what rate a plan sustains; leave it out")
        return self


class Workload(Value):
    """Prompts, how many, and what to do with each."""

    kind: Annotated[
        WorkloadKind, Flag("Workload", "generate tokens, or score the texts given.", name="workload_kind")
    ] = "generate"
    """`generate` tokens, or `score` the given texts: log-probabilities of their tokens, forward passes alone."""
    num_prompts: Annotated[int, Flag("Workload", "Prompts in the workload.")] = Field(default=32, ge=1)
    input_len: Annotated[int, Flag("Workload", "Tokens of each random prompt.")] = Field(default=64, ge=1)
    """Length in tokens of random prompts; ignored when `prompts_file` is given."""
    output_len: Annotated[int, Flag("Workload", "Tokens to generate for each.")] = Field(default=16, ge=1)
    """Tokens generated for each prompt; of no meaning for `score`."""
    sampling: Sampling | None = None
    """How tokens are drawn; None takes the likeliest."""
    random_range_ratio: Annotated[
        float,
        Flag(
            "Workload",
            "Spread of random lengths, of outputs as well, 0 to 1.",
            before="temperature",
            also=("workload.random_output_range_ratio",),
        ),
    ] = Field(default=0.0, ge=0.0, lt=1.0)
    """Random prompt lengths are uniform in `input_len · (1 ± ratio)`; on the command line output lengths as well."""
    random_output_range_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Output lengths are uniform in `output_len · (1 ± ratio)`, where no file says what they are."""
    seed: int = 0
    """Seed of random prompts."""
    goodput: Annotated[
        Goodput | None,
        Flag(
            "Workload",
            "Limits of a good request in ms: ttft:500 tpot:50 e2el:2000.",
            metavar="KEY:MS",
            repeats=True,
            before="temperature",
        ),
    ] = None
    """What `request_goodput` and `slo_attainment` count as good; None counts nothing."""
    prompts_file: Annotated[
        str | None,
        Flag(
            "Workload",
            "JSONL of texts, token ids or chats, or ShareGPT; - reads what comes in. [random tokens]",
            name="prompts",
            metavar="FILE",
            before="temperature",
        ),
    ] = None
    """JSONL with `{"prompt": …}`, `{"prompt_token_ids": […]}` or `{"messages": […]}` a line, or conversations of
    ShareGPT; the first `num_prompts` are used."""
    arrivals: Arrivals | None = None
    """How requests come over time; None gives all at once."""
    output_lens: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Tokens generated for each prompt, where its line in the file says so; filled in when that is read."""
    input_lens: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Tokens of each random prompt, where a trace says so; filled in when that is read."""
    prompts_sha256: str | None = None
    """SHA-256 of the prompts' text with plain newlines, part of the workload's identity; filled in when it is read."""

    @model_validator(mode="after")
    def _scores_are_not_sampled(self) -> Self:
        if self.kind == "score" and self.sampling is not None:
            raise ValueError("workload.sampling: nothing is sampled where texts are scored; leave it out")
        if self.kind == "score" and self.arrivals is not None:
            raise ValueError("workload.arrivals: texts are scored in batches, and do not come over time; leave it out")
        if self.kind == "score" and self.goodput is not None and {*self.goodput.limits} != {"e2el"}:
            raise ValueError("workload.goodput: where texts are scored there is no latency but e2el; give e2el alone")
        times_s = self.arrivals.times_s if self.arrivals is not None else None
        if self.arrivals is not None and self.arrivals.slo_attainment is not None and self.goodput is None:
            raise ValueError("goodput: a rate is sustained within limits; give --goodput, such as ttft:500")
        given = {"output_lens": self.output_lens, "input_lens": self.input_lens, "arrivals.times_s": times_s}
        for name, values in given.items():
            if values is not None and len(values) != self.num_prompts:
                raise ValueError(f"workload.{name}: {len(values)} of {self.num_prompts} prompts")
        return self

    @property
    def generated_len(self) -> int:
        """Most tokens generated for a prompt: none where texts are scored."""
        return max(self.generated_lens)

    @property
    def unlike_lens(self) -> tuple[int, ...] | None:
        """Tokens generated for each prompt, where that differs; else None."""
        lens = self.generated_lens
        return lens if len(set(lens)) > 1 else None

    @property
    def generated_lens(self) -> tuple[int, ...]:
        """Tokens generated for each prompt."""
        if self.kind == "score":
            return (0,) * self.num_prompts
        if self.output_lens is not None:
            return self.output_lens
        if not self.random_output_range_ratio:
            return (self.output_len,) * self.num_prompts
        source = random.Random(f"{self.seed}/output")
        spread = round(self.output_len * self.random_output_range_ratio)
        least, most = self.output_len - spread, self.output_len + spread
        return tuple(max(1, source.randint(least, most)) for _ in range(self.num_prompts))


class StagePlan(Value):
    """The layers one device holds: `first_layer` included, `end_layer` excluded."""

    device: Device
    first_layer: int = Field(ge=0)
    end_layer: int = Field(ge=1)
    memory_fraction: Share = 0.9
    """Share of the device's memory that weights, KV cache and activations may take."""
    max_memory_bytes: Bytes | None = None
    """Most that they may take, whatever share that is."""

    @property
    def num_layers(self) -> int:
        """Layers that the device holds."""
        return self.end_layer - self.first_layer

    @property
    def range_text(self) -> str:
        """`0-15`, or `0` for a single layer."""
        return f"{self.first_layer}-{self.end_layer - 1}" if self.num_layers > 1 else f"{self.first_layer}"

    def cap_bytes(self, device_bytes: int) -> int:
        """Bytes that the stage may take of a device that has so many."""
        return min(int(self.memory_fraction * device_bytes), self.max_memory_bytes or device_bytes)

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.end_layer <= self.first_layer:
            raise ValueError(
                f"stage on {self.device} holds no layer: first_layer={self.first_layer}, end_layer={self.end_layer}"
            )
        return self


EngineName = Literal["vllm", "sglang"]
ENGINE_TITLES: Mapping[EngineName, str] = {"vllm": "vLLM", "sglang": "SGLang"}


class EngineSettings(Value):
    """How another engine runs a plan, by the engine's own names; None leaves a setting at the engine's default."""

    name: EngineName = "vllm"
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one batch at most, over all its sequences: the token budget."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Sequences that run at once, of all batches together."""
    kv_cache_memory_bytes: Bytes | None = None
    """KV cache of each worker."""
    enforce_eager: bool = False
    """The model is not compiled, and no CUDA graphs are captured."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Workers that share each layer of a stage: on its device, and on those numbered after it."""
    served: bool = False
    """Measured by its HTTP server, in whose own process the scheduler is; else in pipetune's host."""

    @model_validator(mode="after")
    def _budget_holds_all(self) -> Self:
        budget, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if budget is not None and seqs is not None and budget < seqs:
            raise ValueError(f"plan.engine.max_num_batched_tokens={budget}: must be at least max_num_seqs={seqs}")
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """Name, and what is not left to the engine."""
        sizes = {
            "budget": self.max_num_batched_tokens,
            "seqs": self.max_num_seqs,
            "KV": f"{self.kv_cache_memory_bytes / 2**20:.12g}MiB" if self.kv_cache_memory_bytes else None,
            "TP": self.tensor_parallel_size if self.tensor_parallel_size > 1 else None,
        }
        told = (f"{name} {size}" for name, size in sizes.items() if size is not None)
        return (self.name, *told, *(["eager"] if self.enforce_eager else []), *(["served"] if self.served else []))


class Lane(Value):
    """How requests whose prompts have up to so many tokens are let in, where they come over time."""

    up_to_tokens: int | None = Field(default=None, ge=1)
    """None takes all that are longer than the other lanes': the last lane has it, and no other."""
    prefill_chunk_size: int | None = Field(default=None, ge=1)
    """Tokens of a prompt prefilled at a time, where these are fewer than the plan's."""
    prefill_micro_batch_size: int | None = Field(default=None, ge=1)
    """Requests prefilled together, where these are fewer than the plan's."""
    prefills_per_decode: float | None = Field(default=None, gt=0.0)
    """Prefills between two steps of a slot, after which one of the lane lets it go first: 0.5 lets two steps go, so
    that prompts gather; None never does."""
    slots: int | None = Field(default=None, ge=1)
    """Slots in which the lane's requests decode, and no others; None takes what the other lanes leave."""
    weight: float = Field(default=1.0, gt=0.0, le=1e6)
    """Tokens that are prefilled for one of a lane of weight 1, while both have requests waiting."""

    @property
    def text(self) -> str:
        """`≤64 weight 4`; `others` for the last one."""
        sizes = {
            "chunk": self.prefill_chunk_size,
            "prefill": self.prefill_micro_batch_size,
            "prefills a step": self.prefills_per_decode,
            "slots": self.slots,
            "weight": self.weight if self.weight != 1 else None,
        }
        told = (f"{name} {size:.12g}" for name, size in sizes.items() if size is not None)
        return " ".join((f"≤{self.up_to_tokens}" if self.up_to_tokens else "others", *told))


def slots_needed(lanes: Sequence[Lane]) -> int:
    """Slots that there must be for them, those of their own and one for all others."""
    return sum(lane.slots or 0 for lane in lanes) + any(lane.slots is None for lane in lanes)


_OF_RUNTIME = ("prefill_micro_batch_size", "prefill_chunk_size", "max_in_flight", "compile", "lanes")
"""Fields of a plan that mean something to our own runtime alone, beside `micro_batch_size`."""


class Plan(Value):
    """How a model is split and run."""

    stages: tuple[StagePlan, ...] = Field(min_length=1)
    micro_batch_size: int = Field(ge=1)
    """Sequences that travel through the stages together while decoding; one KV slot holds them."""
    prefill_micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences prefilled together, at most `micro_batch_size`; None means the same."""
    prefill_chunk_size: int | None = Field(default=None, ge=1)
    """Tokens of a prompt prefilled at a time, its KV kept in between; None prefills whole prompts."""
    max_in_flight: int | None = Field(default=None, ge=1)
    """Upper limit of micro-batches resident at once, in each replica; None leaves it to the memory caps."""
    replicas: int = Field(default=1, ge=1)
    """Equal pipelines side by side, among which the prompts are shared out."""
    replica_devices: tuple[tuple[Device, ...], ...] = ()
    """Devices of the second replica and further ones, stage by stage; the first one's stand in `stages`."""
    packed_weights: bool = True
    """CPU: linear weights are laid out once for oneDNN's kernels; without effect on GPUs."""
    cuda_graphs: bool = True
    """GPU: decode steps are captured as CUDA graphs; without effect on CPUs."""
    compile: bool = False
    """Layers are compiled by `torch.compile`; the time it takes is recorded and not measured."""
    engine: EngineSettings | None = None
    """Another engine that runs the plan, which forms batches by itself; None: our own runtime."""
    lanes: Annotated[tuple[Lane, ...], AfterValidator(lambda lanes: lanes if lanes != (Lane(),) else ())] = ()
    """By rising lengths of prompts, for requests that come over time; none is one that says nothing."""

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
        if len(self.replica_devices) != self.replicas - 1:
            raise ValueError(
                f"plan.replica_devices: replicas={self.replicas} needs devices for {self.replicas - 1} further "
                f"replicas; given are {len(self.replica_devices)}"
            )
        for index, devices in enumerate(self.replica_devices):
            if len(devices) != len(self.stages):
                raise ValueError(f"plan.replica_devices[{index}]: {len(devices)} devices for {len(self.stages)} stages")
        workers = [device for device in self.devices if device_kind(device) == "cpu"]
        if doubled := sorted({device for device in workers if workers.count(device) > 1}):
            raise ValueError(f"plan.stages: {', '.join(doubled)} would hold two stages; give each its own CPU worker")
        if self.prefill_size > (most := self.micro_batch_size):
            raise ValueError(
                f"plan.prefill_micro_batch_size={self.prefill_size} is larger than micro_batch_size={most}"
            )
        limits = [lane.up_to_tokens or math.inf for lane in self.lanes] or [math.inf]
        if limits != sorted({*limits, math.inf}):
            raise ValueError("plan.lanes: up_to_tokens must rise from lane to lane, and the last one must have none")
        if self.engine is not None:
            own = self.model_dump(include={*_OF_RUNTIME}) | {"micro_batch_size": self.micro_batch_size - 1}
            if odd := [name for name, value in own.items() if value]:
                raise ValueError(
                    f"plan.{odd[0]}: {self.engine.name} forms its batches by itself; set micro_batch_size to 1, and "
                    f"leave out {', '.join(_OF_RUNTIME)}"
                )
            workers = [one for device in self.devices for one in self.shards(device)]
            if doubled := sorted({one for one in workers if workers.count(one) > 1}):
                raise ValueError(f"plan.engine.tensor_parallel_size: {', '.join(doubled)} would hold two shards")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an engine or lanes as before there were any: other versions read plans, too."""
        return {name: value for name, value in write(self).items() if name not in ("engine", "lanes") or value}

    @property
    def num_layers(self) -> int:
        """Layers of all stages together."""
        return self.stages[-1].end_layer

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(stage.num_layers for stage in self.stages)

    @property
    def prefill_size(self) -> int:
        """Sequences prefilled together: `prefill_micro_batch_size`, or `micro_batch_size` without one."""
        return self.prefill_micro_batch_size or self.micro_batch_size

    def lane_of(self, prompt_len: int) -> Lane:
        """The lane of prompts of so many tokens; an empty one where the plan has none."""
        return next((lane for lane in self.lanes if prompt_len <= (lane.up_to_tokens or math.inf)), Lane())

    @property
    def lane_words(self) -> tuple[str, ...]:
        """Words for the lanes, if there are any."""
        if len(self.lanes) == 1:
            return (self.lanes[0].text.removeprefix("others "),)
        return (f"lanes {', '.join(lane.text for lane in self.lanes)}",) if self.lanes else ()

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices of all replicas, one after the other, stage by stage."""
        return (*(stage.device for stage in self.stages), *(name for row in self.replica_devices for name in row))

    @property
    def is_engine_default(self) -> bool:
        """Whether another engine runs it as one pipeline, at its own limits."""
        limits = self.engine and (self.engine.max_num_batched_tokens, self.engine.max_num_seqs)
        return limits == (None, None) and self.replicas == self.width == 1

    @property
    def width(self) -> int:
        """Workers of each stage."""
        return self.engine.tensor_parallel_size if self.engine is not None else 1

    def shards(self, device: str) -> tuple[str, ...]:
        """Devices that share the layers of the stage on a device: itself, and those numbered after it."""
        kind, _, index = device.rpartition(":")
        return tuple(f"{kind}:{int(index) + place}" for place in range(self.width))

    def replica(self, index: int) -> Self:
        """One replica as a plan of its own."""
        devices = self.devices[index * len(self.stages) : (index + 1) * len(self.stages)]
        stages = tuple(one.model_copy(update={"device": name}) for one, name in zip(self.stages, devices, strict=True))
        return self.model_copy(update={"stages": stages, "replicas": 1, "replica_devices": ()})

    def moved(self, names: Mapping[str, str]) -> Self:
        """The plan on other devices, by the names of its own."""
        stages = tuple(stage.model_copy(update={"device": names[stage.device]}) for stage in self.stages)
        rows = tuple(tuple(names[device] for device in row) for row in self.replica_devices)
        return self.model_copy(update={"stages": stages, "replica_devices": rows})

    def without(self, device: str) -> Self | None:
        """A plan of the same model that leaves a device out, of the replicas that can, else of stages that take on the
        device's layers; None where nothing is left."""
        if replicas := [own for own in map(self.replica, range(self.replicas)) if device not in own.devices]:
            others = tuple(own.devices for own in replicas[1:])
            return replicas[0].model_copy(update={"replicas": len(replicas), "replica_devices": others})
        left = [stage for stage in self.stages if stage.device != device]
        bounds = [0, *(stage.first_layer for stage in left[1:]), self.stages[-1].end_layer]
        stages = tuple(
            stage.model_copy(update={"first_layer": first, "end_layer": end})
            for stage, (first, end) in zip(left, itertools.pairwise(bounds), strict=False)
        )
        return self.replica(0).model_copy(update={"stages": stages}) if stages else None

    @classmethod
    def from_layer_counts(
        cls,
        counts: tuple[int, ...],
        devices: tuple[str, ...],
        micro_batch_size: int,
        *,
        prefill_micro_batch_size: int | None = None,
        prefill_chunk_size: int | None = None,
        replicas: int = 1,
        compile: bool = False,  # noqa: A002  the name of the field
        memory_fraction: float = 0.9,
        max_memory_bytes: int | None = None,
    ) -> Self:
        """Builds a plan from a count of layers per stage: stage i lands on `devices[i]`, replicas on those that follow;
        ValueError for more stages than devices, or a count below one."""
        width = len(counts)
        if width * replicas > len(devices):
            what = f"{width} stages" if replicas == 1 else f"{replicas} replicas of {width} stages"
            raise ValueError(f"{what} need as many devices; given are {len(devices)}: {devices}")
        return cls(
            stages=tuple(
                StagePlan(
                    device=device,
                    first_layer=end - count,
                    end_layer=end,
                    memory_fraction=memory_fraction,
                    max_memory_bytes=max_memory_bytes,
                )
                for device, count, end in zip(devices, counts, itertools.accumulate(counts), strict=False)
            ),
            micro_batch_size=micro_batch_size,
            prefill_micro_batch_size=prefill_micro_batch_size,
            prefill_chunk_size=prefill_chunk_size,
            replicas=replicas,
            replica_devices=tuple(devices[width * index : width * (index + 1)] for index in range(1, replicas)),
            compile=compile,
        )

    def describe(self) -> str:
        """One short line for people: `2 × 17+13 · micro-batch 16 (prefill 8, chunk 64) · compiled`.

        On devices of one kind no two plans have the same.
        Devices that are not the first ones in order are named: `17+13 on cpu:1,cpu:0 · micro-batch 16`; so are memory
        caps and limits in flight that are not the default: `17+13 · micro-batch 16 · cap 0.7 · at most 2 in flight`.
        """
        text = "+".join(str(count) for count in self.layer_counts)
        if self.replicas > 1:
            text = f"{self.replicas} × {text}"
        text += self.order_text
        if self.engine is not None:
            return " · ".join((text, *self.engine.words, *self.cap_words))
        prefill = [f"prefill {self.prefill_size}"] if self.prefill_size != self.micro_batch_size else []
        if self.prefill_chunk_size is not None:
            prefill.append(f"chunk {self.prefill_chunk_size}")
        text += f" · micro-batch {self.micro_batch_size}" + (f" ({', '.join(prefill)})" if prefill else "")
        text += f" · {', '.join(self.switches)}" if self.switches else ""
        text = " · ".join((text, *self.lane_words, *self.cap_words))
        return text + (f" · at most {self.max_in_flight} in flight" if self.max_in_flight is not None else "")

    @property
    def cap_words(self) -> list[str]:
        """Words for the memory caps that are not the default."""
        fractions = [str(stage.memory_fraction) for stage in self.stages]
        sizes = [f"{stage.max_memory_bytes / 2**20:.4g} MiB" if stage.max_memory_bytes else "" for stage in self.stages]
        return [
            f"cap {','.join(caps[:1] if len(set(caps)) == 1 else caps)}"
            for caps, usual in ((fractions, str(StagePlan.model_fields["memory_fraction"].default)), (sizes, ""))
            if set(caps) != {usual}
        ]

    @property
    def order_text(self) -> str:
        """` on cpu:1,cpu:0` where devices are not the first ones in order, else nothing."""
        kind = device_kind(self.devices[0])
        if self.devices == tuple(f"{kind}:{index}" for index in range(len(self.devices))):
            return ""
        rows = (self.replica(index).devices for index in range(self.replicas))
        return f" on {'|'.join(','.join(row) for row in rows)}"

    @property
    def switches(self) -> tuple[str, ...]:
        """Words for the execution switches that are not at their defaults and matter on these devices."""
        kinds = {device_kind(device) for device in self.devices}
        switches = ["compiled"] if self.compile else []
        if "cpu" in kinds and not self.packed_weights:
            switches.append("unpacked")
        if "cuda" in kinds and not self.cuda_graphs:
            switches.append("no graphs")
        return tuple(switches)


class EffectivePlan(Value):
    """A plan with what its memory caps resolve to; two caps that resolve alike are one plan."""

    plan: Plan
    in_flight: int = Field(ge=1)

    @property
    def key(self) -> str:
        """Identity: equal for plans that run the same way on the same devices."""
        plan = self.plan
        stages = ",".join(f"{stage.device}[{stage.first_layer}:{stage.end_layer}]" for stage in plan.stages)
        text = f"{stages} mb={plan.micro_batch_size} prefill={plan.prefill_size} in_flight={self.in_flight}"
        if plan.engine is not None:
            # Without a size of its own the KV cache takes what the caps leave.
            words = (*plan.engine.words, *(() if plan.engine.kv_cache_memory_bytes else plan.cap_words))
            text = " ".join((stages, *(word.replace(" ", "=") for word in words)))
        if plan.prefill_chunk_size is not None:
            text += f" chunk={plan.prefill_chunk_size}"
        if plan.replicas > 1:
            text += f" replicas={'|'.join(','.join(row) for row in plan.replica_devices)}"
        return " ".join((text, *(words.replace(" ", "_") for words in (*plan.switches, *plan.lane_words))))

    def by(self, *, served: bool) -> Self:
        """The same with another engine asked through its HTTP server, or not; as it is for our own runtime."""
        if self.plan.engine is None:
            return self
        engine = self.plan.engine.model_copy(update={"served": served})
        return self.model_copy(update={"plan": self.plan.model_copy(update={"engine": engine})})


class Protocol(Value):
    """How one plan is measured."""

    num_iters: Annotated[int, Flag("Workload", "Timed repetitions.")] = Field(default=3, ge=1)
    num_iters_warmup: Annotated[int, Flag("Workload", "Repetitions before the timed ones.")] = Field(default=1, ge=0)
    """Repetitions before timing; more are added until steady, up to `max_warmup`."""
    max_warmup: int = Field(default=3, ge=0)
    """Most repetitions before timing."""
    steady_tolerance: float = Field(default=0.10, gt=0.0)
    """Warm when two repetitions in a row differ by less than this share."""
    check_outputs: Annotated[bool, Flag("Workload", "Compare output with the unsplit model.", name="check")] = True
    """Compare logits before timing, and tokens of the timed passes, with the study's reference."""
    check_prompts: int = Field(default=4, ge=1)
    """Prompts whose logits are compared."""
    check_tokens: int = Field(default=8, ge=1)
    """Tokens of each that are compared."""
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
