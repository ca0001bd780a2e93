"""What a gate leaves behind, read back by those who will: a JUnit reader, Markdown tables, JSON, a picture."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from bench.errors import ConfigError
from tests.tuner.gate.results import make_result
from tuner.cli import gate_view
from tuner.gate.outputs import files
from tuner.gate.outputs.junit import render_junit
from tuner.gate.outputs.markdown import render_markdown
from tuner.gate.values import GateResult, Verdict

ALL = {"prefill": 0.0, "decode": 0.1, "short": None}


def test_junit_has_a_case_for_every_metric_and_never_skips() -> None:
    root = ET.fromstring(render_junit(make_result(ALL)).split("?>", 1)[1])
    assert {key: root.get(key) for key in ("tests", "failures", "errors")} == {
        "tests": "3",
        "failures": "1",
        "errors": "1",
    }
    found = {suite.get("name"): next(iter(suite.iter("testcase"))) for suite in root.iter("testsuite")}
    assert found["pipetune.gate.prefill"].find("failure") is None
    assert found["pipetune.gate.prefill"].find("error") is None
    failure = found["pipetune.gate.decode"].find("failure")
    assert failure is not None
    assert failure.get("type") == "worse"
    error = found["pipetune.gate.short"].find("error")
    assert error is not None
    assert error.get("type") == "out_of_time"
    assert next(root.iter("skipped"), None) is None
    properties = {one.get("name"): one.get("value") for one in root.iter("property")}
    assert properties["order_seed"] == "7"
    assert {"baseline.hardware_id", "candidate.hardware_id"} <= properties.keys()


def test_junit_survives_text_that_xml_cannot_say() -> None:
    result = make_result({"odd": 0.1})
    finding = result.findings[0].model_copy(update={"text": 'a <b> & "c" \x1b[31m \ud800'})
    root = ET.fromstring(render_junit(result.model_copy(update={"findings": (finding,)})).split("?>", 1)[1])
    failure = next(root.iter("failure"))
    assert failure.get("message") == 'a <b> & "c" �[31m �'


def test_markdown_is_one_table_that_no_name_can_break() -> None:
    text = render_markdown(make_result({"a|b <script>": 0.1, "c": 0.0}))
    assert text.startswith("## ❌ pipetune gate: FAIL (1 FAIL, 1 OK)")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {line.replace("\\|", "").count("|") for line in rows} == {10}
    assert "<script>" not in text
    assert "❌ FAIL" in rows[2]
    assert "✅ OK" in rows[3]
    assert "torch: 2.11.0 → 2.13.0" in text


def test_the_screen_fits_into_80_columns() -> None:
    out = io.StringIO()
    gate_view.show(make_result(ALL), Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("FAIL")
    assert "mean_ttft_ms" in out.getvalue()


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
    files.refuse_existing(tmp_path / "empty", tmp_path / "new.xml")
    with pytest.raises(ConfigError, match="not an empty folder"):
        files.refuse_existing(tmp_path / "full", None)
    with pytest.raises(ConfigError, match="exists"):
        files.refuse_existing(None, tmp_path / "full" / "notes.txt")
    with pytest.raises(ConfigError, match="there is no folder"):
        files.refuse_existing(None, tmp_path / "nowhere" / "junit.xml")


def test_a_gate_without_any_difference_still_says_so(tmp_path: Path) -> None:
    result = make_result({"a": None}).model_copy(update={"findings": (), "verdict": Verdict.INCONCLUSIVE})
    files.write(result, tmp_path / "out", None)
    assert not (tmp_path / "out" / "differences.png").exists()
    assert "nothing was compared" in (tmp_path / "out" / "gate.md").read_text()
