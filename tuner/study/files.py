"""What a study folder holds, and how it is read: every file by name, every fault with the file it is in."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from pipetune.bench.errors import ConfigError, StudyError, explain
from pipetune.bench.files import read_text, write_durably
from pipetune.bench.memory import ModelShape
from pipetune.bench.record import FailureKind, Machine, Record
from pipetune.bench.spec import Value
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.study.losses import Losses

RECORDS_FOLDER = "records"
LOGS_FOLDER = "logs"
_T = TypeVar("_T", bound=BaseModel)
_TOOLS = {
    "vllm bench serve, or SGLang's bench_serving": {"request_throughput", "mean_ttft_ms"},
    "vllm bench throughput": {"requests_per_second", "tokens_per_second"},
    "vllm bench latency": {"avg_latency", "latencies"},
    "llama-bench": {"build_commit", "n_prompt", "n_gen"},
    "asv": {"commit_hash", "env_name"},
    "Google Benchmark": {"context", "real_time"},
    "pytest-benchmark, by another suite than pipetune's": {"machine_info", "stats"},
    "hyperfine": {"command", "mean", "stddev"},
    "github-action-benchmark": {"lastUpdate", "repoUrl", "entries"},
    "a tool for github-action-benchmark": {"name", "unit", "value"},
}
"""Words by which files of other tools are known; ours say `hardware_id`."""


class StudyFile(StrEnum):
    """The files of a study, beside its records, logs and reports."""

    CONFIG = "study.yaml"
    MACHINE = "machine.json"
    SHAPE = "shape.json"
    SPACE = "space.json"
    SHARING = "sharing.json"
    """Who this folder is in a shared study."""
    SEARCH = "search.json"
    """Log of the search."""
    PROFILE = "profile.json"
    """What plans are predicted from."""
    WARM_START = "warm_start.json"
    """What earlier studies gave."""
    PROMPTS = "prompts.jsonl"
    REFERENCE = "reference.safetensors"
    """Tokens and logits of the unsplit model."""
    DATABASE = "study.db"
    LOSSES = "losses.json"
    """Devices that were lost, if any were."""


class StudyContents(Value):
    """A study as it lies on disk."""

    folder: Path
    config: TuneConfig
    machine: Machine | None
    shape: ModelShape | None
    """Machine and shape are None where their files cannot be read."""
    records: tuple[Record, ...]
    """Those of the devices that are left, whose settings these are."""
    unread: tuple[str, ...] = ()
    """What there is beside these and cannot be read: each file, and why."""
    losses: Losses = Losses()
    earlier: tuple[Record, ...] = ()
    """Records from before the last loss."""


def load_study(folder: Path) -> StudyContents:
    """Reads a study; what beside its settings and losses cannot be read is named, and passed over. Raises as
    `read_config`, and as `read_losses`."""
    unread: list[str] = []
    records, losses = load_records(folder, unread), read_losses(folder)
    return StudyContents(
        folder=folder,
        config=losses.narrowed(read_config(folder)),
        machine=read_sound(losses.path(folder, StudyFile.MACHINE), Machine, unread),
        shape=read_sound(folder / StudyFile.SHAPE, ModelShape, unread),
        records=losses.current(records),
        unread=tuple(unread),
        losses=losses,
        earlier=tuple(record for record in records if record.number < losses.first_record),
    )


def study_at(place: str) -> Path:
    """A study's folder by its path, or by its name under `results/`."""
    folder, named = Path(place), Path("results") / place
    return named if not folder.exists() and named.exists() else folder


def read_losses(folder: Path) -> Losses:
    """The devices that a study lost; raises as `read`."""
    path = folder / StudyFile.LOSSES
    return read(path, Losses) if path.exists() else Losses()


def load_records(folder: Path, unread: list[str] | None = None) -> tuple[Record, ...]:
    """All records of a study in order of their numbers; temporary files of a killed writer are passed over. Those that
    are damaged, of another version, or whose number is not their file's are passed over where `unread` takes what is
    wrong with them; else a StudyError names the first."""
    records = []
    for path in sorted((folder / RECORDS_FOLDER).glob("[0-9]*.json")):
        try:
            record = read(path, Record)
            if path.stem != f"{record.number:04}":
                raise StudyError(f"{path}: holds record {record.number}; give it its own name or move it away")
        except StudyError as error:
            if unread is None:
                raise
            unread.append(str(error))
        else:
            records.append(record)
    return tuple(sorted(records, key=lambda record: record.number))


