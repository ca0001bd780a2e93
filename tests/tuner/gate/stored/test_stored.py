"""Stored baselines: what one session can tell, what three can, and every way in which something is missing."""

from __future__ import annotations

import io
import json
import math
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipetune.bench.errors import ConfigError
from pipetune.bench.record import FailureKind, Machine
from pipetune.bench.spec import ModelSpec, Plan, Workload
from pipetune.tuner.cli import run
from pipetune.tuner.config.gate import GateConfig, Tolerance
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.gate import python_env
from pipetune.tuner.gate.cases import SideRequest, case_of
from pipetune.tuner.gate.stored.read import read_stored, read_study
from pipetune.tuner.gate.stored.rule import SESSION_RUNS, foreseen, judge_case, out_of_time
from pipetune.tuner.gate.stored.run import compare_stored
from pipetune.tuner.gate.values import Case, Finding, GateResult, Reason, Sample, Session, Side, SideName, Verdict
from pipetune.tuner.progress import PlainReporter, Reporter
from tests.record_factory import MODEL, WORKLOAD, make_failure, make_machine, make_plan, make_study_records
from tests.study_factory import write_study
from tests.tuner.gate.factory import PLAN, make_sample
from tests.tuner.gate.fakes import Answer, FakeRunner

METRIC = "mean_ttft_ms"
DRAWS = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def the_same_draws() -> None:
    """Of every test, whichever ran before."""
    DRAWS.bit_generator.state = np.random.default_rng(0).bit_generator.state


def session(level: float, *, runs: int = 5, place: str = "now", sd: float = 0.01) -> Session:
    values = np.exp(DRAWS.normal(math.log(level), sd, runs))
    return Session(place=place, case="c", samples=tuple(make_sample({METRIC: float(value)}) for value in values))


def judged(stored: Sequence[Session], new: Session, **config: Any) -> Finding:
    return judge_case("c", {METRIC: Tolerance()}, stored, new, GateConfig(**config))[0]


@pytest.mark.parametrize("level", [50, 100, 108, 200])
def test_one_session_decides_nothing_by_itself_and_says_what_could_be_seen_at_most(level: float) -> None:
    found = judged([session(100)], session(level))
    assert (found.verdict, found.reason) == (Verdict.INCONCLUSIVE, Reason.TOO_FEW)
    assert "a true +5% would be found" in found.text
    assert found.estimate == pytest.approx(level / 100 - 1, abs=0.05)
    assert found.interval is None


@pytest.mark.parametrize(("level", "verdict"), [(99, Verdict.OK), (104, Verdict.INCONCLUSIVE), (112, Verdict.FAIL)])
def test_one_session_decides_by_the_noise_that_is_told(level: float, verdict: Verdict) -> None:
    told = judged([session(100, sd=0.001)], session(level, sd=0.001), session_noise=0.015)
    assert told.verdict is verdict
    assert "gate.session_noise" in told.text


def test_what_can_be_seen_is_said_before_anything_runs_and_after_every_verdict() -> None:
    stored = [session(level) for level in (100, 100.4, 99.7)]
    (line,) = foreseen({METRIC: Tolerance()}, stored, GateConfig())
    assert line.startswith(f"{METRIC}: the 3 stored sessions differ by 0.")
    assert "a true +5% is found" in line
    for level in (90, 103, 130):
        assert "a true +5% is found" in judged(stored, session(level)).text


def test_a_noise_floor_above_the_margin_passes_nothing() -> None:
    stored = [session(level, sd=0.001) for level in (100, 100.1, 99.9, 100.0)]
    assert judged(stored, session(100, sd=0.001), noise_floor=0.08).reason is Reason.UNFIT_MACHINE


def test_several_quiet_sessions_tell_more() -> None:
    stored = [session(level) for level in (100, 100.4, 99.7, 100.2, 99.9)]
    assert judged(stored, session(100, sd=0.001)).verdict is Verdict.OK
    assert judged(stored, session(106, sd=0.001)).verdict is Verdict.FAIL


def test_several_restless_sessions_say_that_they_cannot_tell() -> None:
    found = judged([session(level) for level in (90, 110, 97, 105)], session(106))
    assert (found.verdict, found.reason) == (Verdict.INCONCLUSIVE, Reason.NOT_TOLD)
    assert "+5%" in found.text


