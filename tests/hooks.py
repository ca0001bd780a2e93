"""Changes one module in processes that start later, from outside: a `sitecustomize` on their path.

The product has no switch for faults: a worker is broken, or slowed, the way a bad machine would do it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_TEMPLATE = """
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


def write_hook(folder: Path, *, target: str, body: str) -> None:
    """Makes every Python that has the folder on its `PYTHONPATH` run `body` on a module once it is imported.

    Args:
        folder: where the `sitecustomize.py` goes; made if it is not there.
        target: the module's name.
        body: lines of code, indented by four, that see the module as `module`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_TEMPLATE.format(target=target, body=body), encoding="utf-8")


def break_workers(folder: Path, monkeypatch: pytest.MonkeyPatch, *, target: str, body: str) -> None:
    """Makes every worker started from now on run `body` on module `target`; arguments as of `write_hook`."""
    write_hook(folder, target=target, body=body)
    root = Path(__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{root}")
