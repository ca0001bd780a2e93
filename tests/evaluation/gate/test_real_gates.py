"""Real gates with a known answer: what runs in which order, how a candidate is slowed, and the table of it all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.evaluation.gate.real_gates import COUNTS, KINDS, SLOWDOWN, case_of, order, read, table
from tests.evaluation.harness import ROOT
from tests.hooks import write_hook
from tests.tuner.gate.results import make_result

PROBE = "from pipetune.bench.runtime.stage.stage import Stage; print(Stage.forward.__name__, Stage.forward.__module__)"


def test_kinds_follow_each_other_in_an_order_that_stays() -> None:
    names = order()
    assert Counter(name.rpartition("-")[0] for name in names) == COUNTS
    assert names == order()
    assert names != sorted(names)


def test_equal_sides_are_equal_and_slower_ones_differ_in_their_environment_alone(tmp_path: Path) -> None:
    equal = case_of("equal", tmp_path)
    assert equal.baseline.model_copy(update={"name": "candidate"}) == equal.candidate
    slower = case_of("slower-5", tmp_path / "hook")
    assert slower.candidate.model_copy(update={"env": {}}) == equal.candidate
    assert repr(KINDS["slower-5"]) in (tmp_path / "hook" / "sitecustomize.py").read_text()


def test_the_hook_changes_the_stage_of_its_processes_and_of_no_others(tmp_path: Path) -> None:
    write_hook(tmp_path, target="pipetune.bench.runtime.stage.stage", body=SLOWDOWN.format(share=0.1))

    def probed(path: str) -> str:
        return subprocess.run(
            [sys.executable, "-P", "-c", PROBE],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        ).stdout.strip()

    assert probed(f"{tmp_path}:{ROOT}") == "longer sitecustomize"
    assert probed(str(ROOT)) == "forward pipetune.bench.runtime.stage.stage"


def test_the_table_counts_verdicts_by_kind(tmp_path: Path) -> None:
    assert table(tmp_path) == ""
    for number, shift in enumerate((0.0, 0.001)):
        result = make_result({"equal": shift}, metric="output_throughput")
        (tmp_path / f"equal-{number:02}.json").write_text(result.model_dump_json())
    (tmp_path / "slower-10-00.json").write_text(
        make_result({"slower-10": -0.1}, metric="output_throughput").model_dump_json()
    )
    assert [len(results) for results in read(tmp_path).values()] == [2, 0, 1]
    rows = table(tmp_path).splitlines()[2:]
    assert rows[0].startswith("| equal sides | 2 | 0 | 2 | 0 |")
    assert rows[1].startswith("| stages work 10% longer | 1 | 1 | 0 | 0 |")
    assert rows[1].split("|")[6].strip().startswith("+1")
