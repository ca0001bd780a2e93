"""Whatever knows Optuna keeps to its public names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pipetune import tuner

ROOT = Path(tuner.__file__).parent
KNOWS_OPTUNA = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if "optuna" in path.read_text("utf-8"))


def private_names(source: str) -> list[str]:
    """Private attributes of anything but `self` and `cls`, and private names imported from Optuna."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "optuna":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [name for name in names if name.startswith("_")]
    return found


@pytest.mark.parametrize("path", KNOWS_OPTUNA, ids=str)
def test_no_private_attribute_is_used(path: Path) -> None:
    assert private_names((ROOT / path).read_text(encoding="utf-8")) == []


def test_private_attributes_are_noticed() -> None:
    assert private_names("self._study._study_id\ntrial._trial_id\nself._own\nfrom optuna.samplers._tpe import x") == [
        "_tpe",
        "self._study._study_id",
        "trial._trial_id",
    ]
    assert {path.name for path in KNOWS_OPTUNA} >= {"database.py", "optuna_study.py", "tpe.py"}
