"""Nights in order, levels that changed with what else did, and studies that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipetune.tuner.cli import run
from pipetune.tuner.report.data import BASELINE_NAME
from pipetune.tuner.report.history.files import read_history
from pipetune.tuner.report.history.series import BEST
from pipetune.tuner.report.history.values import History, LevelChange, Series
from pipetune.tuner.report.history.wording import sparkline
from pipetune.tuner.study.files import StudyFile
from pipetune.tuner.study.search_log import SearchLog
from tests.record_factory import make_machine
from tests.tuner.report.compare.studies import EVEN, UNEVEN, write_night


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen nights; from the ninth on torch is another and all is 15 % slower. Written out of order."""
    folder = tmp_path_factory.mktemp("nights")
    machine = make_machine()
    software = machine.software.model_copy(
        update={"packages": {**machine.software.packages, "torch": "9.9.9"}, "git_revision": "f" * 40}
    )
    newer = machine.model_copy(update={"software": software})
    for night in reversed(range(16)):
        drift = 1.0 if night < 8 else 1.15
        write_night(
            folder / f"night-{night:02}",
            {UNEVEN: drift, EVEN: 1.3 * drift},
            seed=100 * night,
            rounds=3,
            machine=machine if night < 8 else newer,
            started_at=f"2026-01-{night + 1:02}T02:00:00+00:00",
        )
    return folder


def test_a_level_that_changed_is_found_with_what_else_changed(nights: Path) -> None:
    (question,) = read_history([nights]).questions
    assert [night.study for night in question.nights] == [f"night-{night:02}" for night in range(16)]
    best = next(one for one in question.series if (one.subject, one.metric) == (BEST, "output_throughput"))
    (change,) = best.changes
    assert abs(change.night - 8) <= 1
    assert change.is_worse
    assert change.share == pytest.approx(1 / 1.15 - 1, abs=0.03)
    if change.night == 8:
        assert any("torch 9.9.9" in text for text in change.also_changed)
    ttft = next(one for one in question.series if (one.subject, one.metric) == (BEST, "mean_ttft_ms"))
    assert [one.is_worse for one in ttft.changes] == [True]


def test_a_study_whose_search_has_not_ended_is_no_night(tmp_path: Path) -> None:
    write_night(tmp_path / "ended", {UNEVEN: 1.0, EVEN: 1.3})
    running = write_night(tmp_path / "running", {UNEVEN: 1.0, EVEN: 1.3}, seed=9)
    (running / StudyFile.SEARCH).write_text(SearchLog().model_dump_json())
    found = read_history([tmp_path])
    assert [night.study for question in found.questions for night in question.nights] == ["ended"]
    (why,) = found.skipped
    assert "running: its search has not ended" in why


def test_the_baseline_and_plans_run_often_are_series_of_their_own(nights: Path) -> None:
    (question,) = read_history([nights], ["output_throughput"]).questions
    assert {one.subject for one in question.series} == {BEST, BASELINE_NAME, EVEN.describe()}, (
        "what is always best is no series twice"
    )
    baseline = next(one for one in question.series if one.subject == BASELINE_NAME)
    assert baseline.changes == ()


def test_a_study_that_cannot_be_read_is_named_and_ends_nothing(nights: Path, tmp_path: Path) -> None:
    good = write_night(tmp_path / "good")
    broken = write_night(tmp_path / "broken")
    (broken / "machine.json").write_text("{")
    found = read_history([good, broken])
    assert len(found.questions) == 1
    assert len(found.skipped) == 1
    assert "machine.json" in found.skipped[0]


def test_the_command_prints_writes_and_refuses(
    nights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["history", str(nights), "-o", str(tmp_path / "out"), "--metric", "output_throughput"]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "worse" in shown
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"history.json", "history.md", "history.html", "1-output_throughput.png"}
    assert run(["history", str(nights), "--json"]) == 0
    assert History.model_validate(json.loads(capsys.readouterr().out)).questions
    assert run(["history", str(tmp_path / "nowhere")]) == 2
    assert run(["history", str(nights), "--metric", "speed"]) == 2
    assert run(["history", str(tmp_path / "out")]) == 3


def test_nights_of_two_machines_are_two_questions_and_equal_times_keep_an_order(tmp_path: Path) -> None:
    hardware = make_machine().hardware.model_copy(update={"cpu_model": "Other CPU"})
    other = make_machine().model_copy(update={"hardware": hardware, "hardware_id": hardware.hardware_id})
    for night in range(4):
        write_night(tmp_path / f"night-{night}", seed=night, machine=other if night % 2 else None)
    found = read_history([tmp_path])
    assert [[night.study for night in question.nights] for question in found.questions] == [
        ["night-0", "night-2"],
        ["night-1", "night-3"],
    ]
    assert all(series.changes == () for question in found.questions for series in question.series)


def test_a_metric_that_some_nights_lack_is_placed_by_the_nights_that_have_it(tmp_path: Path) -> None:
    for night in range(10):
        folder = write_night(
            tmp_path / f"night-{night}", started_at=f"2026-01-{night + 1:02}T02:00:00+00:00", seed=night
        )
        if night in (2, 5):
            for path in (folder / "records").iterdir():
                record = json.loads(path.read_text())
                record["result"]["memory"] = []
                path.write_text(json.dumps(record))
    (question,) = read_history([tmp_path], ["peak_memory_bytes"]).questions
    assert question.series[0].nights == (0, 1, 3, 4, 6, 7, 8, 9)


@pytest.mark.parametrize("values", [(0.0,) * 8, (-0.1, 0.0, 0.2, -0.05), (5.0,), (1e9, 1e9 + 1)])
def test_bars_of_any_values_can_be_drawn(values: tuple[float, ...]) -> None:
    series = Series(metric="bubble_ratio", subject=BEST, nights=tuple(range(len(values))), values=values, changes=())
    assert len(sparkline(series)) == len(values)
    change = LevelChange(night=0, study="a", p=0.001, before=0.0, after=0.1, is_worse=True, also_changed=())
    assert change.share is None


def test_a_place_without_studies_is_answered_with_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["history", str(tmp_path)]) == 3
    assert "name studies, or folders of studies" in capsys.readouterr().err