def read_records(path: Path, flag: str = "") -> list[Record]:
    """Records as `pipetune bench -o` writes them.
    StudyError: the file, after the flag that named it, cannot be read or holds something else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Record.model_validate_json(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        what = f"is no file of records, as pipetune bench -o writes them ({explain(error)})"
        raise StudyError(f"{flag}{path}{written_by(path)}: {what}") from None


def refuse_links(paths: Iterable[Path]) -> None:
    """Raises a StudyError that names the first link, where something is written in place: a study may be a stranger's,
    and lead to the user's own files."""
    for path in paths:
        if path.is_symlink():
            raise StudyError(f"{path}: is a link to {path.readlink()}, which would be written to; take it away")


def was_interrupted(record: Record) -> bool:
    """Whether the record only says that somebody stopped it: its plan is still to be measured."""
    return record.result.outcome == "failure" and record.result.kind == FailureKind.INTERRUPTED


def still_told(records: Sequence[Record]) -> tuple[Record, ...]:
    """The records without those that were stopped and whose plan ran later, as a resume lets it."""
    ran = {record.spec.plan: record.number for record in records if record.spec and not was_interrupted(record)}
    return tuple(
        record
        for record in records
        if not (record.spec and was_interrupted(record) and ran.get(record.spec.plan, -1) > record.number)
    )


def read_config(folder: Path) -> TuneConfig:
    """The settings of a study. StudyError: the folder holds no study. ConfigError: its `study.yaml` is damaged."""
    path = folder / StudyFile.CONFIG
    if not path.is_file():
        raise StudyError(f"{folder}{written_by(folder)} holds no study: there is no {StudyFile.CONFIG}")
    config = sources.load(path)
    if config.devices == "auto":
        raise StudyError(f"{path}: devices: those that the study ran on are missing; list them")
    return config


def read(path: Path, model: type[_T]) -> _T:
    """Reads one JSON file of a study. StudyError: it is missing, cut off or of another version."""
    try:
        return model.model_validate_json(read_text(path), strict=True)
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; the study ended before it was written") from None
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}; move it away to go on without it") from None
    except ValueError as error:
        raise StudyError(
            f"{path} is cut off or no {model.__name__} of this version ({explain(error)}); move it away to go on "
            "without it"
        ) from None


def read_sound(path: Path, model: type[_T], unread: list[str]) -> _T | None:
    """Reads one JSON file of a study; None where it cannot be read, and `unread` takes why."""
    try:
        return read(path, model)
    except StudyError as error:
        unread.append(str(error))
        return None


@contextlib.contextmanager
def fitting(place: Path | str) -> Iterator[None]:
    """A block that first uses what stands there; a StudyError that names it where the parts do not fit each other."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise StudyError(f"{place}: does not fit the study ({explain(error)}); move it away, or put it back") from error


def written_by(path: Path) -> str:
    """` (written by hyperfine)` of another tool's file; empty for folders, for our own, and where nobody knows."""
    try:
        words = set(re.findall(r"\w+", read_text(path)))
    except (OSError, ValueError):
        return ""
    tool = next((name for name, own in _TOOLS.items() if own <= words and "hardware_id" not in words), None)
    return f" (written by {tool})" if tool else ""


def refuse_existing(path: Path | None) -> None:
    """Raises a ConfigError where a file that a user names is there, or its folder is not, or cannot be written to."""
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{path} exists; name a new file, or take it away first")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")
    refuse_unwritable(path.absolute().parent)


def refuse_unwritable(folder: Path) -> None:
    """Raises a ConfigError where a folder cannot be written to, or made, before anything is measured."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(f"{there}/", os.W_OK):
        raise ConfigError(f"{there}: is read-only here, or no folder; give another place")


def write_new(path: Path, text: str) -> None:
    """Writes a new file; refuses as `refuse_existing`."""
    refuse_existing(path)
    write_durably(path, text)