def test_memory_that_repeats_to_the_byte_is_decided_exactly() -> None:
    assert judged([session(100, sd=0.0)], session(100, sd=0.0)).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("stored", "new", "verdict", "reason"),
    [
        ([], session(100), Verdict.INCONCLUSIVE, Reason.MISSING_BASELINE),
        ([session(100, runs=0)], session(100), Verdict.INCONCLUSIVE, Reason.MISSING_BASELINE),
        ([session(100)], session(100, runs=0), Verdict.INCONCLUSIVE, Reason.MISSING_CANDIDATE),
    ],
)
def test_an_empty_side_is_never_ok(stored: list[Session], new: Session, verdict: Verdict, reason: Reason) -> None:
    found = judged(stored, new)
    assert (found.verdict, found.reason) == (verdict, reason)


def test_a_session_that_was_cut_short_says_so_of_what_its_few_runs_left_open() -> None:
    stored = [session(level) for level in (90, 110, 97, 105)]
    left_open = judge_case("c", {METRIC: Tolerance()}, stored, session(106, runs=2), GateConfig())
    (found,) = out_of_time(left_open, 2)
    assert (found.verdict, found.reason) == (Verdict.INCONCLUSIVE, Reason.OUT_OF_TIME)
    assert f"2 of {SESSION_RUNS} runs; give more --max-minutes" in found.text
    assert "a true +5% is found" in found.text
    quiet = [session(level) for level in (100, 100.4, 99.7, 100.2, 99.9)]
    decided = judge_case("c", {METRIC: Tolerance()}, quiet, session(130, runs=2), GateConfig())
    assert out_of_time(decided, 2) == decided
    assert decided[0].verdict is Verdict.FAIL


Change = Callable[[dict[str, Any]], None]


def unchanged(document: dict[str, Any]) -> None: ...


def write_benchmarks(path: Path, level: float, change: Change = unchanged) -> Path:
    """A file as `pytest pipetune/bench/suite --benchmark-json` writes it, of two plans."""
    machine = make_machine().model_dump(mode="json")
    run_ = {"steady": True, "disturbances": [], "started_at": "2026-01-01T00:00:00+00:00", "wall_s": 9.0}

    def entry(name: str) -> dict[str, Any]:
        values = np.exp(DRAWS.normal(math.log(level), 0.01, 6))
        runs = [{**run_, "metrics": {METRIC: float(value)}, "durations_s": [1.0]} for value in values]
        work = {"model": {"name": "tiny"}, "workload": {"num_prompts": 4}, "plan": PLAN.model_dump(mode="json")}
        extra = {**work, "machine": machine, "runs": runs}
        return {"name": name, "stats": {"data": [1.0] * 6}, "extra_info": extra}

    document = {"benchmarks": [entry("test_plan[old]"), entry("test_plan[new]")]}
    change(document)
    path.write_text(json.dumps(document))
    return path


def gone(document: dict[str, Any]) -> None:
    del document["benchmarks"][1]


def emptied(document: dict[str, Any]) -> None:
    document["benchmarks"].clear()


def no_runs(document: dict[str, Any]) -> None:
    document["benchmarks"][0]["extra_info"]["runs"] = []


def doubled(document: dict[str, Any]) -> None:
    document["benchmarks"][1]["name"] = document["benchmarks"][0]["name"]


def other_plan(document: dict[str, Any]) -> None:
    plan = Plan.from_layer_counts((1, 3), PLAN.devices, 2)
    document["benchmarks"][0]["extra_info"]["plan"] = plan.model_dump(mode="json")


def renamed(document: dict[str, Any]) -> None:
    for run_ in document["benchmarks"][0]["extra_info"]["runs"]:
        run_["metrics"] = {"ttft_mean": 1.0}


def not_a_number(document: dict[str, Any]) -> None:
    document["benchmarks"][0]["extra_info"]["runs"][2]["metrics"][METRIC] = math.nan


def other_work(document: dict[str, Any]) -> None:
    document["benchmarks"][0]["extra_info"]["workload"]["output_len"] = 99


