"""The files of a report: whole for whole studies, honest for partial ones, safe whatever a model is called."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from pipetune.bench.errors import StudyError
from pipetune.bench.record import Failure, FailureKind, Measurement, Record
from pipetune.bench.spec import ModelSpec, Sampling
from pipetune.tuner.commands.conclude import conclude
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.files import write_report
from pipetune.tuner.report.ranking import ranking_tables, screen_of
from pipetune.tuner.report.render.rich import render_rich
from pipetune.tuner.report.wording import metric_text, model_text, rival_text, workload_text
from pipetune.tuner.study.files import load_study
from pipetune.tuner.study.plan_file import read_plan
from tests.record_factory import (
    WORKLOAD,
    make_baseline_measurement,
    make_failure,
    make_measurement,
    make_plan,
    make_record,
    make_study_records,
)
from tests.study_factory import write_study

WHOLE = make_study_records()
EVIL = "=cmd|' /C calc'!A0 <script>alert(1)</script> [red]x[/red] $\\frac{a}{b}$ | `x` \x1b[31m\nnew line"

PARTIAL: dict[str, list[Record]] = {
    "nothing": [],
    "only_failures": [record for record in WHOLE if isinstance(record.result, Failure)],
    "only_baseline": [record for record in WHOLE if record.role == "baseline"],
    "no_baseline": [record for record in WHOLE if record.spec is not None],
    "no_finals": [record for record in WHOLE if record.role != "finalist"],
    "no_instrumentation": list(make_study_records(instrument=False)),
    "single_stage_alone": [record for record in WHOLE if record.role == "single_stage"],
    "one_slow_plan": [
        make_record(0, "baseline", None, make_baseline_measurement(32)),
        make_record(1, "trial", make_plan(), make_measurement(make_plan(), drift=10.0)),
    ],
}


class Page(HTMLParser):
    """What a page would load, and the text it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "srcset", "data", "action", "background")
        ]

    def handle_data(self, data: str) -> None:
        self.shown += data


def terminal(folder: Path, width: int = 80) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    console.print(render_rich(screen_of(Report.of(load_study(folder)))))
    return out.getvalue()


