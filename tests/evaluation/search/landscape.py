"""A landscape: every plan of a grid, measured several times, so that a search can be judged by what is really best.

On disk a landscape is a folder: `landscape.json`, what was asked and on which machine; `runs.jsonl`, a record a line,
packed to `runs.jsonl.gz` when it is complete. A torn last line, of a driver that was killed, is not read.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from pipetune.bench.errors import StudyError
from pipetune.bench.files import write_durably
from pipetune.bench.memory import ModelShape
from pipetune.bench.record import Machine, Measurement, Record
from pipetune.bench.spec import Device, ModelSpec, Plan, Protocol, SchemaVersion, Value, Workload
from pipetune.tuner.planning.partition.splits import Partition


def all_partitions(
    num_layers: int, *, min_stages: int, max_stages: int, forbidden_cuts: Sequence[int] = ()
) -> Iterator[Partition]:
    """Every partition into `min_stages` to `max_stages` stages, each of one layer at least."""
    allowed = sorted(set(range(1, num_layers)) - set(forbidden_cuts))
    for stages in range(min_stages, max_stages + 1):
        for cuts in itertools.combinations(allowed, stages - 1):
            yield tuple(end - first for first, end in itertools.pairwise((0, *cuts, num_layers)))


class LandscapeSpec(Value):
    """What a landscape asks."""

    name: str
    about: str
    """One line for people."""
    model: ModelSpec
    workload: Workload
    device_orders: tuple[tuple[Device, ...], ...]
    """The devices of the stages in order; more than one where the order is part of the grid."""
    micro_batch_sizes: tuple[int, ...]
    """Prompts are prefilled by as many rows."""
    protocol: Protocol = Protocol(num_iters=2, num_iters_warmup=0, max_warmup=0)
    """Short passes vary from one to the next, so that each is timed; a run's value is the median of its passes."""
    repeats: int = Field(default=4, ge=2)
    """Of every plan."""
    near: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Plans whose mean lies within this share of the best one's after those are measured further."""
    near_repeats: int = Field(default=16, ge=2)
    """Of these, in all: what is best, and within 2 % of it, is decided among them."""
    seed: int = 0
    worker_env: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Of single workers: how an unlike device is held back."""

    def plans(self, shape: ModelShape) -> tuple[Plan, ...]:
        """The grid: every allowed cut × micro-batch size × device order."""
        stages = len(self.device_orders[0])
        partitions = all_partitions(
            shape.num_layers, min_stages=stages, max_stages=stages, forbidden_cuts=shape.forbidden_cuts
        )
        return tuple(
            Plan.from_layer_counts(partition, devices, size)
            for partition in partitions
            for devices in self.device_orders
            for size in self.micro_batch_sizes
        )


class Landscape(Value):
    """What was asked, and of what machine; the runs stand beside it."""

    schema_version: SchemaVersion = 1
    spec: LandscapeSpec
    shape: ModelShape
    machine: Machine
    device_bytes: dict[str, int]
    prompt_lens: tuple[int, ...]
    auto_counts: tuple[int, ...] | None = None
    """Layers of each device under `device_map="auto"`, as accelerate splits the model."""


def cell_of(record: Record) -> tuple[int, int]:
    """Index of the plan in the grid, and number of the repeat."""
    assert record.params is not None
    return int(record.params["cell"]), int(record.params["repeat"])


def usable_runs(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Of each plan, by its place in the grid, the run of every repeat: the last undisturbed one, or else the last.

    Raises:
        StudyError: a run failed.
    """
    chosen: dict[int, dict[int, Record]] = {}
    for record in records:
        if not isinstance(record.result, Measurement):
            raise StudyError(f"run {record.number} failed: {record.result.message}")
        cell, repeat = cell_of(record)
        runs = chosen.setdefault(cell, {})
        before = runs.get(repeat)
        if before is None or is_undisturbed(record) or not is_undisturbed(before):
            runs[repeat] = record
    return {cell: [runs[repeat] for repeat in sorted(runs)] for cell, runs in chosen.items()}


def is_undisturbed(record: Record) -> bool:
    """Whether the run gave a measurement beside which nothing else ran."""
    return isinstance(record.result, Measurement) and not record.result.telemetry.disturbances


class LandscapeFolder:
    """A landscape's files."""

    document: type[Landscape] = Landscape

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = folder / "runs.jsonl"
        self._packed = folder / "runs.jsonl.gz"

    @property
    def is_complete(self) -> bool:
        return self._packed.exists()

    def reopen(self) -> None:
        """Unpacks a landscape that lacks runs."""
        if self._packed.exists():
            write_durably(self._lines, "".join(_line(record) for record in self._records()))
            self._packed.unlink()

    def begin(self, landscape: Landscape) -> None:
        """Writes what is asked, or goes on with it.

        Raises:
            StudyError: the folder holds another landscape, or one of another machine.
        """
        path = self.folder / "landscape.json"
        if path.exists():
            there = self.read()
            if there.spec != landscape.spec or there.machine.hardware_id != landscape.machine.hardware_id:
                raise StudyError(
                    f"{self.folder}: holds a landscape of another question or machine; give another folder"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, landscape.model_dump_json(indent=1) + "\n")

    def read(self) -> Landscape:
        """What was asked.

        Raises:
            StudyError: there is no landscape, or one that cannot be read.
        """
        path = self.folder / "landscape.json"
        try:
            return self.document.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise StudyError(f"{path}: holds no landscape: {error}") from error

    def records(self) -> tuple[Record, ...]:
        """All runs so far, in the order measured."""
        return tuple(self._records())

    def _records(self) -> Iterator[Record]:
        if self._packed.exists():
            with gzip.open(self._packed, "rt", encoding="utf-8") as file:
                yield from (Record.model_validate_json(line) for line in file)
        elif self._lines.exists():
            with self._lines.open(encoding="utf-8") as file:
                for line in file:
                    if line.endswith("\n"):
                        yield Record.model_validate_json(line)

    def append(self, record: Record) -> None:
        """Adds a run."""
        self._mend()
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def pack(self, records: Sequence[Record]) -> None:
        """Replaces the runs by those given, as one packed file: the landscape is complete."""
        temporary = self._packed.with_suffix(".tmp")
        with temporary.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
            for record in records:
                file.write(_line(record).encode())
        temporary.replace(self._packed)
        self._lines.unlink(missing_ok=True)

    def _mend(self) -> None:
        """Cuts a torn last line off."""
        if not self._lines.exists():
            return
        text = self._lines.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            write_durably(self._lines, whole.decode())


def _line(record: Record) -> str:
    """Short: without what is at its default, but for the word that tells a measurement from a failure."""
    values = record.model_dump(mode="json", exclude_defaults=True)
    values["result"]["outcome"] = record.result.outcome
    return json.dumps(values, separators=(",", ":")) + "\n"
