"""`bench` and `tune` under arrivals, from the command line to the end, on real workers."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from pipetune.bench.errors import ConfigError, StudyError
from pipetune.bench.load.rates import bracket
from pipetune.bench.metrics import derive
from pipetune.bench.record import Measurement, Record
from pipetune.tuner.cli import run
from pipetune.tuner.commands.sweep import rates_of, read_points
from pipetune.tuner.planning.calibration.observation import observe
from pipetune.tuner.ranking.rank import rank
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.report.document import Text
from pipetune.tuner.report.lanes import lane_section
from tests.tiny_models import save_tiny_model

SIZES = ("--num-prompts", "20", "--input-len", "9", "--output-len", "4", "--num-iters", "1", "--no-progress")
FEW = ("--n-trials", "3", "--finalists", "1", "--finalist-rounds", "1", "--max-finalist-rounds", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "llama", "llama", 4)
    return ("--model", str(folder), "--devices", "cpu:0-1")


@pytest.mark.parametrize("text", ["2,1", "1,1", "0", "-1,2", "nan", "inf", "x", "", "2,"])
def test_rates_that_do_not_rise_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--sweep .*such as 2,4,8"):
        rates_of(text)
    assert rates_of("0.5,2,4") == (0.5, 2.0, 4.0)
    assert rates_of(None) == ()


def test_results_of_vllms_client_are_points(tmp_path: Path) -> None:
    file, row = tmp_path / "served.jsonl", {"endpoint_type": "openai", "backend": "openai", "model_id": "m"}
    rows = [{**row, "request_rate": 2.0, "p90_ttft_ms": 31.5}, {**row, "request_rate": 4.0, "ttfts": [0.1, 0.2, 0.3]}]
    file.write_text("".join(f"{json.dumps(one)}\n" for one in rows), encoding="utf-8")
    (first, second) = read_points(file)
    assert first == ("m (openai)", 2.0, 31.5)
    assert second[1] == 4.0
    assert second[2] == pytest.approx(280.0)
    for odd, message in (({"request_rate": "inf"}, "request_rate"), ({"request_rate": 2}, "--metric-percentiles 90")):
        file.write_text(json.dumps({**row, **odd}), encoding="utf-8")
        with pytest.raises(StudyError, match=rf"--beside .*served.jsonl: .*{message}"):
            read_points(file)


@pytest.mark.slow
def test_a_sweep_is_a_table_a_plot_and_records(
    model: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, plot = tmp_path / "first.jsonl", tmp_path / "second.jsonl", tmp_path / "rates.png"
    bench = ("bench", *model, *SIZES, "--goodput", "ttft:5000", "--sweep", "40,90")
    assert run([*bench, "--layers", "4", "-o", str(first)]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line.strip().startswith(("40 ", "90 "))] == ["40", "90"]
    assert "good" in text
    more = ("--layers", "1,3", "-o", str(second), "--plot", str(plot), "--beside", str(first), "--json")
    assert run([*bench, *more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["request_rate"] for row in told["sweep"]] == [40.0, 90.0]
    assert all(row["metrics"]["slo_attainment"] == 1.0 for row in told["sweep"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    records = [Record.model_validate_json(line) for line in second.read_text().splitlines()]
    assert [
        record.spec and record.spec.workload.arrivals and record.spec.workload.arrivals.request_rate
        for record in records
    ] == [40.0, 90.0]
    assert run([*bench, "--layers", "4", "--plot", str(plot), "--beside", str(plot)]) == 2
    assert "--beside" in capsys.readouterr().err


@pytest.mark.slow
def test_the_highest_rate_lies_between_two_that_were_measured(
    model: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    bench = ("bench", *model, *SIZES, "--layers", "4", "--micro-batch-size", "1", "--request-rate", "50")
    find = ("--max-request-rate", "--most-rates", "4", "--goodput", "ttft:30", "--json")
    assert run([*bench, *find]) == 0
    told = json.loads(capsys.readouterr().out)
    shares = dict(told["tried_rates"])
    assert 50.0 in shares
    assert 2 <= len(shares) <= 4
    low, high = bracket(shares, 0.9)
    highest = told["metrics"].get("max_request_rate")
    # Whether some are sustained and others not is the machine's.
    assert (highest is None) == (low is None)
    if low is not None:
        assert low <= highest <= (high or low)
        assert told["metrics"]["slo_attainment"] == shares[low] >= 0.9
    assert run([*bench, *find[:-1]]) == 0
    assert "highest rate sustained: " in capsys.readouterr().out
    assert run([*bench, "--max-request-rate"]) == 2
    assert "--max-request-rate): workload: goodput: a rate is sustained within limits" in capsys.readouterr().err


@pytest.mark.slow
def test_what_each_lane_gave_is_told(
    model: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = ("bench", *model, *SIZES, "--random-range-ratio", "0.6", "--layers", "4", "--request-rate", "60")
    records = []
    for number, lanes in enumerate(([], ["--lanes", '[{"up_to_tokens": 8, "weight": 4}, {"prefills_per_decode": 1}]'])):
        file = tmp_path / f"{number}.jsonl"
        assert run([*bench, "--goodput", "ttft:9000", *lanes, "-o", str(file)]) == 0
        record = Record.model_validate_json(file.read_text("utf-8"))
        records.append(record.model_copy(update={"number": number, "role": "trial", "trial_number": number}))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("≤8", "others"))]
    measured = records[1].result
    assert isinstance(measured, Measurement)
    short = sum(length <= 8 for length in measured.prompt_lens) / 20
    assert [row[row.index("ms") - 3] for row in rows] == [f"{100 * share:.0f}" for share in (short, 1 - short)]
    assert all(row[-2:] == ["100", "%"] for row in rows)
    ranking = rank(records, [Objective(metric="request_goodput")])
    laned = next(row for row in ranking.rows if row.plan.lanes)
    (section,) = lane_section(ranking, laned, measured)
    text = section.parts[1]
    assert isinstance(text, Text)
    assert re.match(r"~?\d\.\d+× over the best plan without lanes in request_goodput: 4 · ", text.text)
    assert lane_section(ranking, next(row for row in ranking.rows if not row.plan.lanes), measured) == ()


@pytest.mark.slow
def test_a_search_under_arrivals_ranks_by_good_requests(
    model: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    tune = ("tune", *model, *SIZES, "--request-rate", "60", "--goodput", "ttft:9000", "--objective", "request_goodput")
    assert run([*tune, *FEW, "-o", str(folder)]) == 0
    assert "60 requests/s" in (text := capsys.readouterr().out)
    assert "goodput" in text
    files = sorted(folder.glob("records/*.json"))
    records = [Record.model_validate_json(path.read_text(encoding="utf-8")) for path in files]
    results = [record.result for record in records]
    assert {record.role for record in records} == {"single_stage", "trial", "finalist"}
    assert all(isinstance(one, Measurement) and one.is_under_arrivals for one in results), results
    checks = [one.check for one in results if isinstance(one, Measurement) and one.check is not None]
    # Finals compare no outputs: their plans were checked as trials.
    assert [check.tokens_equal for check in checks] == [True] * 4
    assert (folder / "best_plan.json").exists()
    # Each run teaches what tasks take, and trials are told what they are predicted to serve well.
    lessons = [observe(record) for record in records]
    for record, lesson in zip(records, lessons, strict=True):
        assert lesson is not None
        assert isinstance(record.result, Measurement)
        runs = record.result.iterations
        assert {span.stage for span in lesson.tasks} == set(range(len(runs[0].stages)))
        joined = sum(span.count for span in lesson.tasks if span.stage == 0 and span.decode_rows)
        assert joined == sum(task.decode_rows > 0 for run in runs for task in run.stage_loads[0].load_tasks)
    trials = json.loads((folder / "search.json").read_text(encoding="utf-8"))["entries"]
    assert len(trials) == 3
    assert all(0 < one["predicted"]["request_goodput"] < 70 for one in trials)
    assert {one["kind"] for one in trials} <= {"model", "kind"}
    # It goes on where it was, and finds nothing left to do.
    assert run(["tune", "-o", str(folder), "--resume", "--no-progress"]) == 0


@pytest.mark.slow
def test_a_search_for_the_plan_of_the_highest_rate(
    model: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    tune = ("tune", *model, *SIZES, "--request-rate", "200", "--most-rates", "3", "--goodput", "ttft:200")
    assert run([*tune, *FEW, "--objective", "max_request_rate", "-o", str(folder)]) in (0, 1)
    text = capsys.readouterr().out
    records = [Record.model_validate_json(path.read_text("utf-8")) for path in sorted(folder.glob("records/*.json"))]
    results = [record.result for record in records]
    assert results
    for one in results:
        assert isinstance(one, Measurement), one
        assert 2 <= len(one.tried_rates) <= 3
        assert one.wanted_share == 0.9
        if (best := derive(one).get("max_request_rate")) is not None:
            assert best >= max((rate for rate, share in one.tried_rates if share >= 0.9), default=0.0) * 0.999
    best_plan = json.loads((folder / "best_plan.json").read_text("utf-8"))
    assert best_plan["workload"]["arrivals"]["slo_attainment"] == 0.9
    assert "req/s" in text
    trials = json.loads((folder / "search.json").read_text("utf-8"))["entries"]
    predicted = {one["trial_number"]: one["predicted"]["max_request_rate"] for one in trials}
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        assert isinstance(record.result, Measurement)
        assert record.effective is not None
        key, tried = record.effective.key, dict(record.result.tried_rates)
        known = statistics.median(found[key]) if found[key] else None
        near = known or predicted.get(record.trial_number or 0)
        # Each begins near what its plan is known or thought to sustain.
        if record.role in ("trial", "finalist") and near is not None:
            assert float(f"{min(max(near, 200 / 3.75), 16 * 200):.4g}") in tried
        if (own := derive(record.result).get("max_request_rate")) is not None:
            found[key].append(own)
