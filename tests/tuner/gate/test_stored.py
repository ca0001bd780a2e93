"""Stored baselines: what one session can tell, what three can, and every way in which something is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.record_factory import MODEL, WORKLOAD, make_machine, make_plan
from tests.study_factory import write_study
from tests.tuner.gate.factory import PLAN, make_sample
from tuner.cli import run
from tuner.gate.sessions import read_study
from tuner.gate.stored_rule import foreseen, judge_case
from tuner.gate.values import Finding, GateConfig, Reason, Session, Tolerance, Verdict

METRIC = "mean_ttft_ms"
LOTS = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def the_same_draws() -> None:
    """Of every test, whichever ran before."""
    LOTS.bit_generator.state = np.random.default_rng(0).bit_generator.state


def session(level: float, *, runs: int = 5, place: str = "now", sd: float = 0.01) -> Session:
    values = np.exp(LOTS.normal(math.log(level), sd, runs))
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


Change = Callable[[dict[str, Any]], None]


def write_benchmarks(path: Path, level: float, change: Change = lambda document: None) -> Path:
    """A file as `pytest bench/suite --benchmark-json` writes it, of two plans."""
    machine = make_machine().model_dump(mode="json")
    run_ = {"steady": True, "disturbances": [], "started_at": "2026-01-01T00:00:00+00:00", "wall_s": 9.0}

    def entry(name: str) -> dict[str, Any]:
        values = np.exp(LOTS.normal(math.log(level), 0.01, 6))
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
        (lambda document: None, 3, Reason.TOO_FEW),
        (gone, 3, Reason.MISSING_CANDIDATE),
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
    assert len(stored.session.samples) == 5
