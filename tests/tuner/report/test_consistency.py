"""What a report shows never contradicts itself: order, ratios, products, bars, ± and marks, whatever was measured."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipetune.bench.record import Record
from pipetune.bench.spec import Plan, Workload
from pipetune.tuner.commands.conclude import document as json_document
from pipetune.tuner.ranking.elimination import MARGIN
from pipetune.tuner.report import document as doc
from pipetune.tuner.report.best_plan import best_plan_parts, launch_gaps
from pipetune.tuner.report.compare.join import compare_studies
from pipetune.tuner.report.compare.wording import entries_of as entries_of_comparison
from pipetune.tuner.report.data import BASELINE_NAME, Report
from pipetune.tuner.report.page import page_of
from pipetune.tuner.report.ranking import ranking_tables, screen_of, verdict_of
from pipetune.tuner.report.spreadsheet import columns_of, entries_of
from pipetune.tuner.report.study_charts import plans_chart
from pipetune.tuner.study.files import load_study
from tests.record_factory import make_baseline_measurement, make_failure, make_measurement, make_plan, make_record
from tests.study_factory import write_study

WORKLOAD = Workload(num_prompts=8, input_len=16, output_len=4)
SINGLE = make_plan((30,), 4)
PLANS = (
    make_plan((17, 13), 4),
    make_plan((16, 14), 4),
    make_plan((16, 14), 2),
    make_plan((10, 20), 4),
    make_plan((30,), 4, replicas=2),
)


class Drawn(NamedTuple):
    """How a study went."""

    seed: int
    noise: float
    plans: int
    finalists: int
    rounds: int
    single_in_finals: bool
    min_stages: int
    objective: str
    lost: float
    """Share of the finals' runs that failed."""


DRAWN = st.builds(
    Drawn,
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.4]),
    plans=st.integers(1, len(PLANS)),
    finalists=st.integers(0, 4),
    rounds=st.integers(0, 8),
    single_in_finals=st.booleans(),
    min_stages=st.sampled_from([1, 2]),
    objective=st.sampled_from(["output_throughput", "output_throughput", "mean_ttft_ms"]),
    lost=st.sampled_from([0.0, 0.0, 0.1]),
)


def records_of(drawn: Drawn) -> list[Record]:
    rng = random.Random(drawn.seed)
    records: list[Record] = []

    def run(role: Any, plan: Plan | None, round_: int | None = None, drift: float = 1.0) -> None:
        number = len(records)
        if round_ is not None and rng.random() < drawn.lost:
            result: Any = make_failure()
        else:
            drift *= math.exp(rng.gauss(0, drawn.noise))
            more: Any = {"seed": number, "drift": drift, "noise": drawn.noise / 4, "num_iters": 1 if round_ else 2}
            result = (
                make_measurement(plan, WORKLOAD, **more) if plan else make_baseline_measurement(8, WORKLOAD, **more)
            )
        trial = number if role == "trial" else None
        records.append(make_record(number, role, plan, result, workload=WORKLOAD, round_=round_, trial_number=trial))

    run("baseline", None)
    run("single_stage", SINGLE)
    plans = [plan for plan in PLANS if len(plan.stages) >= drawn.min_stages][: drawn.plans]
    for plan in plans:
        run("trial", plan)
    finalists: list[Plan | None] = [*plans[: drawn.finalists], *([SINGLE] if drawn.single_in_finals else []), None]
    for round_ in range(drawn.rounds if drawn.finalists else 0):
        drift = math.exp(rng.gauss(0, 0.2))
        for finalist in rng.sample(finalists, len(finalists)):
            run("finalist", finalist, round_, drift)
    return records


def report_of(folder: Path, drawn: Drawn) -> Report:
    objective, space = [drawn.objective], {"min_stages": drawn.min_stages}
    return Report.of(
        load_study(write_study(folder, records_of(drawn), workload=WORKLOAD, objectives=objective, space=space))
    )


def number(text: str) -> float:
    """The first number of a text, in its own unit."""
    found = re.search(r"[\d.]+", text)
    assert found, text
    return float(found[0]) * (1000.0 if re.search(r"[\d.]+ s\b", text) else 1.0)


def off(text: str) -> float:
    """By how much the number of a text may differ from what was rounded, as a share."""
    digits = re.search(r"[\d.]+", text)
    assert digits, text
    places = len(digits[0].partition(".")[2])
    return 0.51 * 10.0**-places / max(float(digits[0]), 1e-9)


def cells_of(table: doc.Table) -> list[dict[str, str]]:
    titles = [column.title for column in table.columns]
    return [dict(zip(titles, map(str, row.cells), strict=True)) for row in table.rows]


def text_of(part: Any) -> str:
    """All the text of a document or a part."""
    if isinstance(part, str):
        return part
    if isinstance(part, tuple):
        return "\n".join(map(text_of, part))
    return "\n".join(text_of(getattr(part, name)) for name in getattr(part, "__dataclass_fields__", ()))


