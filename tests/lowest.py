"""The lowest versions that pyproject.toml allows, as pip's constraints: `python -m tests.lowest`.

What pip would choose beyond the direct ones is its newest. torch is left out: builds of it for CPUs alone are few, and
the one that is at hand is taken.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = frozenset({"torch"})
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def floors(requirements: list[str]) -> dict[str, str]:
    """The lower bound of every requirement that has one."""
    found = {}
    for requirement in map(Requirement, requirements):
        lower = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if lower and requirement.name not in LEFT_OUT:
            found[requirement.name] = lower[0]
    return found


def main() -> None:
    """Prints them, one a line."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for name, version in floors(project["dependencies"] + extras["postgresql"] + extras["test"]).items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