def other_gpu(document: dict[str, Any]) -> None:
    document["benchmarks"][0]["extra_info"]["machine"]["hardware"]["cpu_model"] = "another"


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        (unchanged, 3, Reason.TOO_FEW),
        (gone, 3, Reason.MISSING_CANDIDATE),
        (no_runs, 3, Reason.MISSING_CANDIDATE),
        (other_plan, 3, Reason.TOO_FEW),
        (renamed, 3, Reason.MISSING_METRIC),
        (not_a_number, 3, Reason.NOT_FINITE),
        (other_gpu, 3, Reason.OTHER_HARDWARE),
        (other_work, 3, Reason.MISSING_BASELINE),
    ],
)
def test_what_slips_through_elsewhere_has_its_verdict_and_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, code: int, reason: Reason
) -> None:
    old, new = write_benchmarks(tmp_path / "old.json", 100), write_benchmarks(tmp_path / "new.json", 100, change)
    assert run(["gate", str(old), str(new), "--metric", METRIC, "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == code
    assert reason.value in {finding["reason"] for finding in document["findings"]}
    assert {finding["case"] for finding in document["findings"]} == {"test_plan[old]", "test_plan[new]"}


def test_a_benchmark_that_only_the_new_file_has_is_not_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = write_benchmarks(tmp_path / "old.json", 100, gone), write_benchmarks(tmp_path / "new.json", 100)
    assert run(["gate", str(old), str(new), "--metric", "ttft", "--json"]) == 3
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {one["reason"] for one in findings if one["case"] == "test_plan[new]"} == {"missing_baseline"}


def test_a_benchmark_of_which_the_old_file_has_no_run_is_not_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = write_benchmarks(tmp_path / "old.json", 100, no_runs), write_benchmarks(tmp_path / "new.json", 100)
    assert run(["gate", str(old), str(new), "--metric", METRIC, "--json"]) == 3
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {one["case"]: one["reason"] for one in findings} == {
        "test_plan[old]": "missing_baseline",
        "test_plan[new]": "too_few",
    }


@pytest.mark.parametrize(
    ("of_old", "of_new", "reason"),
    [
        (emptied, emptied, "missing_baseline"),
        (emptied, unchanged, "missing_baseline"),
        (unchanged, emptied, "missing_candidate"),
    ],
)
def test_a_file_without_a_benchmark_is_an_error_to_readers_of_junit_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], of_old: Change, of_new: Change, reason: str
) -> None:
    old, new = write_benchmarks(tmp_path / "o.json", 100, of_old), write_benchmarks(tmp_path / "n.json", 100, of_new)
    junit = tmp_path / "junit.xml"
    assert run(["gate", str(old), str(new), "--metric", METRIC, "--json", "--junit", str(junit)]) == 3
    assert reasons(capsys) == {reason}
    suites = ET.parse(junit).getroot().attrib
    assert int(suites["errors"]) == int(suites["tests"]) > 0


def test_two_benchmarks_of_one_name_are_inconclusive_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = write_benchmarks(tmp_path / "old.json", 100), write_benchmarks(tmp_path / "new.json", 100, doubled)
    assert run(["gate", str(old), str(new), "--metric", METRIC, "--json"]) == 3
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["reason"] == "unreadable"
    assert f"{new}: two benchmarks are called test_plan[old]" in finding["text"]


