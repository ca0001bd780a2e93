"""Studies compared: the same plan apart from the best plan, prices, caps, and work that does not compare."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from bench.errors import ConfigError, StudyError
from bench.spec import Workload
from tests.record_factory import make_machine
from tests.study_factory import write_study
from tests.tuner.compare.studies import EVEN, UNEVEN, write_night
from tuner.cli import run
from tuner.compare.files import read_reports, write_all
from tuner.compare.join import compare_studies, plan_key
from tuner.compare.values import StudyComparison
from tuner.compare.wording import render_csv, render_markdown


def compared(*folders: Path, **options: dict[str, float]) -> StudyComparison:
    reports, names = read_reports(folders)
    return compare_studies(reports, names, **options)


def test_the_same_plan_slower_is_not_another_plan_that_is_best_now(tmp_path: Path) -> None:
    first = write_night(tmp_path / "monday", {UNEVEN: 1.0, EVEN: 1.3})
    slower = write_night(tmp_path / "tuesday", {UNEVEN: 1.1, EVEN: 1.43}, seed=50)
    moved = write_night(tmp_path / "wednesday", {UNEVEN: 1.0, EVEN: 0.7}, seed=90)
    tuesday, wednesday = compared(first, slower, moved).changes
    assert tuesday.same_plan is not None
    assert tuesday.own_best is not None
    assert tuesday.same_plan.value == pytest.approx(1 / 1.1, rel=0.03)
    assert tuesday.same_plan.is_told
    assert tuesday.moved is None
    assert "slower" in tuesday.text
    assert "with the same plan" in tuesday.text
    assert wednesday.same_plan is not None
    assert wednesday.same_plan.value == pytest.approx(1.0, rel=0.03)
    assert wednesday.moved is not None
    assert wednesday.moved.startswith("17+13")
    assert "another plan is best: 17+13" in wednesday.text


def test_a_plan_is_the_same_wherever_its_stages_lie() -> None:
    elsewhere = EVEN.model_copy(
        update={
            "stages": tuple(
                stage.model_copy(update={"device": f"cuda:{index + 2}"}) for index, stage in enumerate(EVEN.stages)
            )
        }
    )
    assert plan_key(elsewhere) == plan_key(EVEN)
    assert plan_key(EVEN) != plan_key(UNEVEN)
    turned = EVEN.model_copy(
        update={
            "stages": tuple(
                stage.model_copy(update={"device": f"cpu:{1 - index}"}) for index, stage in enumerate(EVEN.stages)
            )
        }
    )
    assert plan_key(turned) != plan_key(EVEN)


def test_other_hardware_is_named_and_money_counts_by_device(tmp_path: Path) -> None:
    machine = make_machine()
    hardware = machine.hardware.model_copy(update={"cpu_model": "Faster CPU"})
    other = machine.model_copy(update={"hardware": hardware, "hardware_id": hardware.hardware_id})
    found = compared(
        write_night(tmp_path / "a"), write_night(tmp_path / "b", machine=other, seed=9), prices={"cpu": 0.5, "cpu:1": 1.5}
    )
    assert any("cpu_model" in line and "Faster CPU" in line for line in found.changes[0].hardware)
    one = found.contestants[0]
    assert one.price_per_hour == 2.0
    assert one.best is not None
    assert one.tokens_per_price == pytest.approx(3600 * one.best.throughput / 2.0)
    assert one.tokens_per_device == pytest.approx(one.best.throughput / 2)
    assert one.tokens_per_joule is None
    assert len(one.best.cap_bytes) == len(one.best.peak_bytes) == 2


def test_a_device_without_a_price_leaves_the_sum_open(tmp_path: Path) -> None:
    found = compared(write_night(tmp_path / "a"), write_night(tmp_path / "b"), prices={"cuda": 2.0})
    assert found.contestants[0].tokens_per_price is None


def test_studies_of_other_work_do_not_compare(tmp_path: Path) -> None:
    other = write_study(tmp_path / "b", workload=Workload(num_prompts=32, input_len=64, output_len=16, seed=7))
    found = compared(write_night(tmp_path / "a"), other)
    assert found.plans == ()
    assert found.changes[0].own_best is None
    assert "does not compare" in found.changes[0].text
    assert "seed" in found.changes[0].text


def test_tables_hold_every_shared_plan(tmp_path: Path) -> None:
    found = compared(write_night(tmp_path / "a"), write_night(tmp_path / "b", seed=9))
    rows = list(csv.DictReader(io.StringIO(render_csv(found))))
    assert {(row["plan"], row["study"]) for row in rows} == {
        (plan.describe(), name) for plan in (EVEN, UNEVEN) for name in "ab"
    }
    assert float(next(row["ratio"] for row in rows if row["study"] == "b")) > 0
    text = render_markdown(found)
    assert text.count("| 17+13") >= 1
    assert "## The same plans" in text


def test_the_command_prints_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_night(tmp_path / "a"), write_night(tmp_path / "b", seed=9)
    assert run(["compare", str(first), str(second), "--json"]) == 0
    assert StudyComparison.model_validate(json.loads(capsys.readouterr().out)).contestants[1].name == "b"
    assert run(["compare", str(first), str(second), "-o", str(tmp_path / "out"), "--price", "cpu=0.1"]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"compare.json", "compare.csv", "compare.md", "compare.html", "own_best.png", "same_plans.png"}
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80
    assert run(["compare", str(first), str(first)]) == 2
    assert run(["compare", str(first)]) == 2
    assert run(["compare", str(first), str(tmp_path / "nowhere")]) == 2
    assert run(["compare", str(first), str(second), "--price", "cpu=free"]) == 2


def test_a_report_can_hold_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_night(tmp_path / "a"), write_night(tmp_path / "b", seed=9)
    assert run(["report", str(second), "--compare", str(first)]) == 0
    assert "Compared: a, b" in (second / "report.html").read_text()
    assert run(["report", str(second)]) == 0
    assert "Compared:" not in (second / "report.html").read_text()


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given twice"):
        read_reports([tmp_path, tmp_path])
    with pytest.raises(StudyError, match="holds no study"):
        read_reports([write_night(tmp_path / "a"), tmp_path])


def test_names_that_are_alike_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write_night(tmp_path / machine / "nightly") for machine in ("h100", "a100")]
    assert read_reports(folders)[1] == ["h100/nightly", "a100/nightly"]


def test_a_comparison_written_twice_replaces_the_first(tmp_path: Path) -> None:
    found = compared(write_night(tmp_path / "a"), write_night(tmp_path / "b", seed=9))
    write_all(found, tmp_path / "out")
    write_all(found, tmp_path / "out")
    assert StudyComparison.model_validate_json((tmp_path / "out" / "compare.json").read_bytes()) == found