@settings(max_examples=30, deadline=None)
@given(DRAWN)
def test_tables_are_in_the_order_of_what_they_show_and_every_ratio_is_that_of_its_table(drawn: Drawn) -> None:
    with TemporaryDirectory() as folder:
        report = report_of(Path(folder) / "s", drawn)
    ranking, tables = report.ranking, ranking_tables(report)
    entries: list[dict[str, Any]] = [*entries_of(report)]
    for where in ("finals", "search"):
        rows = [entry for entry in entries if entry["entry"] == "plan" and entry["measured_in"] == where]
        base = [entry for entry in entries if entry["entry"] == "baseline" and entry["measured_in"] == where]
        ranked = [row for row in rows if row["rank"]]
        ratios = [row["speedup_over_baseline"] for row in ranked if row.get("speedup_over_baseline")]
        if len(ratios) > 1 and (ratios[0] < ratios[1]):
            assert ranked[0]["tied"], "only a plan that is tied stands before a faster one"
            assert ratios[1] / ratios[0] <= 1 + MARGIN + 1e-9
            ratios = ratios[1:]
        assert ratios == sorted(ratios, reverse=True)
        for row in rows:
            assert row["q1"] <= row["value"] * (1 + 1e-12)
            assert row["value"] <= row["q3"] * (1 + 1e-12)
            assert not row["confirmed"] or (row["runs"] > 1 and where == "finals")
            assert not row["tied"] or where == "finals"
            for name in ("speedup_over_baseline", "speedup_over_single_stage"):
                low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
                if low is not None and high is not None:
                    assert where == "finals"
                    assert low <= row[name] * (1 + 1e-12)
                    assert row[name] <= high * (1 + 1e-12)
            if row.get("speedup_over_baseline"):
                ours, theirs = row["value"], base[-1]["value"]
                gain = report.objective.gain(ours, theirs)
                assert row["speedup_over_baseline"] == pytest.approx(gain)
        products = [
            row["speedup_over_baseline"] / row["speedup_over_single_stage"]
            for row in rows
            if row.get("speedup_over_baseline") and row.get("speedup_over_single_stage")
        ]
        assert products == pytest.approx([products[0]] * len(products)) if products else True
    for table in tables:
        shown = cells_of(table)
        base_row = next((row for row in shown if row["plan"] == BASELINE_NAME), None)
        for line in shown:
            assert "✓" not in line["#"] or int(line["runs"]) > 1
            if base_row and report.objective.metric == report.throughput_metric and line["×"] != "–":
                ratio = number(line["tok/s"]) / number(base_row["tok/s"])
                within = off(line["tok/s"]) + off(base_row["tok/s"]) + off(line["×"])
                assert number(line["×"]) == pytest.approx(ratio, rel=1.1 * within)
    assert sum("=" in row["#"] for table in tables for row in cells_of(table)) == len(ranking.separation.tied) != 1
    assert ranking.separation.separated <= (not ranking.separation.tied)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_where_a_gpu_is_busy_launch_gaps_are_told_of(kind: str) -> None:
    plan = Plan.from_layer_counts((2, 2), (f"{kind}:0", "cpu:1"), 2)
    assert [part.text.partition(" is busy")[0] for part in launch_gaps(plan)] == (["A GPU"] if kind == "cuda" else [])


@settings(max_examples=25, deadline=None)
@given(DRAWN)
def test_headline_bars_factors_and_files_say_the_same(drawn: Drawn) -> None:
    with TemporaryDirectory() as folder:
        report = report_of(Path(folder) / "s", drawn)
        found = json_document(report)
    best, verdict = report.ranking.best, verdict_of(report)
    if best is None:
        assert verdict[0].style == "warning"
        return
    entry = next(entry for entry in entries_of(report) if entry.get("recommended"))
    parts = best_plan_parts(report, doc.Figures(()))
    hero = parts[0]
    assert isinstance(hero, doc.Section)
    headline = hero.parts[0]
    assert isinstance(headline, doc.Text)
    assert headline.style == verdict[0].style
    first = next(row for table in ranking_tables(report) for row in cells_of(table) if row["#"].startswith("1"))
    gain = best.speedup_over_baseline
    assert entry.get("speedup_over_baseline") == (gain.value if gain else None)
    assert found["best"]["speedup_over_baseline"] == (gain.model_dump(mode="json") if gain else None)
    assert found["best"]["metrics"][report.objective.metric] == entry["value"] == best.value
    if gain:
        assert headline.text == first["×"]
        assert f", {headline.text} over device_map (" in verdict[0].text
    tied = [row for table in ranking_tables(report) for row in cells_of(table) if "=" in row["#"]]
    assert ("tied with" in verdict[0].text) == (len(tied) > 1)
    section = next(part for part in parts if isinstance(part, doc.Section) and part.heading == "What gained what")
    bars = [part for part in section.parts if isinstance(part, doc.Bar)]
    if gain:
        shown = [number(bar.text) for bar in bars]
        assert shown[-1] == pytest.approx(number(headline.text), abs=0.011)
        longest = max(shown)
        for bar, value in zip(bars, shown, strict=True):
            rounding = off(bar.text) + off(bars[shown.index(longest)].text)
            assert bar.segments[0].percent == pytest.approx(100 * value / longest, rel=1.1 * rounding)
    factors = re.search(r"Of ~?([\d.]+)× in all, our runtime gives ~?([\d.]+)× .* ~?([\d.]+)× on top", text_of(section))
    if factors:
        whole, runtime, pipelining = map(float, factors.groups())
        assert whole == pytest.approx(runtime * pipelining, abs=0.006 + 0.006 * (runtime + pipelining))
    chart = plans_chart(report, "peak_memory_bytes", "", 1.0)
    assert chart is not None
    heights = [y for mark in chart.marks if hasattr(mark, "ys") for y in mark.ys]
    if all(row.speedup_over_baseline for row in report.ranking.rows) and report.objective.higher_is_better:
        assert gain is not None
        assert any(height == pytest.approx(gain.value) for height in heights)
    check_memory(report, parts, first)


