"""The demo: a study whose model fits on no device alone, shown again without workers, and what one device is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.fleet.supervisor import Supervisor
from pipetune.bench.record import Measurement
from pipetune.tuner.cli import run
from pipetune.tuner.commands import demo
from pipetune.tuner.study.files import load_study
from pipetune.tuner.study.plan_file import read_plan

DUMMY = Path("examples/dummy-llama-12l").resolve()
CAP = 75 * 2**20
SMALLER = {
    "MODEL": str(DUMMY),
    "LOAD_FORMAT": "dummy",
    "PROMPTS": "p.jsonl",
    "OUTPUT_LEN": "4",
    "PROFILE": "false",
    "MAX_MEMORY_PER_DEVICE": str(CAP),
}
"""A model without weights in place of the real one: too large for one worker, as that is."""


@pytest.mark.e2e
def test_a_demo_ends_in_a_pipeline_and_a_finished_one_is_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt_token_ids": [5, 6, 7, 8]}\n' * 8, encoding="utf-8")
    for name, value in SMALLER.items():
        monkeypatch.setenv(f"PIPETUNE_{name}", value)
    assert run(["demo"]) == 0
    first = capsys.readouterr()

    study = load_study(Path("results/demo"))
    plans = {
        role: [record.spec.plan for record in study.records if record.role == role and record.spec]
        for role in ("trial", "single_stage", "finalist")
    }
    assert {len(plan.stages) for plan in plans["trial"]} == {2}
    assert {stage.max_memory_bytes for plan in plans["trial"] for stage in plan.stages} == {CAP}
    assert [plan.stages[0].max_memory_bytes for plan in plans["single_stage"]] == [None]
    best = read_plan(Path("results/demo/best_plan.json")).plan
    assert [stage.device for stage in best.stages] == ["cpu:0", "cpu:1"]
    names = json.loads(Path("results/demo/best_device_map.json").read_text(encoding="utf-8"))
    assert set(names.values()) == {"cuda:0", "cuda:1"}
    for record in study.records:
        if record.role == "trial" and isinstance(record.result, Measurement):
            assert all(stage.cap_bytes == CAP for stage in record.result.memory)
    assert first.out.count("What to type next") == 1
    assert "\nNext\n" not in first.out
    for told in ("stage 1 cpu:1", '"model.layers.0-', f"bench --plan {Path('results/demo/best_plan.json')}"):
        assert told in first.out
    assert max(map(len, first.out.splitlines())) <= 80

    def refuse(*args: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(Supervisor, "start", refuse)
    assert run(["demo"]) == 0
    # What the reports took is known once they are written.
    again, shown = (re.sub(r"\d+\s%\sof\s[\d.]+\ss", "", text) for text in (capsys.readouterr().out, first.out))
    assert again == shown


@pytest.mark.parametrize(
    ("there", "devices", "told"),
    [
        (("cuda:0",), "devices: ['cpu:0', 'cpu:1']", "nothing can be pipelined over cuda:0 alone"),
        (("cpu:0", "cpu:1"), "devices: ['cpu:0', 'cpu:1']", ""),
    ],
)
def test_one_device_is_told_that_it_makes_no_pipeline(
    there: tuple[str, ...],
    devices: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "available_devices", lambda: there)
    assert run(["demo", "--show-config"]) == 0
    shown = capsys.readouterr()
    assert devices in shown.out
    assert told in shown.err
    assert bool(shown.err) == bool(told)
    assert run(["demo", "--show-config", "--devices", "cpu:1,cpu:3"]) == 0
    shown = capsys.readouterr()
    assert "devices: ['cpu:1', 'cpu:3']" in shown.out
    assert shown.err == ""
