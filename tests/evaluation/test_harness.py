"""What harnesses share: modules found from anywhere, exit codes, and a place in a document, the rest untouched."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pipetune.bench.errors import ConfigError
from tests.evaluation.harness import (
    ROOT,
    begin_mark,
    end_mark,
    exit_code_of,
    findable,
    module_command,
    put_between_marks,
)

HARNESSES = (
    "tests.evaluation.gate",
    "tests.evaluation.gpu",
    "tests.evaluation.gpu.section",
    "tests.evaluation.load",
    "tests.evaluation.load.worker",
    "tests.evaluation.peers",
    "tests.evaluation.peers.worker",
    "tests.evaluation.search",
    "tests.evaluation.search.finals_power",
)
COMMANDS = ("bench-peers", "bench-search", "bench-load", "bench-gate")


FORKING = """
import os, runpy, sys
import torch, transformers

for module in sys.argv[1:]:
    if (child := os.fork()) == 0:
        sys.argv = [module, "--help"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit(0)
    print(module, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Modules run as `python -m` runs them, in forks of a process that has loaded what takes them longest."""


@pytest.mark.slow
def test_harnesses_are_found_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise ImportError('of another project')\n")
    python = module_command("")[:-2]
    done = subprocess.run(
        [*python, "-c", FORKING, *HARNESSES],
        cwd=tmp_path,
        env=findable({**os.environ, "PYTHONPATH": ""}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = re.split(r"(?m)^(tests\.\S+) 0\n", done.stdout)
    assert said[1::2] == [*HARNESSES], done.stdout
    assert ["usage:" in text for text in said[::2]] == [True] * len(HARNESSES) + [False]


def test_the_checkout_comes_first_and_once() -> None:
    path = findable({"PYTHONPATH": f"elsewhere{os.pathsep}{ROOT}"})["PYTHONPATH"]
    assert path.split(os.pathsep) == [str(ROOT), "elsewhere"]


def test_errors_of_users_and_interruptions_have_their_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")

    def refuse() -> int:
        raise ConfigError("no such model")

    def interrupt() -> int:
        raise KeyboardInterrupt

    assert exit_code_of(refuse) == ConfigError.exit_code
    assert exit_code_of(interrupt) == 130
    assert exit_code_of(lambda: 3) == 3
    assert os.environ["PYTHONPATH"] == str(ROOT)
    assert "error: no such model" in capsys.readouterr().err


def test_the_rest_of_the_document_stays(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    begin, end = begin_mark("bench-peers"), end_mark("bench-peers")
    path.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    put_between_marks(path, "bench-peers", "new\n")
    put_between_marks(path, "bench-peers", "newer\n")
    assert path.read_text() == f"before\n{begin}\n\nnewer\n\n{end}\nafter\n"


def test_a_document_without_marks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    with pytest.raises(ConfigError, match="cannot be read"):
        put_between_marks(path, "bench-gate", "new\n")
    path.write_text("no marks")
    with pytest.raises(ConfigError, match="has no lines"):
        put_between_marks(path, "bench-gate", "new\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_our_document_has_the_marks(command: str) -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert 0 <= text.index(begin_mark(command)) < text.index(end_mark(command))
