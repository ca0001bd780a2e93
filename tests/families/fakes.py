"""Stands in for a survey in a process that must start quickly: no torch here."""

from __future__ import annotations

import os

from tests.families.result import Survey


def fake_survey(family: str) -> Survey:
    """Finds every family equal, but for one that ends the process."""
    if family == "crash":
        os._exit(7)
    return Survey(family=family, verdict="equal", max_error=0.0, notes=("a|b",))
