"""What a driver leaves behind, and what it sweeps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipetune.bench.fleet import supervisor


def test_only_folders_of_drivers_that_died_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    own, other = os.getpid(), gone.pid
    began = supervisor._began(own)
    left = {
        f"pipetune-{other}-dead": f"{other} 5",
        f"pipetune-{own}-reborn": f"{own} 5",
        f"pipetune-{own}-alive": f"{own} {began}",
        "pipetune-20261128-llama": None,
        f"pipetune-{other}-renamed": f"{own} {began}",
        f"pipetune-{other}-unreadable": "who knows",
    }
    for name, mark in left.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "ranking.md").write_text("weeks of work")
        if mark is not None:
            (tmp_path / name / supervisor._OWNER_FILE).write_text(mark)
    (tmp_path / "pipetune-0.1.0-py3-none-any.whl").write_bytes(b"")
    (tmp_path / f"pipetune-{other}-link").symlink_to(tmp_path / f"pipetune-{other}-dead", target_is_directory=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    supervisor._sweep_leftovers()
    swept = {f"pipetune-{other}-dead", f"pipetune-{own}-reborn"}
    there = {path.name for path in tmp_path.iterdir()}
    assert there == (left.keys() - swept) | {"pipetune-0.1.0-py3-none-any.whl", f"pipetune-{other}-link"}
    assert began is not None