def test_a_whole_study_gets_every_file(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    write_report(Report.of(load_study(folder)))
    plots = {"throughput_vs_bubble", "throughput_vs_memory", "history", "timeline"}
    assert {path.name for path in (folder / "plots").iterdir()} == {f"{name}.png" for name in plots}
    for path in (folder / "plots").iterdir():
        with Image.open(path) as image:
            image.verify()
            assert image.width >= 1000
    made = {path.name for path in folder.iterdir()} - {"study.yaml", "machine.json", "shape.json", "records"}
    assert made == {"ranking.csv", "ranking.md", "report.html", "plots", "trace.json.gz"}


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_studies_are_reported_honestly(tmp_path: Path, name: str) -> None:
    folder = write_study(tmp_path / "study", PARTIAL[name])
    write_report(Report.of(load_study(folder)))
    markdown = (folder / "ranking.md").read_text(encoding="utf-8")
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    screen = " ".join(terminal(folder).split())
    expected = {
        "nothing": "No plan was measured.",
        "only_failures": "No plan was measured.",
        "only_baseline": "No plan was measured.",
        "no_baseline": "none was measured, so there is no ×",
        "no_finals": "were not measured side by side",
        "no_instrumentation": "side by side, in 5 interleaved rounds",
        "single_stage_alone": "pipelining gains nothing",
        "one_slow_plan": "The un-pipelined model is faster here",
    }[name]
    for text in (markdown, " ".join(page.shown.split()), screen):
        assert expected.lower() in text.lower()
    instrumented = any(
        isinstance(record.result, Measurement)
        and any(run.compute_start_s for run in record.result.iterations[0].stages)
        for record in PARTIAL[name]
    )
    assert (folder / "trace.json.gz").exists() == instrumented
    assert (folder / "plots" / "timeline.png").exists() == instrumented


def test_a_second_report_takes_away_what_no_longer_holds(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    write_report(Report.of(load_study(folder)))
    for path in (folder / "records").iterdir():
        path.unlink()
    write_report(Report.of(load_study(folder)))
    assert not (folder / "trace.json.gz").exists()
    assert list((folder / "plots").iterdir()) == []


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    write_report(Report.of(load_study(folder)))
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads
    assert all(value.startswith("data:image/png;base64,") for value in page.loads)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "script-src" not in policy[1]
    assert text.index("Content-Security-Policy") < text.index("<style>")


def evil_study(folder: Path) -> Path:
    plan = make_plan()
    failure = make_failure(FailureKind.WORKER_ERROR, EVIL).model_copy(update={"phase": EVIL})
    result = make_measurement(plan, notes=(EVIL,), disturbances=(EVIL,))
    records = [
        make_record(0, "trial", plan, failure, trial_number=0),
        make_record(1, "trial", plan, result, trial_number=1),
    ]
    write_study(folder, records)
    for name in ("study.yaml", "machine.json", "shape.json"):
        path = folder / name
        text = path.read_text(encoding="utf-8")
        text = text.replace("Example CPU @ 2.50GHz", "<b>[red]CPU</b>").replace("LlamaForCausalLM", "<i>[x]|Arch")
        path.write_text(text.replace("name: smollm2-135m", 'name: "=<u>model[/]|"'), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_foreign_text_is_text_in_every_form(tmp_path: Path) -> None:
    folder = evil_study(tmp_path / "study")
    write_report(Report.of(load_study(folder)))
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "u"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.shown
    assert "=<u>model[/]|" in page.shown
    assert "\x1b" not in html

    markdown = (folder / "ranking.md").read_text(encoding="utf-8")
    assert "<script>" not in markdown
    assert "<u>" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| 0000 ")]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 6

    screen = terminal(folder, width=400)
    assert "[red]x[/red]" in screen
    assert "=<u>model[/]|" in screen
    assert "\x1b[31m" not in screen


def test_a_report_takes_away_no_picture_but_its_own(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", PARTIAL["nothing"])
    (folder / "plots").mkdir()
    for name in ("timeline.png", "mine.png"):
        (folder / "plots" / name).write_bytes(b"png")
    write_report(Report.of(load_study(folder)))
    assert {path.name for path in (folder / "plots").iterdir()} == {"mine.png"}


def test_a_report_writes_into_no_folder_that_plots_leads_to(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", PARTIAL["nothing"])
    (tmp_path / "own").mkdir()
    (tmp_path / "own/timeline.png").write_bytes(b"mine")
    (folder / "plots").symlink_to(tmp_path / "own")
    with pytest.raises(StudyError, match="plots: is a link to"):
        write_report(Report.of(load_study(folder)))
    assert (tmp_path / "own/timeline.png").read_bytes() == b"mine"


def test_the_csv_holds_full_precision_and_no_formula(tmp_path: Path) -> None:
    folder = evil_study(tmp_path / "study")
    write_report(Report.of(load_study(folder)))
    text = (folder / "ranking.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["entry"] for row in rows] == ["plan", "failure"]
    for row in rows:
        for cell in row.values():
            assert not cell.startswith(("=", "+", "@", "\t", "\r"))
            assert not cell.startswith("-") or float(cell) <= 0
    assert rows[1]["failure_message"].startswith("'=cmd")
    ranking = Report.of(load_study(folder)).ranking
    assert float(rows[0]["value"]) == ranking.rows[0].value
    assert float(rows[0]["bubble_wait"]) == ranking.rows[0].metrics["bubble_wait"]


def test_the_csv_has_a_line_for_every_plan_baseline_and_failure(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    write_report(Report.of(load_study(folder)))
    rows = list(csv.DictReader(io.StringIO((folder / "ranking.csv").read_text(encoding="utf-8"))))
    ranking = Report.of(load_study(folder)).ranking
    counts = {name: sum(row["entry"] == name for row in rows) for name in ("plan", "baseline", "failure")}
    assert counts == {"plan": len(ranking.rows), "baseline": 3 + 1, "failure": 2}
    assert [row["measured_in"] for row in rows if row["entry"] == "baseline"] == ["search"] * 3 + ["finals"]
    assert rows[0]["layers"] == "16+14"
    assert rows[0]["devices"] == "cpu:0 cpu:1"
    assert float(rows[0]["speedup_over_baseline_low"]) <= float(rows[0]["speedup_over_baseline"])


def test_the_table_fits_80_columns_and_shows_best_and_baseline(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", constraints=["p90_ttft_ms<=4700"])
    lines = terminal(folder).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    best = next(line for line in lines if line.lstrip().startswith("1"))
    shown = Report.of(load_study(folder)).ranking.rows[0].metrics["p90_ttft_ms"]
    assert "16+14" in best
    assert "×" in best
    assert any("device_map" in line and "1.00×" in line for line in lines)
    assert any(metric_text("p90_ttft_ms", shown) in line for line in lines), "the constrained metric is shown"


def test_a_narrow_screen_breaks_cells_and_cuts_no_number(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", constraints=["p90_ttft_ms<=4700"])
    lines = terminal(folder, width=60).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 60
    shown = "".join("".join(lines).split())
    assert "…" not in shown
    for row in Report.of(load_study(folder)).ranking.rows:
        assert metric_text("p90_ttft_ms", row.metrics["p90_ttft_ms"]).split()[0] in shown


def test_notes_of_a_kind_are_one_bullet(tmp_path: Path) -> None:
    plan = make_plan()
    texts = [f"other processes took {number / 10:.1f} CPU cores: python (pid {number})" for number in range(20, 70)]
    records = [
        make_record(at, "trial", plan, make_measurement(plan, seed=at, disturbances=(text,)), trial_number=at)
        for at, text in enumerate(texts)
    ]
    folder = write_study(tmp_path / "study", records)
    write_report(Report.of(load_study(folder)))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("other processes took") == 1
    assert "and 49 notes more of the kind (records 0000, 0001" in page


def test_several_objectives_mark_the_front(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", objectives=["output_throughput", "mean_ttft_ms"])
    write_report(Report.of(load_study(folder)))
    front = [row for row in Report.of(load_study(folder)).ranking.rows if row.on_front]
    tables = ranking_tables(Report.of(load_study(folder)))
    assert sum("◆" in str(row.cells[0]) for table in tables for row in table.rows) == len(front) > 1


COPIES = make_plan((30,), 16, replicas=2)
ONE_PIPELINE = make_plan((17, 13), 8, prefill=4, chunk=32, compile=True)


def copies_and_one_pipeline(folder: Path, *, drift: float = 1.0) -> Path:
    """A study whose finals set two copies of the model against one pipeline, slower by `drift`."""
    records: list[Record] = []
    for plan in (make_plan((30,), 32), COPIES, make_plan((16, 14), 8, replicas=2), ONE_PIPELINE):
        records.append(make_record(len(records), "trial", plan, make_measurement(plan)))
    records.append(make_record(len(records), "baseline", None, make_baseline_measurement(32)))
    for round_ in range(3):
        for plan in (COPIES, ONE_PIPELINE):
            factor = drift if plan == COPIES else 1.0
            result = make_measurement(plan, num_iters=1, seed=round_, drift=factor)
            records.append(make_record(len(records), "finalist", plan, result, round_=round_))
    return write_study(folder, records, devices=("cpu:0", "cpu:1", "cpu:2", "cpu:3"))


def test_two_copies_that_beat_one_pipeline_are_said_to(tmp_path: Path) -> None:
    folder = copies_and_one_pipeline(tmp_path / "study", drift=0.5)
    conclude(folder, lambda report: 0)
    lines = terminal(folder).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert any(line.startswith("1✓  2×30") for line in lines)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for text in (" ".join(" ".join(lines).split()), " ".join(page.shown.split())):
        assert "Two copies of the model beat one pipeline of 2 stages (17+13 · micro-batch 8 (prefill 4, chunk" in text
        assert "over 3 interleaved rounds; 2 replicas hold the weights 2 times." in text
        assert "holds the first of 2 replicas; load the model once for each" in text
    assert "replica 1 stage 0" in page.shown
    assert "4 layers loaded in 800 ms, output checked in 1.90 s." in page.shown
    assert "µs" in page.shown
    assert set(json.loads((folder / "best_device_map.json").read_text(encoding="utf-8")).values()) == {"cpu"}
    assert read_plan(folder / "best_plan.json").plan == COPIES


def test_one_pipeline_that_beats_copies_and_a_draw_are_said_too(tmp_path: Path) -> None:
    won = " ".join(terminal(copies_and_one_pipeline(tmp_path / "won", drift=3.0)).split())
    assert "One pipeline of 2 stages beats two copies of the model (2 × 30 · micro-batch 16)" in won
    assert "1✓ 17+13 compiled 8 4·32" in won
    ranking = Report.of(load_study(tmp_path / "won")).ranking
    assert ranking.rival is not None
    gain = ranking.rival.gain
    assert gain is not None
    wide = ranking.rival.model_copy(update={"gain": gain.model_copy(update={"low": 0.9})})
    draw = ranking.model_copy(update={"rival": wide})
    assert "is not told apart from two copies of the model" in (rival_text(draw) or "")
    unpaired = gain.model_copy(update={"low": None, "high": None, "rounds": 0})
    apart = ranking.model_copy(update={"rival": ranking.rival.model_copy(update={"gain": unpaired})})
    assert "was faster during the search than two copies" in (rival_text(apart) or "")
    assert rival_text(Report.of(load_study(write_study(tmp_path / "plain"))).ranking) is None


def test_a_study_of_scored_texts_shows_tokens_and_end_to_end_latency(tmp_path: Path) -> None:
    scored = WORKLOAD.model_copy(update={"kind": "score"})
    folder = write_study(tmp_path / "study", make_study_records(workload=scored), workload=scored)
    write_report(Report.of(load_study(folder)))
    screen = terminal(folder)
    assert max(map(len, screen.splitlines())) <= 80
    assert "× 64 tokens, scored" in screen
    assert "HF forward un-pipelined" in screen
    assert "E2EL" in screen
    assert "TTFT" not in screen
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "time to the scores" in page.shown
    report = Report.of(load_study(folder))
    assert report.objective.metric == "total_token_throughput"
    assert report.ranking.baseline is not None
    rows = list(csv.DictReader(io.StringIO((folder / "ranking.csv").read_text(encoding="utf-8"))))
    assert "output_throughput" not in rows[0]


def test_how_tokens_are_drawn_is_part_of_the_workload() -> None:
    workload = WORKLOAD.model_copy(update={"sampling": Sampling(temperature=0.8, top_k=40, seed=3)})
    assert workload_text(workload).endswith("16 new each, temperature 0.8, top-k 40, seed 3")
    assert (
        model_text(ModelSpec(name="m", dtype="bfloat16", storage_dtype="float32"))
        == "m · bfloat16 over float32 weights"
    )


def test_rounding_never_invents_signs_or_digits() -> None:
    from pipetune.tuner.report.wording import number_text, percent_text

    assert [number_text(value) for value in (0.0, 0.1234, 9.996, 60.84, 999.6, 1234.5)] == [
        "0",
        "0.123",
        "10.00",
        "60.8",
        "1000",
        "1234",
    ]
    assert percent_text(-1e-9) == "0 %"


def test_columns_that_are_alike_in_all_rows_are_left_out_first(tmp_path: Path) -> None:
    records: list[Record] = []
    for round_ in range(3):
        for plan in (make_plan((17, 13), 8, prefill=2), make_plan((17, 13), 8, prefill=4)):
            result = make_measurement(plan, num_iters=1, seed=round_)
            records.append(make_record(len(records), "finalist", plan, result, round_=round_))
    (table,) = ranking_tables(Report.of(load_study(write_study(tmp_path / "study", records))))
    spare = {column.title: column.spare for column in table.columns}
    assert 0 < spare["pre"] < min(spare["runs"], spare["fly"])
