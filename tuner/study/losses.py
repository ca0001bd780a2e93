"""Devices that a study lost on the way, and which of its records and files are of those that are left."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipetune.bench.record import Count, Failure, Record
from pipetune.bench.spec import SchemaVersion, Value
from pipetune.tuner.config.schema import TuneConfig


class Loss(Value):
    """A device that was lost twice in a row, and that the study went on without."""

    device: str
    devices: tuple[str, ...]
    """All that the study ran on until then, this one among them."""
    first_record: Count
    """Number of the first record without it."""
    failure: Failure

    @property
    def left(self) -> tuple[str, ...]:
        """The devices without it."""
        return tuple(device for device in self.devices if device != self.device)

    def __str__(self) -> str:
        sets = f"degraded from {', '.join(self.devices)} to {', '.join(self.left)}"
        return f"{self.device} was lost twice: the study is {sets} from record {self.first_record:04} on"


class Losses(Value):
    """All losses of a study in their order; none in most."""

    schema_version: SchemaVersion = 1
    losses: tuple[Loss, ...] = ()

    def narrowed(self, config: TuneConfig) -> TuneConfig:
        """The settings over the devices that are left."""
        return config.model_copy(update={"devices": self.losses[-1].left}) if self.losses else config

    def path(self, folder: Path, name: str) -> Path:
        """Where a file stands of which every set of devices has its own: `space.json`, `space-2.json` …"""
        path = folder / name
        return path.with_stem(f"{path.stem}-{len(self.losses) + 1}") if self.losses else path

    @property
    def first_record(self) -> int:
        """Number of the first record of the devices that are left."""
        return self.losses[-1].first_record if self.losses else 0

    def current(self, records: Sequence[Record]) -> tuple[Record, ...]:
        """The records of the devices that are left: on CPUs others had another share of the cores, and on all of them
        another baseline."""
        return tuple(record for record in records if record.number >= self.first_record)

    def earlier(self, records: Sequence[Record]) -> Iterator[tuple[Loss, tuple[Record, ...]]]:
        """Each loss with the records of the devices that it ended."""
        first = 0
        for loss in self.losses:
            yield loss, tuple(record for record in records if first <= record.number < loss.first_record)
            first = loss.first_record
