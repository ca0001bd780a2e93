"""Profiles that nothing disturbed, whatever else the machine does while the tests run."""

from __future__ import annotations

from typing import Any

import pytest

from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.profile import Profile


def hush(monkeypatch: pytest.MonkeyPatch, *disturbances: str) -> None:
    """Lets fleets report these disturbances of a profile instead of what really was."""
    measured = Fleet.profile

    def profile(fleet: Fleet, *args: Any, **kwargs: Any) -> Profile:
        return measured(fleet, *args, **kwargs).model_copy(update={"disturbances": disturbances})

    monkeypatch.setattr(Fleet, "profile", profile)
