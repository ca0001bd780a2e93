"""How a search went, as reports tell it: predictions and measurements, its end, its time; old studies included."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipetune.bench.metrics import derive
from pipetune.bench.record import FailureKind, Measurement, Record
from pipetune.tuner.commands.conclude import document
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.report.chart import Dots, Line
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.document import Facts, Table
from pipetune.tuner.report.files import write_report
from pipetune.tuner.report.profile import costs_of
from pipetune.tuner.report.ranking import remarks_of, screen_of
from pipetune.tuner.report.render.rich import render_rich
from pipetune.tuner.report.search import summarize, trials_of
from pipetune.tuner.report.study_charts import prediction_chart, search_chart
from pipetune.tuner.study.files import StudyFile, load_study
from pipetune.tuner.study.search_log import SearchLog, Stop
from tests.record_factory import make_failure, make_measurement, make_plan, make_record, make_study_records
from tests.study_factory import make_log, make_profile, write_study


def titles(table: Table) -> tuple[str, ...]:
    return tuple(column.title for column in table.columns)


def texts(table: Table) -> list[tuple[str, ...]]:
    return [tuple(cell if isinstance(cell, str) else cell.text for cell in row.cells) for row in table.rows]


def report_of(folder: Path) -> Report:
    return Report.of(load_study(folder))


def test_each_trial_stands_beside_its_prediction(tmp_path: Path) -> None:
    report = report_of(write_study(tmp_path / "s", log=make_log(errors=(0.10, -0.05))))
    trials = trials_of(report)
    assert [trial.number for trial in trials] == list(range(10))
    assert [round(trial.error, 6) for trial in trials[:4] if trial.error is not None] == [0.10, -0.05, 0.10, -0.05]
    search = summarize(report)
    assert search is not None
    assert titles(search.table) == ("trial", "plan", "why", "predicted", "measured", "error")
    assert texts(search.table)[0][5] == "+10.0 %"
    assert texts(search.table)[8][3:] == ("–", "worker died", "–")
    best = [trial for trial in trials if trial.is_best_so_far][-1]
    assert best.measured == max(trial.measured for trial in trials if trial.measured is not None)
    assert search.stop.startswith("10 trials, 8 of them measured; no other plan is predicted")
    assert search.time == "92 % of 361 s went into measuring."
    assert "profile 21 s" in search.phases
    assert search.shares is not None
    assert sum(segment.percent for segment in search.shares.segments) == pytest.approx(100)
    chart = prediction_chart(report)
    assert chart is not None
    (dots,) = (mark for mark in chart.marks if isinstance(mark, Dots))
    assert dots.names == tuple(str(trial.number) for trial in trials if trial.error is not None)
    assert len(dots.names) == 8


def test_every_form_of_report_tells_it(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", log=make_log(), profile=make_profile())
    write_report(report_of(folder))
    markdown = (folder / "ranking.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    out = io.StringIO()
    Console(file=out, width=80).print(render_rich(screen_of(report_of(folder))))
    assert max(len(line.rstrip()) for line in out.getvalue().splitlines()) <= 80
    for text in (markdown, page, " ".join(out.getvalue().split())):
        assert "92 % of 361 s went into measuring." in text
        assert "better by more than the noise of 1.4 %" in text
    for text in (markdown, page):
        assert "How the search went" in text
        assert "no plan of this kind was measured" in text
    assert "What the model&#39;s parts take" in page or "What the model's parts take" in page
    assert "a layer of 0-29" in page
    assert (folder / "plots" / "predicted_vs_measured.png").exists()
    rows = list(csv.DictReader(io.StringIO((folder / "ranking.csv").read_text(encoding="utf-8"))))
    assert [row["recommended"] for row in rows if row["entry"] == "plan"] == ["true"] + ["false"] * 8
    first = next(row for row in rows if row["layers"] == "15+15" and row["micro_batch_size"] == "16")
    assert float(first["prediction_error"]) == pytest.approx(0.06)
    assert float(first["predicted"]) > 0
    assert float(first["predicted_sd"]) == 0.05


def test_machines_read_why_it_ended_and_where_the_time_went(tmp_path: Path) -> None:
    found = json.loads(json.dumps(document(report_of(write_study(tmp_path / "s", log=make_log())))))
    search = found["search"]
    assert search["stop"]["kind"] == "converged"
    assert search["measuring_share"] == pytest.approx(0.916, abs=1e-3)
    assert search["median_prediction_error"] == pytest.approx(0.03)
    assert [trial["trial"] for trial in search["trials"]] == list(range(10))
    assert found["best"]["recommended"]
    assert found["separated"] in (True, False)
    old = document(report_of(write_study(tmp_path / "old")))["search"]
    assert (old["stop"], old["seconds"], old["measuring_share"]) == (None, None, None)
    assert old["trials"][0]["measured"] > 0


def test_a_study_without_a_search_log_still_tells_its_trials(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s")
    write_report(report_of(folder))
    search = summarize(report_of(folder))
    assert search is not None
    assert titles(search.table) == ("trial", "plan", "measured")
    assert (search.text, search.phases, search.shares) == ("", "", None)
    assert not (folder / "plots" / "predicted_vs_measured.png").exists()
    assert (folder / "plots" / "history.png").exists()


def test_a_search_that_goes_on_or_measured_nothing_is_told_too(tmp_path: Path) -> None:
    plan = make_plan()
    stopped = make_record(0, "trial", plan, make_failure(FailureKind.INTERRUPTED), trial_number=0)
    log = SearchLog(entries=make_log([stopped]).entries)
    search = summarize(report_of(write_study(tmp_path / "s", [stopped], log=log)))
    assert search is not None
    assert texts(search.table)[0][4] == "stopped"
    assert search.text == ""
    assert summarize(report_of(write_study(tmp_path / "none", []))) is None


def test_what_another_process_measured_says_so(tmp_path: Path) -> None:
    plan = make_plan()
    record = make_record(0, "trial", plan, make_measurement(plan), trial_number=0)
    other = record.model_copy(update={"source": "gpu-box-2-ab12cd/0007", "source_devices": ("cpu:2", "cpu:3")})
    own = make_record(1, "trial", make_plan((16, 14)), make_measurement(make_plan((16, 14))), trial_number=1)
    folder = write_study(tmp_path / "s", [other, own], log=make_log([own]))
    search = summarize(report_of(folder))
    assert search is not None
    assert texts(search.table)[0][2] == "measured by gpu-box-2-ab12cd"
    assert texts(search.table)[0][3] == "–"


def test_a_trial_that_breaks_a_constraint_is_never_the_best_so_far(tmp_path: Path) -> None:
    records: tuple[Record, ...] = make_study_records()
    report = report_of(write_study(tmp_path / "s", records, constraints=["p90_ttft_ms<=4300"]))
    limit = Constraint.model_validate("p90_ttft_ms<=4300")
    kept = [
        isinstance(trial.record.result, Measurement) and derive(trial.record.result)["p90_ttft_ms"] <= 4300
        for trial in trials_of(report)
    ]
    assert True in kept
    assert not all(kept[:8])
    assert all(keeps for keeps, trial in zip(kept, trials_of(report), strict=True) if trial.is_best_so_far)
    assert report.ranking.constraints == (limit,)
    chart = search_chart(report)
    assert chart is not None
    (best,) = (mark for mark in chart.marks if isinstance(mark, Line))
    (dots,) = (mark for mark in chart.marks if isinstance(mark, Dots) and mark.label == "trial")
    assert set(best.ys) <= set(dots.ys)


def test_a_search_log_that_is_cut_off_is_named_and_left_out(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", log=SearchLog(stop=Stop(kind="budget", text="all 3 trials have run")))
    (folder / StudyFile.SEARCH).write_text("{", encoding="utf-8")
    report = report_of(folder)
    assert report.log is None
    assert report.ranking.best is not None
    assert "search.json" in remarks_of(report)[0]


def test_a_profile_is_shown_by_device_part_and_kind() -> None:
    table, links = costs_of(make_profile()).parts[1:]
    assert isinstance(table, Table)
    assert titles(table) == ("device", "part", "1 × 64", "8 × 64", "32 × 64", "1 @ 64", "8 @ 79", "32 @ 79")
    assert [line[0] for line in texts(table)] == ["cpu:0", "", "", "", "cpu:1", "", "", ""]
    assert texts(table)[0][1:3] == ("a layer of 0-29", "7.00")
    assert isinstance(links, Facts)
    assert links.items[0] == ("cpu:0 → cpu:1", "150 µs, 1.20 GB/s")


def test_a_trial_that_was_stopped_is_told_until_its_plan_has_run(tmp_path: Path) -> None:
    stopped = make_record(0, "trial", make_plan(), make_failure(FailureKind.INTERRUPTED), trial_number=0)
    again = make_record(1, "trial", make_plan(), make_measurement(make_plan()), trial_number=1)
    before, after = (
        report_of(write_study(tmp_path / str(len(records)), records)) for records in ([stopped], [stopped, again])
    )
    assert [row.record for row in before.ranking.failures] == [0]
    assert not after.ranking.failures
    search = summarize(after)
    assert search is not None
    assert [row[0] for row in texts(search.table)] == ["1"]
