"""The study folder: settings, machine and records on disk; the records are the truth, each one whole or not there."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pipetune.bench.errors import StudyError
from pipetune.bench.files import write_durably
from pipetune.bench.fleet import locks
from pipetune.bench.memory import ModelShape
from pipetune.bench.record import Machine, Measurement, Record
from pipetune.bench.spec import Workload
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import STUDY_NAME, TuneConfig
from pipetune.tuner.config.storage_url import check_sharing
from pipetune.tuner.study.diff import differences
from pipetune.tuner.study.files import (
    CONFIG_FILE,
    DATABASE_FILE,
    LOGS_FOLDER,
    MACHINE_FILE,
    PROFILE_FILE,
    PROMPTS_FILE,
    RECORDS_FOLDER,
    REFERENCE_FILE,
    SEARCH_FILE,
    SHAPE_FILE,
    SHARING_FILE,
    SPACE_FILE,
    WARM_START_FILE,
    StudyContents,
    load_records,
    load_study,
    read,
    read_config,
    was_interrupted,
)

__all__ = ["MAY_CHANGE", "StudyContents", "StudyStore", "load_records", "load_study", "study_folder", "was_interrupted"]

_LOCK_FILE = ".lock"
_FILES = (
    CONFIG_FILE,
    MACHINE_FILE,
    PROMPTS_FILE,
    SHAPE_FILE,
    REFERENCE_FILE,
    DATABASE_FILE,
    SPACE_FILE,
    SHARING_FILE,
    SEARCH_FILE,
    PROFILE_FILE,
    WARM_START_FILE,
)

MAY_CHANGE = frozenset(
    {
        "name",
        "output_dir",
        "profile",
        "warm_start",
        "n_trials",
        "timeout_s",
        "stop_early",
        "finalists",
        "finalist_rounds",
        "max_finalist_rounds",
        "storage",
        "shared_study",
        "device_names",
        "gate",
        "prices",
    }
)
"""Settings that a resume may change: they say how long to search, from which predictions, with whom, and where
results go, not what is searched."""


def study_folder(config: TuneConfig) -> Path:
    """Where a study lands: `output_dir`, else `results/<name>`, else a name of the model and the time."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    if config.name is not None:
        return Path("results") / config.name
    model = "".join(char if char.isalnum() or char in "._-" else "-" for char in Path(config.model.name).name)
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    name = f"{model.lstrip('._-')[:40] or 'study'}-{stamp}"
    assert STUDY_NAME.fullmatch(name)
    return Path("results") / name


