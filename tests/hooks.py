"""Faults put into worker processes from outside: a `sitecustomize` on their path changes one module as it is imported.

The product has no test switch; a worker is broken the way a bad machine would break it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TEMPLATE = """
import importlib.util
import sys

TARGET = {target!r}


def patch(module):
{body}


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


def break_workers(folder: Path, monkeypatch: pytest.MonkeyPatch, *, target: str, body: str) -> None:
    """Makes every worker started from now on run `body` (indented by four) on module `target` once it is imported.

    Args:
        folder: where the `sitecustomize.py` goes.
        body: lines of code that see the imported module as `module`.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(TEMPLATE.format(target=target, body=body), encoding="utf-8")
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{root}")
