"""What `make test-lowest` installs is what pyproject.toml allows, and no newer than what is tested."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.version import Version

from tests import lowest

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def test_floors_are_read_with_extras_and_upper_bounds() -> None:
    given = ["torch>=2.11", "pipetune[postgresql]", "psycopg[binary]>=3.2.1", "optuna>=5,<6", "PyYAML>=6.0.2"]
    assert lowest.floors(given) == {"psycopg": "3.2.1", "optuna": "5", "PyYAML": "6.0.2"}
    with pytest.raises(AssertionError, match="numpy: no lower bound"):
        lowest.floors(["numpy"])


def test_what_is_pinned_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pinned = {name.lower(): version for name, mark, version in (line.partition("==") for line in lines) if mark}
    lowest.main()
    printed = dict(line.split("==") for line in capsys.readouterr().out.splitlines())
    assert {"transformers", "optuna", "pydantic", "pytest", "psycopg"} <= printed.keys()
    assert all(Version(floor) <= Version(pinned[name.lower()]) for name, floor in printed.items())
