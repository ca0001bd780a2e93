"""URLs of databases: the driver that opens them, and no password in anything that is shown or written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipetune.bench.errors import ConfigError
from pipetune.tuner.cli.app import app
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.config.storage_url import check_sharing, connectable, is_postgresql, shown

SECRET = "postgresql://me:hunter2@host:5432/db?sslpassword=hunter2"


def config(**values: Any) -> TuneConfig:
    return TuneConfig.model_validate({"model": {"name": "m"}, "devices": "cpu:0-1", **values})


@pytest.mark.parametrize("url", ["postgresql://h/d", "postgres://h/d"])
def test_postgresql_means_the_driver_that_pipetune_brings(url: str) -> None:
    assert connectable(url) == "postgresql+psycopg://h/d"


def test_other_drivers_and_databases_stay_as_they_are() -> None:
    assert connectable("postgresql+psycopg2://h/d") == "postgresql+psycopg2://h/d"
    assert connectable("sqlite:////a/b c/d.db") == "sqlite:////a/b c/d.db"
    assert is_postgresql("postgresql+psycopg2://h/d")
    assert not is_postgresql("mysql://h/d")


def test_a_password_goes_to_the_driver_and_nowhere_else() -> None:
    assert "hunter2" in connectable(SECRET)
    assert shown(SECRET) == "postgresql://me:***@host:5432/db"


@pytest.mark.parametrize("url", ["nonsense", "postgresql://me:hun@ter2@host/db", "postgresql://me:hunter2@host:x/db"])
def test_a_url_that_cannot_be_read_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"storage: cannot be read as a URL; write postgresql://") as caught:
        connectable(url)
    assert "ter2" not in str(caught.value)
    assert shown(url) == "URL"


def test_a_missing_driver_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pipetune\[postgresql\]'"):
        connectable("postgresql://h/d")


def test_an_empty_name_is_no_shared_study() -> None:
    check_sharing(config(shared_study=""))
    assert config(shared_study="").shared_study is None


def test_settings_are_shown_without_the_password(tmp_path: Path) -> None:
    flags = {"model": "m", "devices": "cpu:0-1", "storage": SECRET, "shared_study": "nightly"}
    resolved = sources.resolve(flags=flags, environ={})
    assert "storage: postgresql://me:***@host:5432/db" in sources.show(resolved)
    assert "hunter2" not in sources.dump(resolved.config)
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    printed = CliRunner().invoke(app, ["tune", *arguments, "--show-config", "--json", "-o", str(tmp_path / "s")])
    assert json.loads(printed.stdout)["config"]["storage"] == "postgresql://me:***@host:5432/db"
    assert "hunter2" not in printed.output
