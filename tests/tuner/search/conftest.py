"""A cache of profiles for each test, and a PostgreSQL server for shared studies: skipped where none is installed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests import postgres

_names = itertools.count()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles of simulated machines are nobody else's."""
    monkeypatch.setenv("PIPETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.Server]:
    programs = postgres.binaries()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed")
    with postgres.running(programs) as running:
        yield running


@pytest.fixture
def database(server: postgres.Server) -> Iterator[str]:
    """URL of an empty database."""
    name = f"study_{next(_names)}"
    yield server.create_database(name)
    server.drop_database(name)
