"""A rollout over CPU workers: the chain is predicted and measured, goes on where it was, and ends in four ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.spec import EffectivePlan, Plan
from pipetune.tuner.cli import run
from pipetune.tuner.commands.rollout import Predicted, Tried
from pipetune.tuner.planning.calibration.carried import half_width
from pipetune.tuner.study.plan_file import read_plan
from tests.tiny_models import save_tiny_model

SIZE = ("--num-prompts", "4", "--input-len", "8", "--output-len", "4", "--num-iters", "1", "--num-iters-warmup", "1")
SEARCH = ("--n-trials", "2", "--finalists", "1", "--finalist-rounds", "1", "--baseline-batch-sizes", "4")
FLEETS = ("--fleet", "cpu:0", "--fleet", "cpu:0-1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rollout that had no time for its gate."""
    folder = tmp_path_factory.mktemp("rollout")
    save_tiny_model(folder / "llama", "llama", 4)
    assert run(_arguments(folder)) == 3
    return folder


def _arguments(folder: Path, *more: str) -> list[str]:
    own = ("--top", "2", "--rounds", "2", "--max-minutes", "0", "--no-progress", "-o", str(folder / "out"))
    return ["rollout", "--model", str(folder / "llama"), *FLEETS, *SIZE, *SEARCH, *own, *more]


def _rollout(folder: Path) -> Any:
    return json.loads((folder / "out" / "rollout.json").read_text(encoding="utf-8"))


def _widen(folder: Path, width: float) -> None:
    path = folder / "out" / "fleet-1.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"half_width": width}), encoding="utf-8")


@pytest.mark.slow
def test_the_next_fleet_is_predicted_and_its_plans_are_measured_by_rounds(folder: Path) -> None:
    out = folder / "out"
    predicted = json.loads((out / "fleet-1.json").read_text(encoding="utf-8"))
    assert predicted["devices"] == ["cpu:0", "cpu:1"]
    assert predicted["made_from"].startswith("the profile of cpu:0, ")
    found = _rollout(folder)
    assert found["first_devices"] == ["cpu:0"]
    (fleet,) = found["fleets"]
    assert [len(one["measured"]) for one in fleet["tried"]] == [2, 2]
    values = [one["predicted"]["value"] for one in fleet["tried"]]
    assert values == sorted(values, reverse=True)
    assert all(one["low"] < one["predicted"]["value"] < one["high"] for one in fleet["tried"])
    assert (out / "rollout.html").is_file()
    assert not (out / "promoted_plan.json").exists()


@pytest.mark.slow
def test_it_goes_on_with_what_is_there_and_ends_by_what_was_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = sorted((folder / "out").glob("*/records/*.json"))
    written = [path.stat().st_mtime_ns for path in records]
    _widen(folder, 1e-9)
    assert run(_arguments(folder)) == 3
    assert "the prediction did not carry" in capsys.readouterr().out
    _widen(folder, 50.0)
    assert run(_arguments(folder)) == 3
    shown = capsys.readouterr().out
    said = " ".join(shown.split())
    assert f"the gate against what runs today says INCONCLUSIVE; to run it again, remove {folder}" in said
    assert max(map(len, shown.splitlines())) <= 80
    best = _rollout(folder)["best"]["predicted"]["effective"]["plan"]
    today = folder / "today.json"
    today.write_text(json.dumps(best), encoding="utf-8")
    assert run(_arguments(folder, "--today", str(today), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["promoted"] is True
    promoted = read_plan(folder / "out" / "promoted_plan.json")
    assert promoted.plan == read_plan(today).plan
    assert promoted.metrics.keys() == promoted.predicted.keys() == {"output_throughput"}
    assert [path.stat().st_mtime_ns for path in records] == written
    assert sorted((folder / "out").glob("*/records/*.json")) == records


@pytest.mark.slow
def test_plans_that_all_break_a_constraint_end_the_chain_before_they_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "out" / "tune", tmp_path / "out" / "tune")
    given = [*_arguments(folder)[:-1], str(tmp_path / "out"), "--constraint", "mean_ttft_ms<=0.001"]
    assert run(given) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "fleet cpu:0,cpu:1: every plan is predicted to break mean_ttft_ms<=0.001" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tune"]


@pytest.mark.slow
def test_the_first_fleet_may_run_a_model_with_fewer_layers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "llama" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}), encoding="utf-8")
    small = ("--first-model", str(tmp_path / "small"))
    assert run([*_arguments(folder)[:-1], str(tmp_path / "out"), *small]) == 3
    shown = capsys.readouterr().out
    assert "2 layers" in shown
    assert max(map(len, shown.splitlines())) <= 80
    found = _rollout(tmp_path)
    assert found["first_model"] == str(tmp_path / "small")
    assert [stage["end_layer"] for stage in found["first_plan"]["stages"]] == [2]
    (fleet,) = found["fleets"]
    assert fleet["made_from"].endswith(", and 0 runs")
    for one in fleet["tried"]:
        assert one["predicted"]["effective"]["plan"]["stages"][-1]["end_layer"] == 4
        assert len(one["measured"]) == 2
    predicted = json.loads((tmp_path / "out" / "fleet-1.json").read_text(encoding="utf-8"))
    assert predicted["half_width"] == pytest.approx(2 * half_width([]))
    # Whoever leaves it out asks for another study.
    assert run([*_arguments(folder)[:-1], str(tmp_path / "out")]) == 2
    assert "it is of " in capsys.readouterr().err


@pytest.mark.slow
def test_other_fleets_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["cpu:1-2" if one == "cpu:0-1" else one for one in _arguments(folder)]
    assert run(other) == 2
    assert "it is of cpu:0,cpu:1, and --fleet says cpu:1,cpu:2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fleets", "message"),
    [
        (("cpu:0",), "1 given; name two or more"),
        (("cpu:0-1", "cpu:0"), "it is smaller than the one before"),
        (("cpu:0", "disk:1"), "--fleet: "),
    ],
)
def test_fleets_that_cannot_be_are_refused_before_anything_starts(
    fleets: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for fleet in fleets for flag in ("--fleet", fleet)]
    assert run(["rollout", "--model", "m", *flags, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(60.0, 150.0, "the prediction held"), (2.0, 5000.0, "the prediction, good to a factor of 50, says little")],
)
def test_a_wide_interval_is_no_success(low: float, high: float, said: str) -> None:
    plan = EffectivePlan(plan=Plan.from_layer_counts((4,), ("cpu:0",), 2), in_flight=1)
    one = Tried(predicted=Predicted(effective=plan, value=100.0), low=low, high=high, measured=(90.0,))
    assert one.is_within
    assert one.held == said


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rollout", "--model", "m", *FLEETS, "-o", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)
    assert [step["leaves"] for step in steps] == [
        *("tune/best_plan.json", "fleet-1.json", "fleet-1", "gate/gate.json", "promoted_plan.json")
    ]
    assert not any(step["done"] for step in steps)
    assert not (tmp_path / "out").exists()
