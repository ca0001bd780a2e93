"""`pipetune gate` from outside: what it refuses before anything runs, and a whole gate with its files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipetune.bench.errors import ConfigError
from pipetune.bench.spec import Plan
from pipetune.tuner.cli import run
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.gate import python_env
from pipetune.tuner.gate.values import GateResult
from pipetune.tuner.stats.signed_rank import PAIRS
from tests.tiny_models import save_tiny_model

PLAN = Plan.from_layer_counts((2, 2), ("cpu:0", "cpu:1"), 2)
GATE = ("gate", "--baseline-plan", "plan.json", "--model", "m")
ENGINES = ("gate", "--baseline-plan", "engine.json", "--model", "m")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a plan, and configs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(PLAN.model_dump_json(), encoding="utf-8")
    of_engine = PLAN.model_dump(mode="json") | {"micro_batch_size": 1, "engine": {"name": "vllm"}}
    (tmp_path / "engine.json").write_text(json.dumps(of_engine), encoding="utf-8")
    (tmp_path / "strict.yaml").write_text("gate: {metrics: {ttft: {margin: 0.01}}}\n", encoding="utf-8")
    (tmp_path / "wrong.yaml").write_text("gate: {metrics: {speed: {}}}\n", encoding="utf-8")
    (tmp_path / "empty.yaml").write_text("gate: {metrics: {}}\n", encoding="utf-8")
    (tmp_path / "gap.yaml").write_text("gate: {metrics: {ttft: {margin: 0.01, least_effect: 0.5}}}\n", encoding="utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "strict.yaml").write_text("", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("gate",), "which plans?"),
        (("gate", "--baseline-plan", "none.json"), "none.json: cannot read the plan"),
        (("gate", "--baseline-plan", "plan.json"), "model.name: no model is given"),
        ((*GATE, "--metric", "speed"), "'speed' is no metric; there are ttft"),
        ((*GATE, "--margin", "2"), "--margin 2.0: Input should be less than 1"),
        ((*GATE, "--config", "wrong.yaml"), "'speed' is no metric"),
        ((*GATE, "--config", "empty.yaml"), "name one at least"),
        ((*GATE, "--config", "gap.yaml"), "what lies between could neither fail nor pass"),
        ((*GATE, "-c", "strict.yaml", "-c", "other/strict.yaml"), "two files are called strict"),
        ((*GATE, "--output-len", "1", "--metric", "tpot"), "mean_tpot_ms is not measured in default"),
        ((*GATE, "--devices", "cpu:0"), "wants cpu:1, and the devices are cpu:0"),
        ((*GATE, "--candidate-env", "A"), "write KEY=VALUE"),
        ((*GATE, "--candidate-env", "A=1", "--candidate-env", "A=2"), "A is given twice"),
        ((*GATE, "--candidate-env", "PIPETUNE_NUM_ITERS=9"), "what both sides are to do alike"),
        ((*GATE, "--baseline-ref", "HEAD", "--baseline-python", "python"), "give one"),
        ((*GATE, "--rounds-in-process", "--candidate-dtype", "bfloat16"), "model.dtype: float32 → bfloat16"),
        ((*GATE, "--rounds-in-process", "--baseline-env", "A=1"), "software or environment of its own"),
        ((*GATE, "--baseline-python", "/no/python"), "/no/python: cannot be run"),
        ((*GATE, "--baseline-python", "/bin/false"), "does not run Python code"),
        ((*GATE, "--baseline-ref", "no-such-revision"), "no such revision"),
        ((*GATE, "--baseline-engine-python", "p"), "the baseline's plan has no engine; give it engine: {name: vllm}"),
        (ENGINES, "baseline: vllm is to run 2+2 · vllm; name its Python by --baseline-engine-python"),
        ((*ENGINES, "--baseline-engine-python", "/no/python"), "engine_python: /no/python cannot be run"),
        (
            (*ENGINES, "--baseline-engine-python", "p", "--rounds-in-process"),
            "software or environment of its own",
        ),
        ((*GATE, "-o", "other"), "other exists and is not an empty folder"),
        (("gate", "--stored", "other", "--order-seed", "0"), "--stored and --order-seed: the baseline is stored"),
        (("gate", "old.json", "new.json", "--order-seed", "0"), "given are old.json new.json and --order-seed"),
        (("gate", "old.json", "new.json", "--max-minutes", "0"), "given are old.json new.json and --max-minutes"),
        (("gate", "old.json", "new.json", "--input-len", "8", "-o", "new"), "old.json new.json and --input-len"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    args: tuple[str, ...], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*args, "--no-progress"]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert captured.out == ""


def test_a_revision_needs_a_checkout(place: Path) -> None:
    with pytest.raises(ConfigError, match="is no git checkout of pipetune"):
        python_env.of_ref("HEAD", {}, repository=place)


def test_the_settings_are_shown_with_their_sources(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GATE, "--config", "strict.yaml", "--num-prompts", "5", "--show-config"]) == 0
    lines = {line.split(":")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["num_prompts"].endswith("# --num-prompts")
    assert "0.01" in lines["margin"]


def test_a_margin_takes_the_least_effect_with_it(place: Path) -> None:
    config = sources.resolve(file=place / "strict.yaml", flags={"model": "m"}, environ={}).config
    (tolerance,) = config.gate.metrics.values()
    assert (tolerance.margin, tolerance.least_effect) == (0.01, 0.01)


def test_the_gate_is_no_part_of_a_study(place: Path) -> None:
    plain = TuneConfig.model_validate({"model": {"name": "m"}})
    strict = sources.resolve(file=place / "strict.yaml", flags={"model": "m"}, environ={}).config
    assert sources.dump(strict) == sources.dump(plain)


class TestEnvironments:
    """Whose pipetune runs, by the path that a process is given."""

    def test_our_own_comes_before_what_a_user_puts_on_the_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", "/theirs")
        path = python_env.Interpreter(env={"PYTHONPATH": "/hook"}).environment["PYTHONPATH"]
        assert path == f"{python_env.ROOT}:/hook"
        assert python_env.Interpreter().environment["PYTHONPATH"] == f"{python_env.ROOT}:/theirs"

    def test_ours_does_not_hide_that_of_another_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", str(python_env.ROOT))
        assert "PYTHONPATH" not in python_env.Interpreter(python="p", root=None).environment

    def test_settings_from_the_environment_do_not_reach_a_side_a_second_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIPETUNE_NUM_ITERS", "9")
        monkeypatch.setenv("PIPETUNE_CACHE", "/cache")
        environment = python_env.Interpreter().environment
        assert "PIPETUNE_NUM_ITERS" not in environment
        assert environment["PIPETUNE_CACHE"] == "/cache"

    def test_a_revision_of_equal_requirements_runs_in_this_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIPETUNE_CACHE", str(tmp_path / "cache"))
        repository = tmp_path / "repository"
        repository.mkdir()

        def git(*args: str) -> str:
            identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
            command = ["git", "-C", str(repository), *identity, *args]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

        git("init", "-q")
        (repository / "pyproject.toml").write_text('[project]\nrequires-python = ">=3.11"\ndependencies = ["a"]\n')
        (repository / "constraints.txt").write_text("a==1\n")
        (repository / "code.py").write_text("old\n")
        git("add", ".")
        git("commit", "-qm", "old")
        (repository / "code.py").write_text("new\n")
        found = python_env.of_ref("HEAD", {}, repository=repository)
        assert found.python == sys.executable
        assert found.root is not None
        assert git("rev-parse", "HEAD") in found.root.parts
        assert (found.root / "code.py").read_text() == "old\n"
        assert python_env.of_ref("HEAD", {}, repository=repository) == found
        (repository / "constraints.txt").write_text("a==2\n")
        with pytest.raises(python_env.OutOfTime):
            python_env.of_ref("HEAD", {}, repository=repository, deadline=time.monotonic())


def test_a_whole_gate_writes_its_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(place / "tiny", "llama", 4)
    flags = ["--num-prompts", "2", "--input-len", "4", "--output-len", "2", "--num-iters", "1"]
    flags += ["--num-iters-warmup", "0", "--no-check", "--metric", "output_throughput", "--rounds-in-process"]
    flags += ["--margin", "0.9", "--order-seed", "3", "-o", "out", "--no-progress", "--json"]
    code = run([*GATE[:3], "--model", str(model), *flags])
    result = GateResult.model_validate_json(capsys.readouterr().out)
    assert code == result.exit_code == 0
    assert (result.method, result.order_seed) == ("running_fleet", 3)
    # On a machine that is disturbed it goes on to further looks.
    assert len(result.pairs) in PAIRS
    assert result.cannot_see
    assert json.loads((place / "out" / "gate.json").read_text()) == json.loads(result.model_dump_json())
    assert {path.name for path in (place / "out").iterdir()} == {
        "gate.json",
        "junit.xml",
        "gate.md",
        "differences.png",
    }
