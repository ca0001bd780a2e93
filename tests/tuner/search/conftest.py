"""A PostgreSQL server for the tests of shared studies; they are skipped where none is installed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests import postgres

_names = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.Server]:
    programs = postgres.binaries()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed")
    with postgres.running(programs) as running:
        yield running


@pytest.fixture
def database(server: postgres.Server) -> str:
    """URL of an empty database."""
    return server.create_database(f"study_{next(_names)}")  # type: ignore[arg-type]
