"""What a model's parts cost on each device, and the links between them: measured once, for predictions of plans.

A task is one forward pass of a stage over `rows × new_tokens` new positions whose rows have `past_tokens` positions
cached. Its time is that of its stage's layers and, once a task, `overhead_s`; on the first stage also the embedding,
on the last one, where it samples, the head.
"""

from typing import Annotated, NamedTuple

from pydantic import Field

from pipetune.bench.memory import ModelShape
from pipetune.bench.record import Count, Machine, Moment, Seconds, Size
from pipetune.bench.spec import Device, ModelSpec, Sampling, SchemaVersion, Value

PROFILE_METHOD = 2
"""Counts up when profiles are taken otherwise than before: those kept from then are measured anew."""


class TaskKind(NamedTuple):
    """Tasks that take the same time on a stage: forward passes over `rows × new_tokens` positions."""

    rows: int
    new_tokens: int
    """New positions of each row: the prompt's or the chunk's in prefill, 1 in decode."""
    past_tokens: int
    """Positions of each row that are cached before."""
    samples: bool = True
    """Whether the last stage runs the head: not for a chunk that is not its prompt's last."""

    @property
    def is_decode(self) -> bool:
        """Whether each row gets one token behind cached ones."""
        return self.new_tokens == 1 and self.past_tokens > 0


class TaskTime(Value):
    """How long one part of one kind of task takes, sized as `TaskKind` is."""

    rows: Size
    new_tokens: Size
    past_tokens: Count
    seconds: Seconds
    """Median time over `samples` tasks."""
    spread_s: Seconds = 0.0
    """Seconds between the quartiles of those times."""
    samples: Size = 1


class LayerTimes(Value):
    """Layers that cost the same; each takes the times given."""

    layers: tuple[int, ...] = Field(min_length=1)
    times: tuple[TaskTime, ...] = Field(min_length=1)
    """Times of one of these layers. Prefill from an empty cache covers a grid of rows and lengths, decode one of rows
    and pasts."""


class DeviceProfile(Value):
    """What the model's parts take on one device while the others are as busy."""

    device: Device
    layers: tuple[LayerTimes, ...]
    """Together every layer of the model, once each."""
    overhead: tuple[TaskTime, ...]
    """Times spent once a task on every stage: masks, positions, rotary embeddings, and the loop around them."""
    embedding: tuple[TaskTime, ...]
    head: tuple[TaskTime, ...]
    """Final norm, head and sampling, on the last stage; where texts are scored, of all positions."""


class LinkProfile(Value):
    """Messages from one device to another: `latency_s + bytes / bytes_per_s`."""

    source: Device
    target: Device
    latency_s: Seconds
    bytes_per_s: float = Field(gt=0)

    def seconds(self, num_bytes: int) -> float:
        """What a message of this size takes."""
        return self.latency_s + num_bytes / self.bytes_per_s


class ContentionProfile(Value):
    """What devices that compute at once lose to each other, as cores of one processor do that share its memory.

    By phase, the natural logarithm of how much longer a task takes while all devices compute than while one does: 0
    where they share nothing; None where it was not timed, as on a single device.
    """

    prefill: float | None = Field(default=None, ge=0)
    decode: float | None = Field(default=None, ge=0)


class Profile(Value):
    """A model on the devices of a machine."""

    schema_version: SchemaVersion = 1
    model: ModelSpec
    shape: ModelShape
    machine: Machine
    device_bytes: dict[str, Count]
    packed_weights: bool = True
    cuda_graphs: bool = True
    """GPU: whether decode was timed as captured graphs."""
    scores: bool = False
    """Whether the head was timed over all positions, as for scoring."""
    devices: tuple[DeviceProfile, ...]
    contention: ContentionProfile = ContentionProfile()
    links: tuple[LinkProfile, ...]
    """Each ordered pair of devices."""
    measured_at: Moment
    took_s: Seconds
    notes: tuple[str, ...] = ()
    disturbances: tuple[str, ...] = ()
    """What makes it doubtful, in words; empty where nothing else ran."""


class ProfileGrid(Value):
    """Which kinds of tasks a profile times; those that the model or the memory has no room for are left out."""

    rows: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4, 8, 16, 32), min_length=1)
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(16, 64, 256), min_length=1)
    """New tokens of a row in prefill."""
    pasts: tuple[Annotated[int, Field(ge=1)], ...] = (16, 256)
    """Cached tokens of a row in decode."""
    chunks: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], ...] = ()
    """`(new, past)` tokens of chunks behind the first one."""
    max_tokens: int = Field(default=1024, ge=1)
    """Rows × new tokens of the largest task timed; beyond it, time grows as the tokens do."""
    scores: bool = False
    """Time the head over all positions, as for scoring; there is no decode then."""
    padded: bool = False
    """Rows of unlike prompts: those of several rows are padded on the left, which takes other attention kernels."""
    sampling: Sampling | None = None
    """How tokens are drawn, which is part of the head's time; None takes the likeliest."""