def test_what_differs_between_files_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def of_another_night(document: dict[str, Any]) -> None:
        for entry in document["benchmarks"]:
            entry["extra_info"]["machine"]["software"]["packages"]["torch"] = "2.11.0"
        document["benchmarks"][0]["extra_info"]["runs"][2]["disturbances"] = ["make (pid 5) took a core"]

    old = write_benchmarks(tmp_path / "old.json", 100)
    new = write_benchmarks(tmp_path / "new.json", 100, of_another_night)
    assert run(["gate", str(old), str(new), "--metric", METRIC, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["notes"] == [
        "software differs: packages.torch: 2.13.0+cpu → 2.11.0",
        "test_plan[old]: 1 of 6 new runs were disturbed, the first by make (pid 5) took a core",
    ]


def test_old_files_that_say_nothing_of_a_benchmark_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"whole.json": unchanged, "without.json": gone, "empty.json": no_runs, "new.json": unchanged}
    files = {name: str(write_benchmarks(tmp_path / name, 100, change)) for name, change in changes.items()}
    run(["gate", *files.values(), "--metric", METRIC, "--json"])
    assert json.loads(capsys.readouterr().out)["notes"] == [
        f"test_plan[old]: {files['empty.json']} is left out: there is no run in it",
        f"test_plan[new]: {files['without.json']} is left out: it lacks the benchmark",
    ]


def test_old_files_of_different_plans_do_not_pass_for_nights_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [write_benchmarks(tmp_path / "one.json", 100), write_benchmarks(tmp_path / "two.json", 100, other_plan)]
    new = write_benchmarks(tmp_path / "new.json", 100)
    assert run(["gate", *map(str, old), str(new), "--metric", METRIC, "--json"]) == 3
    finding = json.loads(capsys.readouterr().out)["findings"][0]
    assert (finding["case"], finding["reason"]) == ("test_plan[old]", "missing_baseline")
    assert f"{old[0]} and {old[1]}: 2+2 · micro-batch 2 → 1+3 · micro-batch 2" in finding["text"]


@pytest.mark.parametrize(("level", "code"), [(100, 0), (130, 1)])
def test_several_files_are_the_sessions_that_a_last_one_is_compared_with(
    tmp_path: Path, level: float, code: int
) -> None:
    old = [str(write_benchmarks(tmp_path / f"old{one}.json", 100 + one / 5)) for one in range(-2, 3)]
    new = write_benchmarks(tmp_path / "new.json", level)
    assert run(["gate", *old, str(new), "--metric", METRIC]) == code


@pytest.mark.parametrize(("level", "code"), [(100, 0), (200, 1)])
def test_a_config_tells_the_noise_of_sessions_to_files(tmp_path: Path, level: float, code: int) -> None:
    config = tmp_path / "gate.yaml"
    config.write_text("gate: {session_noise: 0.01}\n")
    old, new = write_benchmarks(tmp_path / "old.json", 100), write_benchmarks(tmp_path / "new.json", level)
    assert run(["gate", str(old), str(new), "--metric", METRIC, "--config", str(config)]) == code


def test_a_file_that_is_cut_off_is_inconclusive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write_benchmarks(tmp_path / "old.json", 100), write_benchmarks(tmp_path / "new.json", 100)
    old.write_text(old.read_text()[:-40])
    assert run(["gate", str(old), str(new), "--json"]) == 3
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {finding["reason"] for finding in findings} == {"unreadable"}
    assert "cut off" in findings[0]["text"]


def test_files_go_by_twos_and_by_themselves(tmp_path: Path) -> None:
    old = write_benchmarks(tmp_path / "old.json", 100)
    assert run(["gate", str(old)]) == 2
    assert run(["gate", str(old), str(old), "--baseline-plan", str(old)]) == 2


def candidate_plan(folder: Path, **changes: Any) -> str:
    """A plan file of the work that studies of `tests.study_factory` did, but for the changes."""
    values = {"model": MODEL.model_dump(mode="json"), "workload": WORKLOAD.model_dump(mode="json")}
    for key, value in changes.items():
        values[key] |= value
    path = folder / "plan.json"
    path.write_text(json.dumps({"plan": make_plan((15, 15), 16).model_dump(mode="json"), **values}))
    return str(path)


def reasons(capsys: pytest.CaptureFixture[str]) -> set[str]:
    return {finding["reason"] for finding in json.loads(capsys.readouterr().out)["findings"]}


def test_a_study_without_records_or_a_best_plan_is_inconclusive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "empty", ())
    assert run(["gate", "--stored", str(study), "--json"]) == 3
    assert reasons(capsys) == {"missing_baseline"}
    assert run(["gate", "--stored", str(study), "--candidate-plan", candidate_plan(tmp_path), "--json"]) == 3
    assert reasons(capsys) == {"missing_baseline"}


def test_a_study_of_other_hardware_is_inconclusive_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "study")
    assert run(["gate", "--stored", str(study), "--candidate-plan", candidate_plan(tmp_path), "--json"]) == 3
    assert reasons(capsys) == {"other_hardware"}


def here(**hardware: object) -> Machine:
    """This machine, but for what is said of its hardware."""
    machine = python_env.Interpreter().machine()
    assert machine is not None
    changed = machine.hardware.model_copy(update=hardware)
    return machine.model_copy(update={"hardware": changed, "hardware_id": changed.hardware_id})


@pytest.mark.parametrize(
    ("hardware", "reason"),
    [
        ({}, "out_of_time"),
        ({"cpu_model": "another"}, "other_hardware"),
        ({"gpus": make_machine(gpus=1).hardware.gpus}, "other_hardware"),
    ],
    ids=["equal", "cpu", "gpus"],
)
def test_any_other_hardware_is_inconclusive_and_equal_hardware_is_not_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hardware: dict[str, object], reason: str
) -> None:
    machine = here(**hardware)
    records = [record.model_copy(update={"hardware_id": machine.hardware_id}) for record in make_study_records()]
    study = write_study(tmp_path / "study", records, machine=machine)
    flags = ["--candidate-plan", candidate_plan(tmp_path), "--max-minutes", "0"]
    assert run(["gate", "--stored", str(study), *flags, "--json"]) == 3
    assert reasons(capsys) == {reason}


