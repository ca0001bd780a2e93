"""results/README.md names every file, field, kind, column and metric; a new one without a definition fails here."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from pipetune.bench.memory import LayerShape, ModelShape
from pipetune.bench.metrics import metric_names
from pipetune.bench.profile import ContentionProfile, DeviceProfile, LayerTimes, LinkProfile, Profile, TaskTime
from pipetune.bench.record import (
    DeviceState,
    Failure,
    FailureKind,
    GpuInfo,
    Hardware,
    Iteration,
    Machine,
    Measurement,
    OutputCheck,
    Record,
    RequestTimes,
    Software,
    StageMemory,
    StageTrace,
    TaskShape,
    Telemetry,
)
from pipetune.bench.spec import (
    Arrivals,
    EffectivePlan,
    EngineSettings,
    ModelSpec,
    Plan,
    Protocol,
    RunSpec,
    Sampling,
    StagePlan,
    Value,
    Workload,
)
from pipetune.tuner.config.gate import GateConfig, Tolerance
from pipetune.tuner.config.schema import EngineConfig, SpaceConfig, TuneConfig
from pipetune.tuner.gate.values import Case, Finding, GateResult, LookTaken, Pair, Sample, Session, Side
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.files import write_report
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.files import load_study
from pipetune.tuner.study.plan_file import PlanFile
from pipetune.tuner.study.search_log import LoggedTrial, SearchLog, Stop
from tests.study_factory import make_log, make_profile, write_study

README = (Path(__file__).parents[3] / "results" / "README.md").read_text(encoding="utf-8")

SECTIONS: dict[type[Value], str] = {
    **{
        model: model.__name__
        for model in (
            Record,
            Measurement,
            TaskShape,
            Iteration,
            RequestTimes,
            StageTrace,
            StageMemory,
            OutputCheck,
            Telemetry,
            DeviceState,
            Failure,
            RunSpec,
            ModelSpec,
            Workload,
            Arrivals,
            Sampling,
            Plan,
            EngineSettings,
            StagePlan,
            EffectivePlan,
            Protocol,
            Machine,
            Hardware,
            Software,
            ModelShape,
            SearchSpace,
            SearchLog,
            TuneConfig,
            PlanFile,
        )
    },
    **dict.fromkeys((Profile, DeviceProfile, LayerTimes, TaskTime, LinkProfile, ContentionProfile), "Profile"),
    GpuInfo: "Hardware",
    LayerShape: "ModelShape",
    **dict.fromkeys((SpaceConfig, EngineConfig, GateConfig, Tolerance), "TuneConfig"),
    **dict.fromkeys((GateResult, Finding, LookTaken, Case, Pair, Session, Sample, Side), "Gate"),
    LoggedTrial: "SearchLog",
    Stop: "SearchLog",
}


def text_under(heading: str) -> str:
    """What stands between a heading and the next."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", README, re.DOTALL | re.MULTILINE)
    assert match is not None, f"no heading {heading!r}"
    return match[1]


def names_under(heading: str) -> set[str]:
    """What stands in backticks there."""
    return set(re.findall(r"`([^`]+)`", text_under(heading)))


@pytest.mark.parametrize("model", SECTIONS, ids=lambda model: model.__name__)
def test_every_field_is_defined(model: type[Value]) -> None:
    assert set(model.model_fields) <= names_under(SECTIONS[model])


def test_every_kind_of_failure_is_defined() -> None:
    assert {kind.value for kind in FailureKind} <= names_under("Failure")


def test_every_metric_is_defined_and_no_other() -> None:
    first_cells = re.findall(r"^\| (`.*?) \|", text_under("Metrics"), re.MULTILINE)
    defined = set(re.findall(r"`(\w+)`", " ".join(first_cells)))
    assert defined == set(metric_names(1000, 1000, gpu=True, goodput=True, arrivals=True, rates=True))


@pytest.mark.slow
def test_every_file_and_column_of_a_report_is_defined(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", log=make_log(), profile=make_profile())
    write_report(Report.of(load_study(folder)))
    files = names_under("What a study holds")
    for path in folder.iterdir():
        assert path.name in files or any(name.startswith(f"{path.name}/") for name in files)
    header = next(csv.reader(io.StringIO((folder / "ranking.csv").read_text(encoding="utf-8"))))
    undefined = set(header) - names_under("ranking.csv") - set(metric_names(1000, 1000, gpu=True))
    assert not undefined
