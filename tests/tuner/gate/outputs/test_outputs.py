"""What a gate leaves behind, read back by those who will: a JUnit reader, Markdown tables, JSON, a picture."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from junitparser import Error, Failure, JUnitXml
from markdown_it import MarkdownIt
from rich.console import Console

from pipetune.bench.errors import ConfigError
from pipetune.tuner.gate.outputs import files
from pipetune.tuner.gate.outputs.junit import render_junit
from pipetune.tuner.gate.outputs.wording import differences_chart, markdown_of, screen_of, signed, value_text
from pipetune.tuner.gate.values import GateResult, Reason, Session, Verdict
from pipetune.tuner.report.chart import Dots
from pipetune.tuner.report.document import Bullets, Text
from pipetune.tuner.report.render import markdown
from pipetune.tuner.report.render.rich import render_rich
from tests.tuner.gate.factory import make_sample
from tests.tuner.gate.results import METRIC, make_result

ALL = {"prefill": 0.0, "decode": 0.1, "short": None}


def read_junit(text: str) -> JUnitXml:
    """As the readers of CI services do."""
    return JUnitXml.fromstring(text.encode())


def test_junit_has_a_case_for_every_metric_and_never_skips() -> None:
    result = make_result(ALL)
    read = read_junit(render_junit(result))
    assert (read.tests, read.failures, read.errors, read.skipped) == (3, 1, 1, 0)
    found = {}
    for suite in read:
        assert (suite.tests, suite.skipped) == (1, 0)
        properties = suite.properties()  # type: ignore[no-untyped-call]
        assert {"order_seed", "baseline.hardware_id", "candidate.hardware_id"} <= {one.name for one in properties}
        for case in suite:
            assert (case.classname, case.name) == (suite.name, METRIC)
            assert not case.is_skipped
            found[suite.name] = [(type(one), one.type) for one in case.result]
    assert found == {
        "pipetune.gate.prefill": [],
        "pipetune.gate.decode": [(Failure, "worse")],
        "pipetune.gate.short": [(Error, "out_of_time")],
    }


def test_junit_times_of_tests_add_up_to_what_the_runs_took() -> None:
    result = make_result(ALL)
    runs = [run for pair in result.pairs for run in (pair.baseline, pair.candidate)]
    read = read_junit(render_junit(result))
    assert sum(case.time for suite in read for case in suite) == pytest.approx(sum(run.wall_s for run in runs))


def test_junit_times_beside_a_stored_baseline_are_those_of_the_candidate() -> None:
    sessions = tuple(
        Session(place=place, case="decode", samples=(make_sample({METRIC: 1.0}, wall_s=wall_s),) * 5)
        for place, wall_s in (("monday", 100.0), ("now", 12.0))
    )
    result = make_result({"decode": 0.0}).model_copy(update={"method": "stored", "pairs": (), "sessions": sessions})
    (suite,) = read_junit(render_junit(result))
    assert suite.time == pytest.approx(60.0)
    assert sum(case.time for case in suite) == pytest.approx(60.0)


@given(st.text(st.characters(), max_size=40))
def test_junit_survives_any_text(text: str) -> None:
    result = make_result({"odd": 0.1})
    finding = result.findings[0].model_copy(update={"text": text, "case": text})
    (suite,) = read_junit(render_junit(result.model_copy(update={"findings": (finding,)})))
    (case,) = suite
    assert len(case.result) == 1


def test_junit_replaces_what_xml_cannot_say() -> None:
    result = make_result({"odd": 0.1})
    finding = result.findings[0].model_copy(update={"text": 'a <b> & "c" \x1b[31m \ud800'})
    (suite,) = read_junit(render_junit(result.model_copy(update={"findings": (finding,)})))
    (case,) = suite
    assert case.result[0].message == 'a <b> & "c" �[31m �'


def rendered(text: str) -> ET.Element:
    """Markdown as GitHub renders it, as a tree; `details` is HTML and passes through."""
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    return ET.fromstring(f"<body>{html}</body>")


def cells_of(body: ET.Element) -> list[list[str]]:
    (table,) = body.iter("table")
    return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def test_markdown_is_a_heading_a_table_and_what_is_to_be_said() -> None:
    body = rendered(render_markdown(make_result(ALL)))
    (heading,) = body.iter("h2")
    assert heading.text == "❌ pipetune gate · FAIL: decode · mean_ttft_ms is 10.4 % worse"
    head, *rows = cells_of(body)
    assert head[:4] == ["case", "metric", "verdict", "change"]
    assert [row[:3] for row in rows] == [
        ["prefill", METRIC, "✅ OK"],
        ["decode", METRIC, "❌ FAIL"],
        ["short", METRIC, "⚠️ INCONCLUSIVE"],
    ]
    assert {len(row) for row in rows} == {len(head)}
    said = ["".join(item.itertext()) for item in body.iter("li")]
    assert any("software differs: packages.torch: 2.11.0 → 2.13.0" in line for line in said)
    (details,) = body.iter("details")
    assert [item.text for item in details.iter("strong")] == ["how", "both sides", "machine", "order seed"]


def render_markdown(result: GateResult) -> str:
    """What goes into `gate.md`."""
    return markdown.render_markdown(markdown_of(result), level=2)


def headline_of(result: GateResult) -> str:
    """The last line of the screen."""
    last = screen_of(result).parts[-1]
    assert isinstance(last, Text)
    return last.text


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ([("prefill", "a"), ("prefill", "b")], "prefill"),
        ([("prefill", "a"), ("decode", "a"), ("decode", "b")], "prefill · a; decode"),
        ([("decode", "a")], "decode · a"),
    ],
)
def test_what_several_comparisons_share_is_told_once(others: list[tuple[str, str]], names: str) -> None:
    result = make_result({"prefill": 0.0, "decode": None})
    fine, undecided = result.findings
    findings = [
        (undecided if (case, metric) in others else fine).model_copy(update={"case": case, "metric": metric})
        for case in ("prefill", "decode")
        for metric in ("a", "b")
    ]
    (remarks,) = (
        part.items
        for part in screen_of(result.model_copy(update={"findings": tuple(findings)})).parts
        if isinstance(part, Bullets)
    )
    assert [line for line in remarks if "INCONCLUSIVE" in str(line)] == [f"{names}: INCONCLUSIVE, {undecided.text}"]


@pytest.mark.parametrize(
    "name",
    [
        "a|b <script>",
        "_x_ *y* ~~z~~",
        "`tick",
        "[a](b)",
        "line\nbreak\n\n# no",
        "\\|",
        "<!-- -->",
        "</details>",
        "&amp;",
    ],
)
def test_no_name_breaks_the_markdown(name: str) -> None:
    body = rendered(render_markdown(make_result({name: 0.1, "c": None})))
    head, *rows = cells_of(body)
    assert {len(row) for row in rows} == {len(head)}
    assert rows[0][0] == " ".join(name.split())
    assert {element.tag for element in body.iter()} <= {
        "body", "h2", "table", "thead", "tbody", "tr", "th", "td", "p", "ul", "li", "details", "summary", "strong",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shifts", "headline"),
    [
        ({"a": 0.0}, "OK: mean_ttft_ms is surely less than 5 % worse"),
        ({"a": 0.0, "b": 0.0}, "OK: each of 2 comparisons is surely less than 5 % worse"),
        ({"a": None, "b": 0.0}, "INCONCLUSIVE: 1 of 2 comparisons cannot be told, and nothing failed"),
        ({"a": 0.1}, "FAIL: mean_ttft_ms is 10.9 % worse"),
    ],
)
def test_the_headline_says_it_all(shifts: dict[str, float | None], headline: str) -> None:
    assert headline_of(make_result(shifts)) == headline


def test_many_failures_are_counted_in_the_headline() -> None:
    headline = headline_of(make_result(dict.fromkeys("abcd", 0.1)))
    assert headline.startswith("FAIL: a · mean_ttft_ms is ")
    assert headline.endswith("; and 2 more")


def test_a_candidate_that_did_not_run_is_said_once() -> None:
    result = make_result({"a": 0.1, "b": 0.0})
    died = {"verdict": Verdict.FAIL, "reason": Reason.CANDIDATE_FAILED, "case": "a"}
    findings = tuple(finding.model_copy(update=died) for finding in result.findings)
    assert headline_of(result.model_copy(update={"findings": findings})) == "FAIL: the candidate did not run"


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("output_throughput", 60.84, "60.84 tok/s"),
        ("request_throughput", 1.5, "1.500 req/s"),
        ("mean_ttft_ms", 845.23, "845.2 ms"),
        ("mean_ttft_ms", 12345.0, "12.35 s"),
        ("peak_memory_bytes", 712 * 2.0**20, "712 MiB"),
        ("mean_ttft_ms", float("nan"), "nan"),
        ("mean_ttft_ms", None, "–"),
    ],
)
def test_values_have_the_digits_that_a_margin_needs(metric: str, value: float | None, text: str) -> None:
    assert value_text(metric, value) == text


def test_a_sign_always_says_which_side_is_better() -> None:
    assert [signed(share) for share in (0.052, -0.003, 0.0004, -0.0004)] == ["+5.2 %", "-0.3 %", "0.0 %", "0.0 %"]


LONG = "a-config-whose-name-is-longer-than-the-terminal-is-wide-because-somebody-meant-it-well-{}"


@pytest.mark.parametrize(
    "result",
    [
        make_result(ALL),
        make_result({LONG.format(number): shift for number, shift in enumerate((0.0, 0.1, None) * 4)}),
        make_result({"score": None}, metric="total_token_throughput"),
    ],
    ids=["three", "twelve", "long"],
)
def test_the_screen_fits_into_80_columns(result: GateResult) -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(render_rich(screen_of(result)))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line for line in reversed(lines) if ": " in line).startswith(result.verdict.value)
    for finding in result.findings:
        # Where there is but one, its row goes without a name.
        assert (finding.case in out.getvalue().replace("\n", "")) == (len(result.findings) > 1)
        assert finding.verdict.value in out.getvalue()
    assert "A rate that falls is worse" in " ".join(out.getvalue().split())


def test_a_rate_that_falls_is_said_to_fall_in_every_form() -> None:
    """A candidate that takes half as much time again for a token puts a third less of them out."""
    result = make_result({"decode": -math.log(1.5)}, metric="output_throughput")
    (finding,) = result.findings
    assert finding.change is not None
    assert finding.change == pytest.approx(-1 / 3, abs=0.01)
    assert finding.change_interval is not None
    assert finding.change_interval[0] < finding.change < finding.change_interval[1] < 0
    lost = f"{-100 * finding.change:.1f} %"
    assert headline_of(result) == f"FAIL: output_throughput is {lost} worse"
    assert finding.text.startswith(f"{lost.replace(' ', '')} worse")
    assert f"change: -{lost} (margin -4.8 %)" in render_junit(result)
    assert f"| -{lost} |" in render_markdown(result)
    chart = differences_chart(result)
    assert chart is not None
    assert f"FAIL -{lost}" in chart.rows[0]
    (shift,) = (mark.xs[0] for mark in chart.marks if isinstance(mark, Dots) and mark.marker == "D")
    assert shift == pytest.approx(-100 * finding.change)


def test_junit_says_memory_in_its_unit() -> None:
    text = render_junit(make_result({"a": 0.1}, metric="peak_memory_bytes"))
    assert re.search(r"baseline: [\d.]+ MiB", text)


def test_the_plot_has_a_dot_for_every_pair_in_the_unit_of_its_axis() -> None:
    result = make_result(ALL)
    chart = differences_chart(result)
    assert chart is not None
    dots = [x for mark in chart.marks if isinstance(mark, Dots) and mark.marker == "o" for x in mark.xs]
    expected = [100 * math.expm1(one) for finding in result.findings for one in finding.differences]
    assert sorted(dots) == pytest.approx(sorted(expected))


def test_a_folder_holds_everything_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv(files.SUMMARY_VARIABLE, str(summary))
    result = make_result(ALL)
    files.write(result, tmp_path / "out", tmp_path / "alone.xml")
    assert GateResult.model_validate_json((tmp_path / "out" / "gate.json").read_bytes()) == result
    assert (tmp_path / "out" / "junit.xml").read_text() == (tmp_path / "alone.xml").read_text()
    assert (tmp_path / "out" / "differences.png").read_bytes().startswith(b"\x89PNG")
    assert summary.read_text() == "before\n" + render_markdown(result)


def test_nothing_that_is_there_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    files.refuse_places(tmp_path / "empty", tmp_path / "new.xml")
    with pytest.raises(ConfigError, match="not an empty folder"):
        files.refuse_places(tmp_path / "full", None)
    with pytest.raises(ConfigError, match="exists"):
        files.refuse_places(None, tmp_path / "full" / "notes.txt")
    with pytest.raises(ConfigError, match="there is no folder"):
        files.refuse_places(None, tmp_path / "nowhere" / "junit.xml")


def test_a_gate_without_any_difference_still_says_so(tmp_path: Path) -> None:
    result = make_result({"a": None}).model_copy(update={"findings": (), "verdict": Verdict.INCONCLUSIVE})
    files.write(result, tmp_path / "out", None)
    assert not (tmp_path / "out" / "differences.png").exists()
    assert "nothing was compared" in (tmp_path / "out" / "gate.md").read_text()