@pytest.mark.parametrize(("name", "within"), [("study.yaml", "\nprotocol:"), ("best_plan.json", '"model"')])
def test_a_study_whose_settings_or_best_plan_are_cut_off_is_refused_and_the_file_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, within: str
) -> None:
    study = write_study(tmp_path / "study")
    Path(candidate_plan(tmp_path)).rename(study / "best_plan.json")
    damaged = study / name
    text = damaged.read_text()
    damaged.write_text(text[: text.index(within) + 5])
    assert run(["gate", "--stored", str(study)]) == 2
    assert str(damaged) in capsys.readouterr().err.replace("\n", "")


def test_a_record_that_is_cut_off_is_inconclusive_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path / "study")
    record = study / "records" / "0003.json"
    record.write_text(record.read_text()[:-40])
    assert run(["gate", "--stored", str(study), "--candidate-plan", candidate_plan(tmp_path), "--json"]) == 3
    finding = json.loads(capsys.readouterr().out)["findings"][0]
    assert finding["reason"] == "unreadable"
    assert str(record) in finding["text"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"workload": {"output_len": 99}}, "workload.output_len"),
        ({"model": {"name": "another"}}, "model.name"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
    ],
)
def test_a_study_of_other_work_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    study = write_study(tmp_path / "study")
    assert run(["gate", "--stored", str(study), "--candidate-plan", candidate_plan(tmp_path, **changes)]) == 2
    assert told in capsys.readouterr().err.replace("\n", "")


def test_another_dtype_is_compared_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, plan = write_study(tmp_path / "study"), candidate_plan(tmp_path)
    assert (
        run(["gate", "--stored", str(study), "--candidate-plan", plan, "--candidate-dtype", "bfloat16", "--json"]) == 3
    )
    assert reasons(capsys) == {"other_hardware"}


def test_finals_are_the_session_of_a_study_and_runs_that_chose_the_plan_are_not(tmp_path: Path) -> None:
    stored = read_study(write_study(tmp_path / "study"))
    assert stored.plan is not None
    assert len(stored.samples) == 5


def asked(model: ModelSpec, workload: Workload, plan: Plan) -> SideRequest:
    config = TuneConfig(
        model=model,
        workload=workload,
        devices=plan.devices,
        gate=GateConfig(metrics={METRIC: Tolerance()}),
    )
    return SideRequest(Side(name="candidate", model=model, plan=plan, devices=plan.devices), config)


OF_STUDIES = asked(MODEL, WORKLOAD, make_plan((15, 15), 16))
OF_FILES = asked(ModelSpec(name="tiny"), Workload(num_prompts=4), PLAN)


