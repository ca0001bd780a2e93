"""Stored sessions, and whether they did the same work: runs of a study's best plan, or of a file's benchmarks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipetune.bench.errors import ConfigError, StudyError, explain
from pipetune.bench.prompts.file import read_text, sha256_of
from pipetune.bench.record import Machine, Measurement
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Workload
from pipetune.tuner.config.sources import differences
from pipetune.tuner.gate.runners import sample_of
from pipetune.tuner.gate.values import Case, Sample, Session
from pipetune.tuner.report.data import Report
from pipetune.tuner.study.files import load_study, written_by


class Stored(Session):
    """A session and the work that it did; of a result, only what is a session's is written."""

    model: ModelSpec
    workload: Workload
    plan: Plan | None = None
    """None where no plan of a study has a rank."""
    key: str | None = None
    """Key of the effective plan, in a study."""
    of_study: bool = False
    empty_because: str | None = None
    """Why the session is empty; None where it is not."""


def read_stored(places: Sequence[Path], case: Case, *, other_dtype: bool = False) -> tuple[Stored, ...]:
    """Stored sessions of a case, of another dtype where that is compared; of studies, all of the first one's best plan.
    StudyError: a place that holds no session that can be read; ConfigError: it did other work, or another plan than the
    places before it, or the first study has no best plan."""
    found: list[Stored] = []
    key: str | None = None
    for place in places:
        if place.is_file():
            benchmarks = list(read_benchmarks(place).values())
            if len(benchmarks) != 1:
                raise ConfigError(
                    f"--stored {place}: holds {len(benchmarks)} benchmarks; give a file of one, or two files to compare"
                )
            one = benchmarks[0]
        else:
            one = read_study(place, key=key)
            key = one.key
            if key is None and not found and len(places) > 1:
                raise ConfigError(
                    f"--stored {place}: no plan of this study, the first, has a rank, so that none is named whose "
                    "sessions the others hold; leave it out, or give another one first"
                )
        if other := other_work([one], case.candidate.model, case.workload, other_dtype=other_dtype):
            raise ConfigError(
                f"--stored {place}: other work was measured there than is asked for now ({other}); give the same by "
                "flags, or by a --config; another dtype is compared by --candidate-dtype"
            )
        found.append(one.model_copy(update={"case": case.name}))
    if other := other_plans(found):
        raise ConfigError(f"--stored: the sessions are of different plans ({other}); give those of one plan")
    return tuple(found)


def read_study(folder: Path, *, key: str | None = None) -> Stored:
    """A stored study's session of the plan of that key, by default of its best one. A plan's finals are taken where it
    has any: luck helped to choose it by its other runs, and they flatter it. StudyError: the folder holds no study, or
    a file of it is cut off: a gate passes over no run."""
    study = load_study(folder)
    if study.unread:
        raise StudyError(study.unread[0])
    if key is None:
        best = Report.of(study).ranking.best
        key = best.key if best is not None else None
    tried = [record for record in study.records if record.effective is not None and record.effective.key == key]
    measured = [record for record in tried if isinstance(record.result, Measurement)]
    runs = [record for record in measured if record.role == "finalist"] or measured
    why = f"every run of {key} failed there ({len(tried)})" if tried else f"it has no run of {key}"
    return Stored(
        place=str(folder),
        case="",
        samples=tuple(map(sample_of, runs)),
        machine=study.machine,
        model=study.config.model,
        workload=study.config.workload,
        plan=runs[0].spec.plan if runs and runs[0].spec is not None else None,
        key=key,
        of_study=True,
        empty_because=None if runs else why if key is not None else "no plan of it has a rank",
    )


def read_benchmarks(path: Path) -> dict[str, Stored]:
    """Sessions of a file that `pytest pipetune/bench/suite --benchmark-json` wrote, by the benchmark's name.
    StudyError: it cannot be read, is cut off, or has two benchmarks of one name; ConfigError: it is another tool's."""
    try:
        found = [_stored(path, entry) for entry in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]]
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if tool := written_by(path):
            raise ConfigError(
                f"{path}{tool}: a gate reads files of `pytest pipetune/bench/suite --benchmark-json`, or --stored STUDY"
            ) from None
        what = f"there is no {error}" if isinstance(error, KeyError) else explain(error)
        raise StudyError(f"{path}: is cut off, or of another `pytest pipetune/bench/suite`: {what}") from None
    names = [one.case for one in found]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise StudyError(f"{path}: two benchmarks are called {doubled[0]}; give each plan a name of its own")
    return dict(zip(names, found, strict=True))


