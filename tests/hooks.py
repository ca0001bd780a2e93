"""Changes modules in processes that start later, from outside: a `sitecustomize` on their path.

The product has no switch for faults: a worker is broken, or slowed, the way a bad machine would do it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

_TEMPLATE = """
import importlib.util
import sys

PATCHES = {patches!r}


class Finder:
    def find_spec(self, name, path=None, target=None):
        body = PATCHES.pop(name, None)
        if body is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            exec(compile(body, f"<patch of {{name}}>", "exec"), {{"module": module, "__name__": __name__}})

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


def write_hooks(folder: Path, patches: Mapping[str, str]) -> None:
    """Makes every Python that has the folder on its `PYTHONPATH` run code on modules once they are imported.

    Args:
        folder: where the `sitecustomize.py` goes; made if it is not there.
        patches: by the module's name, lines of code that see the module as `module`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bodies = {name: textwrap.dedent(body) for name, body in patches.items()}
    (folder / "sitecustomize.py").write_text(_TEMPLATE.format(patches=bodies), encoding="utf-8")


def write_hook(folder: Path, *, target: str, body: str) -> None:
    """The same for one module."""
    write_hooks(folder, {target: body})


def break_workers(folder: Path, monkeypatch: pytest.MonkeyPatch, *, target: str, body: str) -> None:
    """Makes every worker started from now on run `body` on module `target`; arguments as of `write_hook`."""
    write_hook(folder, target=target, body=body)
    root = Path(__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{root}")