class TimedRunner(FakeRunner):
    """Remembers how long each run was allowed to take."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.timeouts: list[float | None] = []

    def run(self, case: Case, name: SideName, *, check: bool, timeout_s: float | None = None) -> Sample:
        self.timeouts.append(timeout_s)
        return super().run(case, name, check=check, timeout_s=timeout_s)


def steady(case: Case, name: SideName, number: int) -> Sample:
    """On the machine that files and studies were made on."""
    return make_sample({METRIC: 100.0 + 0.1 * number}, hardware_id=make_machine().hardware_id)


def failing_late(case: Case, name: SideName, number: int) -> Sample:
    """The first run after the rehearsal takes more than a second, and fails."""
    if number == 1:
        time.sleep(1.1)
        return make_sample(failure=make_failure(FailureKind.TIMEOUT), hardware_id=make_machine().hardware_id)
    return steady(case, name, number).model_copy(update={"wall_s": 0.0})


def beside(
    *stored: Path,
    candidate: SideRequest = OF_FILES,
    answer: Answer = steady,
    max_minutes: float | None = None,
    reporter: Reporter | None = None,
) -> tuple[GateResult, TimedRunner]:
    """A gate of stored sessions whose candidate runs without processes."""
    runner = TimedRunner(answer)
    reporter = Reporter() if reporter is None else reporter
    result = compare_stored(stored, candidate, reporter, max_minutes=max_minutes, start=lambda cases: runner)
    assert not runner.open
    return result, runner


@pytest.fixture
def night(tmp_path: Path) -> Path:
    """A file of one benchmark."""
    return write_benchmarks(tmp_path / "old.json", 100, gone)


def test_a_candidate_is_rehearsed_and_runs_a_session(night: Path) -> None:
    result, runner = beside(night)
    assert [finding.reason for finding in result.findings] == [Reason.TOO_FEW]
    assert [check for *_, check in runner.asked] == [True, *[False] * SESSION_RUNS]
    assert runner.timeouts == [None] * (1 + SESSION_RUNS)
    assert len(result.sessions[-1].samples) == SESSION_RUNS


def test_no_minute_measures_nothing_and_says_so(night: Path) -> None:
    result, runner = beside(night, max_minutes=0.0)
    assert (result.exit_code, [finding.reason for finding in result.findings]) == (3, [Reason.OUT_OF_TIME])
    assert f"after 0 of {SESSION_RUNS} runs" in result.findings[0].text
    assert runner.asked == []


def test_no_run_may_take_longer_than_what_is_left_of_the_minutes(night: Path) -> None:
    _, runner = beside(night, max_minutes=10.0)
    timeouts = [timeout for timeout in runner.timeouts if timeout is not None]
    assert len(timeouts) == 1 + SESSION_RUNS
    assert 0 < min(timeouts) <= max(timeouts) <= 600
    assert timeouts == sorted(timeouts, reverse=True)


def test_a_run_that_would_not_fit_is_not_begun(night: Path) -> None:
    # The rehearsal took 12 s by its own word.
    result, runner = beside(night, max_minutes=0.1)
    assert [finding.reason for finding in result.findings] == [Reason.OUT_OF_TIME]
    assert len(runner.asked) == 1


@pytest.mark.parametrize(
    ("max_minutes", "code", "reason"), [(1 / 60, 3, Reason.OUT_OF_TIME), (10.0, 1, Reason.CANDIDATE_FAILED)]
)
def test_a_failure_is_held_against_the_candidate_unless_the_deadline_ended_it(
    night: Path, max_minutes: float, code: int, reason: Reason
) -> None:
    result, runner = beside(night, answer=failing_late, max_minutes=max_minutes)
    assert (result.exit_code, [finding.reason for finding in result.findings]) == (code, [reason])
    assert len(runner.asked) == 2


def test_a_run_that_says_nothing_of_the_candidate_ends_it_and_is_not_held_against_it(night: Path) -> None:
    def taken(case: Case, name: SideName, number: int) -> Sample:
        return make_sample({}, not_comparable="it did not get its GPU", hardware_id=make_machine().hardware_id)

    result, runner = beside(night, answer=taken)
    assert (result.exit_code, [finding.reason for finding in result.findings]) == (3, [Reason.NOT_COMPARABLE])
    assert len(runner.asked) == 1


def test_after_the_rehearsal_it_says_how_long_the_rest_takes(night: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    beside(night, max_minutes=30.0, reporter=PlainReporter(console))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert f"{SESSION_RUNS} runs of about 12 s: 1 min from here, and no more than 30 in all" in text
    assert text.index("rehearsal: ") < text.index("runs of about") < text.index("candidate 1 of")


def test_stored_studies_that_lack_the_plan_are_named_with_the_reason(tmp_path: Path) -> None:
    records = make_study_records()
    whole = write_study(tmp_path / "whole", records)
    key = read_study(whole).key
    others = [record for record in records if record.effective is None or record.effective.key != key]
    failed = [record.model_copy(update={"result": make_failure()}) for record in records]
    without, broken = write_study(tmp_path / "without", others), write_study(tmp_path / "broken", failed)
    result, _ = beside(whole, without, broken, candidate=OF_STUDIES)
    assert [finding.reason for finding in result.findings] == [Reason.TOO_FEW]
    assert result.notes == (
        f"{without} is left out: it has no run of {key}",
        f"{broken} is left out: every run of {key} failed there ({len(records) - len(others)})",
    )


def test_several_studies_need_a_first_one_that_names_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, study = write_study(tmp_path / "empty", ()), write_study(tmp_path / "study")
    flags = ["--stored", str(empty), "--stored", str(study), "--candidate-plan", candidate_plan(tmp_path)]
    assert run(["gate", *flags]) == 2
    assert f"--stored {empty}: no plan of this study" in capsys.readouterr().err.replace("\n", "")


def test_stored_files_of_different_plans_are_refused(night: Path, tmp_path: Path) -> None:
    def of_another_plan(document: dict[str, Any]) -> None:
        gone(document)
        other_plan(document)

    other = write_benchmarks(tmp_path / "other.json", 100, of_another_plan)
    case = case_of("default", OF_FILES, OF_FILES)
    assert len(read_stored((night, night), case)) == 2
    with pytest.raises(ConfigError) as refused:
        read_stored((night, other), case)
    assert f"{night} and {other}: 2+2 · micro-batch 2 → 1+3 · micro-batch 2" in str(refused.value)
