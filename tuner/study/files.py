"""What a study folder holds, and how it is read: every file by name, every fault with the file it is in."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipetune.bench.errors import ConfigError, StudyError, explain
from pipetune.bench.memory import ModelShape
from pipetune.bench.record import FailureKind, Machine, Record
from pipetune.bench.spec import Value
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import TuneConfig

CONFIG_FILE = "study.yaml"
MACHINE_FILE = "machine.json"
SHAPE_FILE = "shape.json"
SPACE_FILE = "space.json"
SHARING_FILE = "sharing.json"
SEARCH_FILE = "search.json"
PROFILE_FILE = "profile.json"
WARM_START_FILE = "warm_start.json"
PROMPTS_FILE = "prompts.jsonl"
REFERENCE_FILE = "reference.safetensors"
DATABASE_FILE = "study.db"
RECORDS_FOLDER = "records"
LOGS_FOLDER = "logs"
_T = TypeVar("_T", bound=BaseModel)


class StudyContents(Value):
    """A study as it lies on disk."""

    folder: Path
    config: TuneConfig
    machine: Machine
    shape: ModelShape
    records: tuple[Record, ...]


def load_study(folder: Path) -> StudyContents:
    """Reads a study.

    Raises:
        StudyError: the folder holds no study, or a file of it is cut off; names the file.
    """
    return StudyContents(
        folder=folder,
        config=read_config(folder),
        machine=read(folder / MACHINE_FILE, Machine),
        shape=read(folder / SHAPE_FILE, ModelShape),
        records=load_records(folder),
    )


def load_records(folder: Path) -> tuple[Record, ...]:
    """All records of a study in order of their numbers; temporary files of a killed writer are passed over.

    Raises:
        StudyError: a record is cut off, is of another version, or bears a number that is not its file's.
    """
    records = []
    for path in sorted((folder / RECORDS_FOLDER).glob("[0-9]*.json")):
        record = read(path, Record)
        if path.stem != f"{record.number:04}":
            raise StudyError(f"{path}: holds record {record.number}; give it its own name or move it away")
        records.append(record)
    return tuple(sorted(records, key=lambda record: record.number))


def was_interrupted(record: Record) -> bool:
    """Whether the record only says that somebody stopped it: its plan is still to be measured."""
    return record.result.outcome == "failure" and record.result.kind == FailureKind.INTERRUPTED


def read_config(folder: Path) -> TuneConfig:
    """The settings of a study.

    Raises:
        StudyError: the folder holds no study.
        ConfigError: its `study.yaml` is damaged.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise StudyError(f"{folder} holds no study: there is no {CONFIG_FILE}")
    return sources.load(folder / CONFIG_FILE)


def read(path: Path, model: type[_T]) -> _T:
    """Reads one JSON file of a study.

    Raises:
        StudyError: it is missing, cut off or of another version.
    """
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; the study ended before it was written") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        raise StudyError(
            f"{path} is cut off or no {model.__name__} of this version ({explain(error)}); move it away to go on "
            "without it"
        ) from None


def refuse_existing(path: Path | None) -> None:
    """Refuses to overwrite a file that a user names.

    Raises:
        ConfigError: the file is there, or its folder is not.
    """
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{path} exists; name a new file, or take it away first")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")


def write_new(path: Path, text: str) -> None:
    """Writes a new file.

    Raises:
        ConfigError: it is there already, or cannot be written.
    """
    refuse_existing(path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None
