"""The lowest versions that pyproject.toml allows, as pip's constraints: `python -m tests.lowest`.

What is not named there, packages of packages, pip takes the newest of. torch is left out: `make test-lowest` takes the
version that is tested, since builds of older ones for CPUs are not at hand everywhere.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

LEFT_OUT = frozenset({"pipetune", "torch"})
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def floors(requirements: list[str]) -> dict[str, str]:
    """The lower bound of every requirement; every one has to have one."""
    found = {}
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement)[0]
        if name not in LEFT_OUT:
            lower = re.search(r">=([\w.]+)", requirement)
            assert lower is not None, f"{requirement}: no lower bound"
            found[name] = lower[1]
    return found


def main() -> None:
    """Prints them, one a line."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for name, version in floors(project["dependencies"] + extras["postgresql"] + extras["test"]).items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
