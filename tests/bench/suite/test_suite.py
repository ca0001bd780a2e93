"""The suite under pytest-benchmark, as a user runs it: its file, what reads that, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.spec import Plan
from pipetune.tuner.gate.stored.read import read_benchmarks
from tests.tiny_models import save_tiny_model, tiny_prompts

ROOT = Path(__file__).parents[3]


def suite(*args: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipetune.bench.suite", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=folder,
        # pytest-benchmark measures nothing where it believes itself a worker of pytest-xdist.
        env={k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"} | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good/best_plan.json`, with prompts beside it, and `bad/best_plan.json` of too many layers."""
    root = tmp_path_factory.mktemp("plans")
    model = save_tiny_model(root / "model", "qwen3", 5)
    for name, counts in {"good": (3, 2), "bad": (3, 4)}.items():
        folder = root / name
        folder.mkdir()
        rows = [json.dumps({"prompt_token_ids": list(ids)}) for ids in tiny_prompts(8)]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
        plan = Plan.from_layer_counts(counts, ("cpu:0", "cpu:1"), 4).model_dump(mode="json")
        work = {"num_prompts": 8, "output_len": 4, "prompts_file": "prompts.jsonl"}
        document = {"plan": plan, "model": {"name": str(model)}, "workload": work, "metrics": {}}
        (folder / "best_plan.json").write_text(json.dumps(document))
    return root


def test_a_plan_gives_what_json_consumers_read_and_one_that_fails_gives_nothing(plans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ("--plan-rounds", 2, "--plan-iters", 1, "--benchmark-json", out)
    good, bad = plans / "good" / "best_plan.json", plans / "bad" / "best_plan.json"
    done = suite("--plan", good, "--plan", bad, *flags, folder=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "1 failed, 1 passed" in done.stdout
    assert "Traceback" not in done.stdout
    document: dict[str, Any] = json.loads(out.read_text())
    (entry,) = document["benchmarks"]
    # What github-action-benchmark reads of a file of pytest-benchmark.
    assert entry["fullname"] == "bench/suite/test_plans.py::test_plan[good/best_plan]"
    stats = entry["stats"]
    assert stats["rounds"] == 2
    assert all(stats[name] > 0 for name in ("ops", "mean", "stddev"))
    assert entry["options"]["timer"] == "measured_s"
    extra = entry["extra_info"]
    assert stats["data"] == pytest.approx([run["metrics"]["duration_s"] for run in extra["runs"]])
    assert extra["output_throughput"] > 0
    assert out.stat().st_size < 30_000
    ((name, stored),) = read_benchmarks(out).items()
    assert name == entry["name"]
    assert len(stored.samples) == 2
    assert stored.workload.prompts_sha256 is not None
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(out)],
        capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert "good/best_plan" in compared.stdout


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (None, (), "which plans? Give --plan FILE"),
        (None, ("--plan", "missing.json"), "missing.json: cannot read the plan"),
        ("{", ("--plan", "plan.json"), "plan.json: Expecting property name"),
        ("{}", ("--plan", "plan.json"), "plan: Field required"),
        ("{}", ("--plan", "plan.json", "--plan", "plan.json"), "two files would both be called"),
        ("{}", ("--plan", "plan.json", "--plan-rounds", "0"), "--plan-rounds 0: give 1 or more"),
        ("{}", ("--plan", "plan.json", "-n", "2"), "leave out -n"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error_without_a_traceback(
    tmp_path: Path, text: str | None, flags: tuple[str, ...], message: str
) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    done = suite(*flags, folder=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, said
    assert message in said
    assert "Traceback" not in said
