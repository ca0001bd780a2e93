"""A study's folder made of a shared database alone: for reports where no process's own folder is at hand."""

from pathlib import Path

import optuna

from pipetune.bench.errors import StudyError, explain
from pipetune.bench.files import write_durably
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.config.storage_url import shown
from pipetune.tuner.search.database import SHARED, naming_losses, open_storage
from pipetune.tuner.search.shared.joining import StudyKey
from pipetune.tuner.search.shared.participant import STUDY_KEY, members_of
from pipetune.tuner.search.shared.shared_study import records_of
from pipetune.tuner.study.files import StudyFile
from pipetune.tuner.study.store import StudyStore


def collect(url: str, name: str, folder: Path) -> int:
    """Writes what all processes of a shared study have measured into a new folder, and how many runs it is.

    The devices have the names that they have in the process that joined first. Baselines and single stages are each
    process's own, and stay in its folder. StudyError where the database cannot be used, or holds no such study or
    nothing measured, or the folder holds something.
    """
    with naming_losses(url):
        storage = open_storage(url)
        try:
            known = [one.removeprefix(SHARED) for one in optuna.get_all_study_names(storage) if one.startswith(SHARED)]
            if name not in known:
                there = ", ".join(known) or "none"
                raise StudyError(f"storage {shown(url)}: holds no shared study {name}; there are {there}")
            study = optuna.load_study(study_name=f"{SHARED}{name}", storage=storage)
            attributes, trials = study.user_attrs, study.get_trials(deepcopy=False)
        finally:
            storage.engine.dispose()
    devices = tuple(next((member["devices"] for member in members_of(attributes)), ()))
    if not (records := list(records_of(trials, devices))):
        raise StudyError(f"storage {shown(url)}: nothing has been measured in {name} yet")
    try:
        key = StudyKey.model_validate(attributes[STUDY_KEY])
    except ValueError as error:
        raise StudyError(f"storage {shown(url)}: {name} is of another version of pipetune ({explain(error)})") from None
    workload = key.workload.model_copy(update={"prompts_file": None})
    alike = {name: getattr(key, name) for name in ("model", "protocol", "objectives", "constraints", "space")}
    config = TuneConfig(**alike, workload=workload, devices=devices)
    with StudyStore.create(folder, config) as store:
        # The prompts are in the processes' folders.
        write_durably(folder / StudyFile.CONFIG, sources.dump(config.model_copy(update={"workload": key.workload})))
        for source, ran_on, number, record in records:
            store.adopt(record, source=source, source_devices=ran_on, trial_number=number)
    return len(records)
