"""The URL of a study's database: which driver opens it, how it is shown without its password, and who may share it."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from pipetune.bench.errors import ConfigError
from pipetune.tuner.config.schema import NO_NAME, STUDY_NAME, TuneConfig

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

_POSTGRESQL = frozenset({"postgresql", "postgres"})
_DRIVER = "psycopg"
_REMEDY = "give --storage postgresql://USER@HOST/DATABASE"
_ALONE = "or work alone by --shared-study ''"


def connectable(url: str) -> str:
    """The URL as SQLAlchemy takes it; `postgresql://` means the driver that pipetune brings. ConfigError where it is no
    URL, or that driver is not installed."""
    driver = _parse(url).drivername
    if driver in _POSTGRESQL:
        driver, url = f"postgresql+{_DRIVER}", f"postgresql+{_DRIVER}{url.removeprefix(driver)}"
    if driver == f"postgresql+{_DRIVER}" and importlib.util.find_spec(_DRIVER) is None:
        raise ConfigError(
            f"storage {shown(url)}: the driver for PostgreSQL is not installed; pip install 'pipetune[postgresql]'"
        )
    return url


def shown(url: str) -> str:
    """The URL for people: no password, and no parameters, since one of these may be a password too."""
    try:
        return _parse(url).set(query={}).render_as_string(hide_password=True)
    except ConfigError:
        return "URL"


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite database; None for other databases, and for one in memory."""
    parsed = _parse(url)
    in_memory = parsed.database in (None, "", ":memory:") or str(parsed.database).startswith("file:")
    return Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" and not in_memory else None


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file, whose path may hold any sign."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(path)).render_as_string()


def is_postgresql(url: str) -> bool:
    """Whether several processes can use the database at once."""
    return _parse(url).get_backend_name() in _POSTGRESQL


def check_sharing(config: TuneConfig) -> None:
    """Refuses to share a study without a database, or in one for a single process: by a ConfigError with the remedy."""
    if (name := config.shared_study) is None:
        return
    if not STUDY_NAME.fullmatch(name):
        raise ConfigError(f"shared_study: {name!r} {NO_NAME}")
    if config.storage is None:
        raise ConfigError(
            f"shared_study={name}: the processes meet in a database; {_REMEDY} (it is not kept in study.yaml, since "
            f"it may hold a password), {_ALONE}"
        )
    if not is_postgresql(config.storage):
        raise ConfigError(
            f"shared_study={name}: storage {shown(config.storage)} cannot be shared, SQLite and the like are for one "
            f"process; {_REMEDY}, {_ALONE}"
        )


def _parse(url: str) -> "URL":
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or "@" in (parsed.host or ""):
        # What the parser says, and what it takes for the host, may be a part of the password.
        raise ConfigError(
            "storage: cannot be read as a URL; write postgresql://USER@HOST:PORT/DATABASE, signs such as @ : / in a "
            "name or password as %40 %3A %2F"
        )
    return parsed
