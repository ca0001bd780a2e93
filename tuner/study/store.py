"""The study folder: settings, machine and records on disk; the records are the truth, each one whole or not there."""

import contextlib
import datetime as dt
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pipetune.bench.errors import StudyError
from pipetune.bench.files import write_durably
from pipetune.bench.fleet import locks
from pipetune.bench.fleet.fleet import Closing
from pipetune.bench.memory import ModelShape
from pipetune.bench.prompts.file import read_text, sha256_of
from pipetune.bench.record import Failure, Machine, Record
from pipetune.bench.spec import Workload
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import STUDY_NAME, TuneConfig
from pipetune.tuner.config.storage_url import check_sharing, sqlite_url
from pipetune.tuner.study import files
from pipetune.tuner.study.files import StudyFile
from pipetune.tuner.study.losses import Loss

_LOCK_FILE = ".lock"
_FOLDERS = (files.RECORDS_FOLDER, files.LOGS_FOLDER)

MAY_CHANGE = {
    *("name", "output_dir", "profile", "warm_start", "n_trials", "timeout_s", "stop_early", "on_device_loss"),
    *("finalists", "finalist_rounds", "max_finalist_rounds", "storage", "shared_study", "device_names"),
    *("gate", "prices"),
}
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


class StudyStore(Closing):
    """The one writer of a study folder; holds its lock from `create` or `resume` until `close`."""

    def __init__(self, folder: Path, config: TuneConfig, records: Sequence[Record], lock: contextlib.ExitStack) -> None:
        self.folder = folder
        self.losses = files.read_losses(folder)
        self._config = config
        self._records = list(records)
        self._fresh = False
        self._recorded_revision: str | None = None
        for name in _FOLDERS:
            (folder / name).mkdir(exist_ok=True)
        self._lock = lock.pop_all()

    @classmethod
    def create(cls, folder: Path, config: TuneConfig) -> Self:
        """Starts a study in a new or empty folder; the config's devices are resolved, and a prompts file is copied into
        it. ConfigError: a shared study without a database that several processes can use, or prompts not to be read;
        StudyError: the folder holds a study or something else, or cannot be made. Nothing is overwritten."""
        check_sharing(config)
        taken = StudyError(f"{folder} holds a study already; go on with it by --resume, or take another folder")
        if folder.is_dir():
            found = sorted(path.name for path in folder.iterdir() if not path.name.startswith(_LOCK_FILE))
            if StudyFile.CONFIG in found:
                raise taken
            if found:
                names = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
                raise StudyError(f"{folder} is not empty: it holds {names}; take a new or empty folder")
        with contextlib.ExitStack() as stack:
            _lock(folder, stack)
            if (folder / StudyFile.CONFIG).exists():
                raise taken
            prompts = None
            if config.workload.prompts_file is not None:
                # The study stands on its own.
                prompts = read_text(config.workload.prompts_file)
                config = _with_prompts(config, prompts)
            store = cls(folder, config, (), stack)
        store._fresh = True
        try:
            if prompts is not None:
                write_durably(folder / StudyFile.PROMPTS, prompts)
            write_durably(folder / StudyFile.CONFIG, sources.dump(config))
        except OSError:
            store.discard_if_empty()
            raise
        return store

    @classmethod
    def resume(cls, folder: Path, config: TuneConfig) -> Self:
        """Goes on with a study, by the settings wanted now; only those of `MAY_CHANGE` may differ from what was
        recorded. ConfigError: a shared study without a database that several processes can use, or prompts not to be
        read; StudyError: there is no study, it is in use, a setting differs (says which), or a record is cut off."""
        recorded = files.read_config(folder)
        in_place = (_LOCK_FILE, *_FOLDERS, f"{StudyFile.DATABASE}*", f"{files.LOGS_FOLDER}/*")
        files.refuse_links(path for name in in_place for path in folder.glob(name))
        if odd := [name for name in StudyFile if (folder / name).exists() and not (folder / name).is_file()]:
            raise StudyError(f"{folder / odd[0]}: is no regular file; take it away")
        check_sharing(config)
        with contextlib.ExitStack() as stack:
            _lock(folder, stack)
            if config.workload.prompts_file is not None:
                given = Path(config.workload.prompts_file)
                # Where its recorded name came in, the study's own copy.
                is_own = given == Path(StudyFile.PROMPTS) and config.workload.prompts_sha256
                config = _with_prompts(config, read_text(folder / given if is_own else given))
            # `main` may be the commit that was recorded: the fleet finds out, and `set_revision` compares.
            now = _with_revision(config, recorded.model.revision, recorded.model.dtype)
            before = recorded
            if Path(now.model.name).is_absolute():
                # A folder may have moved: it is known by its content, which the fleet compares as well.
                before, now = (one.model_copy(update={"model": one.model.by_content}) for one in (recorded, now))
            changed = sources.differences(before, now)
            changed = [line for line in changed if line.partition(":")[0].partition(".")[0] not in MAY_CHANGE]
            if changed:
                raise StudyError(
                    f"{folder} was started with other settings, and its records would not compare:\n  "
                    + "\n  ".join(changed)
                    + "\ntake another folder for these settings"
                )
            revision = recorded.model.revision
            config = _with_revision(config, config.model.revision or revision, recorded.model.dtype)
            store = cls(folder, config, files.load_records(folder), stack)
        store._recorded_revision = revision if (folder / StudyFile.MACHINE).exists() else None
        # A revision that was given anew is not written before the fleet has shown that it is the recorded one.
        write_durably(folder / StudyFile.CONFIG, sources.dump(_with_revision(config, revision)))
        return store

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.close()

    def discard_if_empty(self) -> None:
        """Takes a study away that was just made and recorded nothing: a corrected command may use the folder."""
        if self._records or not self._fresh:
            return
        for file in StudyFile:
            (self.folder / file).unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.close()
        (self.folder / _LOCK_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    @property
    def config(self) -> TuneConfig:
        """The settings, over the devices that are left."""
        return self.losses.narrowed(self._config)

    @property
    def records(self) -> tuple[Record, ...]:
        """All records of the study, in the order of their numbers."""
        return tuple(self._records)

    @property
    def current(self) -> tuple[Record, ...]:
        """Those of the devices that are left, which alone compare."""
        return self.losses.current(self._records)

    def path(self, name: StudyFile) -> Path:
        """A file of which every set of devices has its own."""
        return self.losses.path(self.folder, name)

    def go_on_without(self, device: str, failure: Failure) -> Loss:
        """Strikes a device off for the rest of the study, durably."""
        number = self._records[-1].number + 1 if self._records else 0
        loss = Loss(device=device, devices=self.config.concrete_devices, first_record=number, failure=failure)
        self.losses = self.losses.model_copy(update={"losses": (*self.losses.losses, loss)})
        write_durably(self.folder / StudyFile.LOSSES, self.losses.model_dump_json(indent=1) + "\n")
        return loss

    @property
    def workload(self) -> Workload:
        """The workload as a fleet reads it: the prompts file by its full path."""
        workload = self.config.workload
        if workload.prompts_file is None:
            return workload
        return workload.model_copy(update={"prompts_file": str((self.folder / StudyFile.PROMPTS).resolve())})

    @property
    def storage_url(self) -> str:
        """URL of Optuna's database: the one that was given, or the study's own."""
        return self.config.storage or sqlite_url((self.folder / StudyFile.DATABASE).resolve())

    def set_machine(self, machine: Machine, shape: ModelShape) -> tuple[str, ...]:
        """Records what the study runs on; on a resume demands equal hardware and an equal model (StudyError), and gives
        the software that differs from the recorded, to be said."""
        path = self.path(StudyFile.MACHINE)
        if not path.exists():
            write_durably(self.folder / StudyFile.SHAPE, shape.model_dump_json(indent=1))
            write_durably(path, machine.model_dump_json(indent=1))
            return ()
        before = files.read(path, Machine)
        if before.hardware_id != machine.hardware_id:
            raise StudyError(
                f"{self.folder} was measured on other hardware, and its records would not compare:\n  "
                + "\n  ".join(sources.differences(before.hardware, machine.hardware))
                + "\ntake another folder on this machine"
            )
        if files.read(self.folder / StudyFile.SHAPE, ModelShape) != shape:
            raise StudyError(f"{self.folder} was measured with another model than {self.config.model.name} is now")
        return tuple(sources.differences(before.software, machine.software))

    def set_revision(self, revision: str | None, dtype: str = "auto") -> None:
        """Pins the checkpoint that the fleet resolved, and the dtype where it was left open; a resume demands the same.
        StudyError: the checkpoint changed since the study began."""
        recorded = self._recorded_revision
        if recorded is not None and revision != recorded:
            raise StudyError(
                f"{self.folder} was measured with revision {recorded} of {self.config.model.name}, "
                f"and it is now {revision}; take another folder"
            )
        self._config = _with_revision(self._config, revision, dtype)
        write_durably(self.folder / StudyFile.CONFIG, sources.dump(self._config))

    def add(self, record: Record) -> Record:
        """Writes a record under the next number; it is durable when this returns."""
        spec = record.spec
        if spec is not None and spec.workload.prompts_file is not None:
            # A folder may be moved: records name its own copy.
            workload = spec.workload.model_copy(update={"prompts_file": StudyFile.PROMPTS.value})
            spec = spec.model_copy(update={"workload": workload})
        return self._write(record.model_copy(update={"spec": spec}))

    def adopt(self, record: Record, *, source: str, source_devices: Sequence[str], trial_number: int) -> Record:
        """Writes a record that another process of the study measured, as `add` does: with this study's names for its
        devices, a source unique over all processes (see `Record.source`), and the trial's number in the database that
        both use."""
        origin = {"trial_number": trial_number, "source": source, "source_devices": tuple(source_devices)}
        return self._write(record.model_copy(update=origin))

    def _write(self, record: Record) -> Record:
        number = self._records[-1].number + 1 if self._records else 0
        key = record.effective and record.effective.key
        alike = (one.number for one in self._records if key and one.effective and one.effective.key == key)
        record = record.model_copy(update={"number": number, "replicate_of": next(alike, None)})
        path = self.folder / files.RECORDS_FOLDER / f"{record.number:04}.json"
        assert not path.exists(), f"record {record.number} is there already"
        write_durably(path, record.model_dump_json())
        self._records.append(record)
        return record


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locks.hold(folder / _LOCK_FILE, str(folder), remedy="wait for it, or take another folder"))


def _with_prompts(config: TuneConfig, text: str) -> TuneConfig:
    update = {"prompts_file": StudyFile.PROMPTS.value, "prompts_sha256": sha256_of(text)}
    return config.model_copy(update={"workload": config.workload.model_copy(update=update)})


def _with_revision(config: TuneConfig, revision: str | None, dtype: str = "auto") -> TuneConfig:
    update = {"revision": revision} | ({"dtype": dtype} if config.model.dtype == "auto" else {})
    return config.model_copy(update={"model": config.model.model_copy(update=update)})
