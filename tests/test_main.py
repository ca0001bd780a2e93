"""Files called like modules, where a command is started or beside a script: no command and no worker reads them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import pipetune
from tests.tiny_models import save_tiny_model

ROOT = Path(pipetune.__file__).resolve().parents[1]
EARLY = ("typing", "pathlib", "re", "enum", "random", "tempfile", "string", "ast", "inspect", "dataclasses")
"""Modules of Python's own that are loaded before the command runs, and not by Python itself."""
LATE = ("json", "logging", "torch", "transformers", "optuna", "numpy", "pydantic", "typer", "rich", "yaml", "pytest")
JOB = ("--devices", "cpu:0-1", "--num-prompts", "2", "--input-len", "4", "--output-len", "2", "--no-progress")


def hide(folder: Path, *names: str) -> None:
    """Puts modules there that end whoever reads them; every second one is a package."""
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        file = folder / f"{name}.py" if index % 2 == 0 else folder / name / "__init__.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text("raise SystemExit(f'{__file__} was read')\n", encoding="utf-8")


def python(*args: str | Path, cwd: Path, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=cwd, env=environment)


@pytest.mark.parametrize("safe", [(), ("-P",)])
@pytest.mark.parametrize(
    ("module", "args", "code", "said"),
    [
        ("pipetune", ("report", "none"), 2, "pipetune: none holds no study"),
        ("pipetune.bench.suite", ("--version",), 0, "pytest "),
    ],
)
def test_modules_where_a_command_is_started_are_not_read(
    module: str, args: tuple[str, ...], code: int, said: str, safe: tuple[str, ...], tmp_path: Path
) -> None:
    hide(tmp_path, *EARLY, *LATE)
    # Without what `site` loads, as where packages are installed and nothing runs at the start of Python.
    done = python(
        *safe, "-S", "-m", module, *args, cwd=tmp_path, path=f"{ROOT}{os.pathsep}{sysconfig.get_path('purelib')}"
    )
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr


@pytest.mark.slow
def test_no_worker_of_a_command_reads_modules_where_it_is_started(tmp_path: Path) -> None:
    hide(tmp_path, *LATE)
    save_tiny_model(tmp_path / "llama", "llama", 2)
    # An empty entry is the folder where Python is started, and comes before all packages.
    done = python("-m", "pipetune", "bench", "--model", "llama", "--layers", "1,1", *JOB, cwd=tmp_path, path=f":{ROOT}")
    assert done.returncode == 0, done.stderr
    assert "as the unsplit model says" in done.stdout


@pytest.mark.slow
def test_no_worker_of_a_script_reads_modules_beside_it(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "llama", "llama", 2)
    # Python itself reads what Python's own modules are called, for the script.
    hide(tmp_path / "own", "torch", "optuna", "transformers", "safetensors", "accelerate")
    (tmp_path / "own" / "serve.py").write_text(
        "from pipetune import Pipeline, Plan\n"
        "plan = Plan.from_layer_counts((1, 1), ('cpu:0', 'cpu:1'), 1)\n"
        "with Pipeline.start('llama', plan) as pipeline:\n"
        "    print(len(pipeline.generate([[5, 6, 7]], max_new_tokens=3, ignore_eos=True)[0].token_ids))\n",
        encoding="utf-8",
    )
    done = python(Path("own") / "serve.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


@pytest.mark.parametrize("name", ["json", "logging", "random"])
def test_a_module_that_leads_a_script_astray_is_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.py"
    file.write_text("", encoding="utf-8")
    (tmp_path / "serve.py").write_text("from pipetune import Pipeline\n", encoding="utf-8")
    done = python("serve.py", cwd=tmp_path)
    assert f"serve.py:1: RuntimeWarning: {file} hides Python's own module {name}: rename it" in done.stderr


def test_a_module_that_leads_a_command_astray_is_named(tmp_path: Path) -> None:
    file = tmp_path / "logging.py"
    file.write_text("", encoding="utf-8")
    done = python("-m", "pipetune", "report", "none", cwd=ROOT, path=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"pipetune: {file} hides Python's own module logging: rename it\n"