class StudyStore:
    """The one writer of a study folder; holds its lock from `create` or `resume` until `close`."""

    def __init__(self, folder: Path, config: TuneConfig, records: Sequence[Record], lock: contextlib.ExitStack) -> None:
        self.folder = folder
        self.config = config
        self._records = list(records)
        self._lock = lock
        self._fresh = False
        self._recorded_revision: str | None = None
        self._first_of_key: dict[str, int] = {}
        for record in records:
            if record.effective is not None:
                self._first_of_key.setdefault(record.effective.key, record.number)

    @classmethod
    def create(cls, folder: Path, config: TuneConfig) -> Self:
        """Starts a study in a new or empty folder.

        Args:
            config: with its devices resolved; a prompts file is copied into the folder.

        Raises:
            ConfigError: a shared study without a database that several processes can use.
            StudyError: the folder holds a study or something else, or cannot be made. Nothing is overwritten.
        """
        check_sharing(config)
        if folder.is_dir():
            found = _listing(folder)
            if CONFIG_FILE in found:
                raise StudyError(f"{folder} holds a study already; go on with it by --resume, or take another folder")
            if found:
                raise StudyError(f"{folder} is not empty: it holds {_some(found)}; take a new or empty folder")
        with contextlib.ExitStack() as stack:
            _lock(folder, stack)
            if (folder / CONFIG_FILE).exists():
                raise StudyError(f"{folder} holds a study already; go on with it by --resume, or take another folder")
            config = _adopt_prompts(folder, config)
            (folder / RECORDS_FOLDER).mkdir(exist_ok=True)
            (folder / LOGS_FOLDER).mkdir(exist_ok=True)
            write_durably(folder / CONFIG_FILE, sources.dump(config))
            store = cls(folder, config, (), stack.pop_all())
            store._fresh = True
            return store
        raise AssertionError("unreachable")

    @classmethod
    def resume(cls, folder: Path, config: TuneConfig) -> Self:
        """Goes on with a study.

        Args:
            config: the settings wanted now; only those of `MAY_CHANGE` may differ from what was recorded.

        Raises:
            ConfigError: a shared study without a database that several processes can use.
            StudyError: there is no study, it is in use, a setting differs (says which), or a record is cut off.
        """
        recorded = read_config(folder)
        check_sharing(config)
        with contextlib.ExitStack() as stack:
            _lock(folder, stack)
            if config.workload.prompts_file is not None:
                config = _with_prompts(config, _sha256(_prompts_path(folder, config.workload)))
            changed = _changed(recorded, config)
            if changed:
                raise StudyError(
                    f"{folder} was started with other settings, and its records would not compare:\n  "
                    + "\n  ".join(changed)
                    + "\ntake another folder for these settings"
                )
            records = load_records(folder)
            (folder / RECORDS_FOLDER).mkdir(exist_ok=True)
            (folder / LOGS_FOLDER).mkdir(exist_ok=True)
            revision = recorded.model.revision
            if config.model.revision is None:
                config = _with_revision(config, revision)
            store = cls(folder, config, records, stack.pop_all())
            store._recorded_revision = revision if (folder / MACHINE_FILE).exists() else None
            # A revision that was given anew is not written before the fleet has shown that it is the recorded one.
            write_durably(folder / CONFIG_FILE, sources.dump(_with_revision(config, revision)))
            return store
        raise AssertionError("unreachable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.close()

    def discard_if_empty(self) -> None:
        """Takes a study away that was just made and recorded nothing: a corrected command may use the folder."""
        if self._records or not self._fresh:
            return
        for name in _FILES:
            (self.folder / name).unlink(missing_ok=True)
        for name in (RECORDS_FOLDER, LOGS_FOLDER):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.close()
        (self.folder / _LOCK_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    @property
    def records(self) -> tuple[Record, ...]:
        """All records of the study, in the order of their numbers."""
        return tuple(self._records)

    @property
    def has_measurements(self) -> bool:
        """Whether any record holds a measurement."""
        return any(isinstance(record.result, Measurement) for record in self._records)

    @property
    def log_dir(self) -> Path:
        """Folder of the workers' logs."""
        return self.folder / LOGS_FOLDER

    @property
    def reference_path(self) -> Path:
        """File of the unsplit model's tokens and logits."""
        return self.folder / REFERENCE_FILE

    @property
    def space_path(self) -> Path:
        """File of the search space."""
        return self.folder / SPACE_FILE

    @property
    def profile_path(self) -> Path:
        """File of the profile that plans are predicted from."""
        return self.folder / PROFILE_FILE

    @property
    def search_path(self) -> Path:
        """File of the search log."""
        return self.folder / SEARCH_FILE

    @property
    def warm_start_path(self) -> Path:
        """File of what earlier studies gave."""
        return self.folder / WARM_START_FILE

    @property
    def sharing_path(self) -> Path:
        """File that says who this folder is in a shared study."""
        return self.folder / SHARING_FILE

    @property
    def workload(self) -> Workload:
        """The workload as a fleet reads it: the prompts file by its full path."""
        workload = self.config.workload
        if workload.prompts_file is None:
            return workload
        return workload.model_copy(update={"prompts_file": str((self.folder / PROMPTS_FILE).resolve())})

    @property
    def storage_url(self) -> str:
        """URL of Optuna's database: the one that was given, or the study's own."""
        return self.config.storage or f"sqlite:///{(self.folder / DATABASE_FILE).resolve()}"

    def set_machine(self, machine: Machine, shape: ModelShape) -> tuple[str, ...]:
        """Records what the study runs on; on a resume demands equal hardware and an equal model.

        Returns:
            Software that differs from the recorded, to be said.

        Raises:
            StudyError: other hardware, or a model of another shape.
        """
        if not (self.folder / MACHINE_FILE).exists():
            write_durably(self.folder / SHAPE_FILE, shape.model_dump_json(indent=1))
            write_durably(self.folder / MACHINE_FILE, machine.model_dump_json(indent=1))
            return ()
        before = read(self.folder / MACHINE_FILE, Machine)
        if before.hardware_id != machine.hardware_id:
            raise StudyError(
                f"{self.folder} was measured on other hardware, and its records would not compare:\n  "
                + "\n  ".join(differences(before.hardware, machine.hardware))
                + "\ntake another folder on this machine"
            )
        if read(self.folder / SHAPE_FILE, ModelShape) != shape:
            raise StudyError(f"{self.folder} was measured with another model than {self.config.model.name} is now")
        return tuple(differences(before.software, machine.software))

    def set_revision(self, revision: str | None) -> None:
        """Pins the checkpoint that the fleet resolved; a resume demands the same.

        Raises:
            StudyError: the checkpoint changed since the study began.
        """
        recorded = self._recorded_revision
        if recorded is not None and revision != recorded:
            raise StudyError(
                f"{self.folder} was measured with revision {recorded} of {self.config.model.name}, "
                f"and it is now {revision}; take another folder"
            )
        self.config = _with_revision(self.config, revision)
        write_durably(self.folder / CONFIG_FILE, sources.dump(self.config))

    def add(self, record: Record) -> Record:
        """Writes a record under the next number; it is durable when this returns."""
        spec = record.spec
        if spec is not None and spec.workload.prompts_file is not None:
            # A folder may be moved: records name its own copy.
            spec = spec.model_copy(update={"workload": spec.workload.model_copy(update={"prompts_file": PROMPTS_FILE})})
        return self._write(record.model_copy(update={"number": self._next_number, "spec": spec}))

    def adopt(self, record: Record, *, source: str, source_devices: Sequence[str], trial_number: int) -> Record:
        """Writes a record that another process of the study measured, under a number of this folder; it is durable
        when this returns.

        Args:
            record: with this study's names for its devices.
            source: unique over all processes; see `Record.source`.
            trial_number: in the database that both use.
        """
        update = {
            "number": self._next_number,
            "trial_number": trial_number,
            "source": source,
            "source_devices": tuple(source_devices),
        }
        return self._write(record.model_copy(update=update))

    @property
    def _next_number(self) -> int:
        return self._records[-1].number + 1 if self._records else 0

    def _write(self, record: Record) -> Record:
        key = record.effective.key if record.effective is not None else None
        first = self._first_of_key.get(key) if key is not None else None
        record = record.model_copy(update={"replicate_of": first})
        path = self.folder / RECORDS_FOLDER / f"{record.number:04}.json"
        assert not path.exists(), f"record {record.number} is there already"
        write_durably(path, record.model_dump_json())
        self._records.append(record)
        if key is not None:
            self._first_of_key.setdefault(key, record.number)
        return record


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locks.hold(folder / _LOCK_FILE, str(folder), remedy="wait for it, or take another folder"))
    except OSError as error:
        raise StudyError(f"{folder}: cannot write a study there: {error.strerror or error}") from None


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith(_LOCK_FILE))
    except OSError as error:
        raise StudyError(f"{folder}: cannot be read: {error.strerror or error}") from None


