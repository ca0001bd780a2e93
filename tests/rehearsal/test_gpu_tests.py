"""The tests that need a GPU run to their last line on a stubbed one, so that none fails for its own fault there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal.conftest import IS_WHOLE, ROOT, UseMachine
from tests.rehearsal.stub.machine import StubMachine

NEEDS_A_REAL_ONE = "tests/bench/runtime/test_links.py::test_work_behind_a_mark_waits_for_it_and_for_nothing_else"
"""Compute that goes on while the host does is nothing that a stub has."""


def test_gpu_tests_pass(use_machine: UseMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_machine(StubMachine.alike(2))
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'GPU 0: stubbed'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
            *("--deselect", NEEDS_A_REAL_ONE, "tests/bench"),
            *(() if IS_WHOLE else ("-k", "not (qwen3 or gpt2 or bfloat16)")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