def other_work(stored: Sequence[Stored], model: ModelSpec, workload: Workload, *, other_dtype: bool = False) -> str:
    """What sets the stored work apart, in words; empty where it is the same. Of the model its name and dtype: its
    revision, its attention kernel and the like may be what is compared, and are only shown. Prompts are the same if
    what they say is, wherever the file lies."""
    keys = {"name"} if other_dtype else {"name", "dtype"}
    lines: list[str] = []
    for one in stored:
        lines += [f"model.{line}" for line in _model_lines(one.model, model) if line.partition(":")[0] in keys]
        lines += [f"workload.{line}" for line in differences(_by_content(one.workload), _by_content(workload))]
    return "; ".join(dict.fromkeys(lines))


def other_plans(stored: Sequence[Stored]) -> str:
    """Which two of the stored sessions are of different plans, and of which; empty where all are of one. A study is
    asked for an effective plan, in which caps that come to the same are one; a file does not say to what its plan's
    caps came."""
    plans = [(one, one.plan) for one in stored if one.plan is not None]
    for one, plan in plans[1:]:
        first, its_plan = plans[0]
        uncapped, its_uncapped = (EffectivePlan(plan=each, in_flight=1).key for each in (plan, its_plan))
        if plan != its_plan and not ((first.of_study or one.of_study) and uncapped == its_uncapped):
            texts = [its_plan.describe(), plan.describe()]
            what = " → ".join(texts) if texts[0] != texts[1] else "; ".join(differences(its_plan, plan))
            return f"{first.place} and {one.place}: {what}"
    return ""


def _called(model: ModelSpec) -> str:
    """Its id, or of a folder the last part of its path: a copy of it elsewhere is the model, or its next version."""
    return Path(model.name).name if Path(model.name).is_absolute() else model.name


def _model_lines(stored: ModelSpec, now: ModelSpec) -> list[str]:
    """A revision or a dtype that is not known yet is none that differs."""
    unknown = {"revision": None in (stored.revision, now.revision), "dtype": "auto" in (stored.dtype, now.dtype)}
    stored, now = (one.model_copy(update={"name": _called(one)}) for one in (stored, now))
    return [line for line in differences(stored, now) if not unknown.get(line.partition(":")[0])]


def _by_content(workload: Workload) -> Workload:
    path, sha256 = workload.prompts_file, workload.prompts_sha256
    if path is not None and sha256 is None and Path(path).is_file():
        sha256 = sha256_of(read_text(path))
    return workload.model_copy(update={"prompts_file": None, "prompts_sha256": sha256})


def notes_of(stored: Sequence[Stored], new: Session, model: ModelSpec | None) -> list[str]:
    """Notes on one case: which stored sessions hold nothing, and what differs and is no reason not to compare."""
    lines = [f"{one.place} is left out: {one.empty_because}" for one in stored if one.empty_because is not None]
    used = [one for one in stored if one.samples]
    for one in used:
        if model is not None:
            lines += [f"model differs: {line}" for line in _model_lines(one.model, model)]
        then, now = one.machine, new.machine
        if then is not None and now is not None:
            lines += [f"software differs: {line}" for line in differences(then.software, now.software)]
    for side, runs in (("stored", tuple(run for one in used for run in one.samples)), ("new", new.samples)):
        if disturbed := [run.disturbances[0] for run in runs if run.disturbances]:
            lines.append(f"{len(disturbed)} of {len(runs)} {side} runs were disturbed, the first by {disturbed[0]}")
    return list(dict.fromkeys(lines))


def _stored(path: Path, entry: dict[str, Any]) -> Stored:
    extra = entry["extra_info"]
    machine = Machine.model_validate(extra["machine"])
    hardware_id = machine.hardware.hardware_id
    samples = tuple(Sample.model_validate({**run, "hardware_id": hardware_id}) for run in extra["runs"])
    return Stored(
        place=str(path),
        case=str(entry["name"]),
        samples=samples,
        machine=machine,
        model=ModelSpec.model_validate(extra["model"]),
        workload=Workload.model_validate(extra["workload"]),
        plan=Plan.model_validate(extra["plan"]),
        empty_because=None if samples else "there is no run in it",
    )
