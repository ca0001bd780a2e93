"""Flags of the suite, what is wrong with them, and a benchmark for every plan that they name."""

from pathlib import Path

import pytest

from pipetune.bench.errors import PipetuneError
from pipetune.bench.suite.case import PlanCase

ROUNDS = 8
ITERS = 3
CASES = pytest.StashKey[dict[str, PlanCase]]()
"""By the name of the benchmark."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the suite's flags."""
    group = parser.getgroup("pipetune", "pipetune: plans under pytest-benchmark")
    group.addoption("--plan", action="append", default=[], metavar="FILE", help="best_plan.json; may be repeated.")
    group.addoption("--plan-rounds", type=int, default=ROUNDS, help=f"Rounds of a plan, each a fresh fleet ({ROUNDS}).")
    group.addoption("--plan-iters", type=int, default=ITERS, help=f"Timed repetitions in a round ({ITERS}).")
    group.addoption(
        "--plan-no-check",
        action="store_true",
        help="Leave out the comparison with the unsplit model's output, as where that fits on no device.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marker known where pytest-timeout is not installed."""
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, where that is installed")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Reads the plans; UsageError for a flag or a plan that cannot be used, or where pytest-benchmark is missing."""
    config = session.config
    paths = [Path(text) for text in config.getoption("--plan")]
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the suite needs pytest-benchmark: pip install pytest-benchmark")
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("plans are measured one after the other, since they share devices; leave out -n")
    if not paths:
        raise pytest.UsageError("which plans? Give --plan FILE, the best_plan.json of a study; it may be repeated")
    for flag in ("--plan-rounds", "--plan-iters"):
        if config.getoption(flag) < 1:
            raise pytest.UsageError(f"{flag} {config.getoption(flag)}: give 1 or more")
    try:
        config.stash[CASES] = {name: PlanCase.read(path) for name, path in _named(paths).items()}
    except PipetuneError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Without any plan, as where a whole repository is collected, the test is skipped."""
    if "plan" in metafunc.fixturenames:
        cases: dict[str, PlanCase] = metafunc.config.stash.get(CASES, {})
        metafunc.parametrize("plan", list(cases))


@pytest.fixture
def plan_case(plan: str, request: pytest.FixtureRequest) -> PlanCase:
    """The plan of this benchmark's name."""
    return request.config.stash[CASES][plan]


def _named(paths: list[Path]) -> dict[str, Path]:
    """By the files' names without ending; with their folders where these are alike, as in `nightly/best_plan`."""
    stems = [path.stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{path.absolute().parent.name}/{stem}"
        for path, stem in zip(paths, stems, strict=True)
    ]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise pytest.UsageError(f"--plan: two files would both be called {doubled[0]}; rename one")
    return dict(zip(names, paths, strict=True))
