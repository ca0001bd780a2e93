"""Faults put into worker processes from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.proof.hook import write_hook


def break_workers(folder: Path, monkeypatch: pytest.MonkeyPatch, *, target: str, body: str) -> None:
    """Makes every worker started from now on run `body` (indented by four) on module `target` once it is imported.

    Args:
        folder: where the `sitecustomize.py` goes.
        body: lines of code that see the imported module as `module`.
    """
    write_hook(folder, target=target, body=body)
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{root}")
