"""Flags of the suite, and a benchmark for every plan that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import PipetuneError
from bench.suite.case import PlanCase

ROUNDS = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pipetune", "pipetune: plans under pytest-benchmark")
    group.addoption("--plan", action="append", default=[], metavar="FILE", help="best_plan.json; may be repeated.")
    group.addoption(
        "--plan-rounds", type=int, default=ROUNDS, help=f"Rounds of a plan, each a fresh fleet ({ROUNDS})."
    )
    group.addoption("--plan-iters", type=int, default=3, help="Timed repetitions in a round (3).")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "plan_case" not in metafunc.fixturenames:
        return
    paths = [Path(text) for text in metafunc.config.getoption("--plan")]
    if not paths:
        raise pytest.UsageError("which plans? Give --plan FILE, the best_plan.json of a study; it may be repeated")
    try:
        cases = [PlanCase.read(path) for path in paths]
    except PipetuneError as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize("plan_case", cases, ids=_names(paths))


def _names(paths: list[Path]) -> list[str]:
    """The files' names without ending; with their folders where these are alike, as in `nightly/best_plan`."""
    stems = [path.stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{path.absolute().parent.name}/{stem}"
        for path, stem in zip(paths, stems, strict=True)
    ]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise pytest.UsageError(f"--plan: two files would both be called {doubled[0]}; rename one")
    return names