def _adopt_prompts(folder: Path, config: TuneConfig) -> TuneConfig:
    """Copies the prompts into the study, which then stands on its own."""
    if config.workload.prompts_file is None:
        return config
    source = Path(config.workload.prompts_file)
    sha256 = _sha256(source)
    write_durably(folder / PROMPTS_FILE, source.read_text(encoding="utf-8"))
    return _with_prompts(config, sha256)


def _with_prompts(config: TuneConfig, sha256: str) -> TuneConfig:
    update = {"prompts_file": PROMPTS_FILE, "prompts_sha256": sha256}
    return config.model_copy(update={"workload": config.workload.model_copy(update=update)})


def _prompts_path(folder: Path, workload: Workload) -> Path:
    """The study's own copy when its recorded name is what came in, else the file that the user gave."""
    assert workload.prompts_file is not None
    given = Path(workload.prompts_file)
    return folder / PROMPTS_FILE if given == Path(PROMPTS_FILE) and workload.prompts_sha256 else given


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise StudyError(f"{path}: cannot read the prompts: {error.strerror or error}") from None


def _changed(recorded: TuneConfig, wanted: TuneConfig) -> list[str]:
    # `main` may be the commit that was recorded: the fleet finds out, and `set_revision` compares.
    lines = differences(recorded, _with_revision(wanted, recorded.model.revision))
    return [line for line in lines if line.partition(":")[0].partition(".")[0] not in MAY_CHANGE]


def _with_revision(config: TuneConfig, revision: str | None) -> TuneConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"revision": revision})})


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