def check_memory(report: Report, parts: Sequence[doc.Part], first: dict[str, str]) -> None:
    best = report.ranking.best
    assert best is not None
    cards = next(part for part in parts if isinstance(part, doc.Cards))
    peak = next(shown for label, shown, _ in cards.cards if label == "peak memory")
    assert peak == first["memory"]
    section = next(part for part in parts if isinstance(part, doc.Section) and part.heading.startswith("Memory"))
    bars = [part for part in section.parts if isinstance(part, doc.Bar)]
    peaks = [bar.remark.rpartition("the peak is ")[2] for bar in bars]
    assert peak in peaks
    shares = [int(re.findall(r"\((\d+) %\)", bar.remark)[0]) for bar in bars]
    assert max(shares) == round(100 * best.metrics["peak_memory_fraction"])


@settings(max_examples=20, deadline=None)
@given(DRAWN)
def test_of_a_search_bound_to_more_stages_the_single_stage_is_a_reference_and_no_rival(drawn: Drawn) -> None:
    drawn = drawn._replace(min_stages=2, noise=0.001)
    with TemporaryDirectory() as folder:
        report = report_of(Path(folder) / "s", drawn)
    ranking = report.ranking
    assert all(len(row.plan.stages) > 1 for row in ranking.rows)
    single = ranking.single_stage
    assert single is not None
    assert (single.rank, single.tied, single.is_reference) == (None, False, True)
    row = next(row for table in ranking_tables(report) for row in table.rows if str(row.cells[1]) == "30")
    assert row.style == "other"
    assert "a reference, the search is bound to 2 stages or more" in text_of(screen_of(report))
    assert single.speedup_over_baseline is not None or ranking.baseline_beside(single.in_finals) is None


@settings(max_examples=15, deadline=None)
@given(DRAWN, DRAWN)
def test_a_comparison_says_of_each_study_what_the_study_says(one: Drawn, other: Drawn) -> None:
    other = other._replace(objective=one.objective)
    with TemporaryDirectory() as folder:
        reports = [report_of(Path(folder) / name, drawn) for name, drawn in (("a", one), ("b", other))]
    found = compare_studies(reports, ["a", "b"])
    for report, contestant in zip(reports, found.contestants, strict=True):
        best = report.ranking.best
        assert contestant.over_baseline == (best.speedup_over_baseline if best else None)
        if best and contestant.best:
            assert contestant.best.throughput == best.throughput.median
    for plan in found.plans:
        for name, ratio in plan.ratios.items():
            assert ratio.value == pytest.approx(plan.figures[name].throughput / plan.figures["a"].throughput)
            assert ratio.low is None or ratio.low <= ratio.value <= (ratio.high or math.inf)
    for entry in entries_of_comparison(found):
        assert entry["tokens_per_s"]


def test_every_number_of_a_page_is_one_of_the_csv(tmp_path: Path) -> None:
    """Ratios that the page spells are those of the CSV, whichever study."""
    for seed in range(4):
        drawn = Drawn(seed, 0.05, 5, 3, 5, seed % 2 == 0, 1, "output_throughput", 0.0)
        report = report_of(tmp_path / str(seed), drawn)
        names = [name for name in columns_of(report) if name.startswith("speedup")]
        known = {f"{entry[name]:.2f}" for entry in entries_of(report) for name in names if entry.get(name) is not None}
        rival = report.ranking.rival
        if rival and rival.gain:
            known |= {f"{value:.2f}" for value in (rival.gain.value, rival.gain.low, rival.gain.high) if value}
        shown = re.findall(r"([\d.]+)×(?! the| over|\d)", text_of(page_of(report)))
        assert {text for text in shown if "." in text} <= known | {"1.00"}
