"""The database that processes share: one at a time where they must agree, one clock, patience with short outages."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from pipetune.bench.errors import StorageError, StudyError
from pipetune.tuner.config.storage_url import connectable, is_postgresql, shown, sqlite_path
from pipetune.tuner.ranking.values import Objective

PATIENCE_S = 60.0
"""How long a database that was there is waited for."""
_RETRY_S = 1.0
_LOCK_S = 60
"""Nobody needs the lock for so long: whoever seems to is cut off by the server."""
_CONNECTION = {
    "connect_timeout": 10,
    # A host that went away silently is noticed in about a minute.
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_T = TypeVar("_T")


class CorruptDatabaseError(StudyError):
    """An SQLite file that is damaged, or none at all."""


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Opens an Optuna database.

    Raises:
        ConfigError: it is no URL, or the driver is missing.
        CorruptDatabaseError: an SQLite file that is damaged; it is left as it is.
        StudyError: it cannot be used, or is another program's; no password is shown.
    """
    target = connectable(url)
    path = sqlite_path(target)
    if path is not None and path.is_file() and path.stat().st_size:
        _check_file(path, url)
    # Optuna puts its schema's version into braces.
    optunas = target.replace("{", "{{").replace("}", "}}")
    try:
        if not is_postgresql(target):
            return optuna.storages.RDBStorage(optunas)
        kwargs: dict[str, Any] = {"pool_pre_ping": True}
        if "+psycopg" in target.partition(":")[0]:
            kwargs["connect_args"] = dict(_CONNECTION)
        engine = sqlalchemy.create_engine(target, **kwargs)
        try:
            # Of two processes that come to an empty database at once, one makes the tables.
            with engine.begin() as connection:
                _lock(connection, "pipetune")
                return optuna.storages.RDBStorage(optunas, engine_kwargs=kwargs)
        finally:
            engine.dispose()
    except Exception as error:
        raise StudyError(f"storage {shown(url)}: cannot be used: {reason(error)}") from None


def open_study(storage: optuna.storages.RDBStorage, name: str, objectives: Sequence[str]) -> optuna.Study:
    """The study of that name, made where it is not there yet."""
    directions = [Objective(metric=metric).direction for metric in objectives]
    return optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)


_OPTUNAS = {"studies": "study_name", "version_info": "schema_version"}
"""Tables of an Optuna database, each with a column by which it is known."""


def _check_file(path: Path, url: str) -> None:
    """Looks at an SQLite file without writing to it; one of Optuna's that is busy is left to Optuna to say.

    Raises:
        CorruptDatabaseError: it is damaged.
        StudyError: it is another program's, or may be.
    """
    is_optunas = False
    # Whose a file is shows past locks and journals, and leaves none; whether it is whole shows only with them.
    for mode in ("immutable=1", "mode=ro"):
        found = "ok"
        try:
            with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?{mode}", uri=True)) as connection:
                names = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
                tables = {name for (name,) in connection.execute(names)}
                columns = {
                    table: {row[1] for row in connection.execute(f"PRAGMA table_info({table})")} for table in _OPTUNAS
                }
                if mode == "mode=ro":
                    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if mode == "immutable=1":
                continue
            if error.sqlite_errorname not in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
                if is_optunas:
                    return
                raise StudyError(
                    f"storage {shown(url)}: cannot be looked at: {error}; it may be another program's, and was left as "
                    "it is; wait until nobody uses it, or name a new file"
                ) from None
            found, tables, columns = str(error), set(), {}
        if tables and any(column not in columns[table] for table, column in _OPTUNAS.items()):
            raise StudyError(
                f"storage {shown(url)}: holds tables of another program ({', '.join(sorted(tables)[:3])}), and was "
                "left as it is; name a new file, or one of Optuna's"
            )
        if found != "ok":
            raise CorruptDatabaseError(
                f"storage {shown(url)}: is damaged or no database: {found}; name another by --storage, or move this "
                "one away: a resumed study builds its database anew from the records"
            )
        is_optunas = bool(tables)


def _lock(connection: sqlalchemy.Connection, name: str) -> None:
    """Waits for a name, which is then held until the transaction ends, over all processes of the database."""
    for setting in ("lock_timeout", "idle_in_transaction_session_timeout"):
        connection.execute(sqlalchemy.text(f"SET LOCAL {setting} = '{_LOCK_S}s'"))
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
    connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def reason(error: BaseException) -> str:
    """What the database said, without the wrapping; drivers name hosts and users, never passwords."""
    inner: BaseException | None = error
    while inner is not None and not getattr(inner, "orig", None):
        inner = inner.__cause__
    said = str(getattr(inner, "orig", None) or error).strip()
    return " ".join(line.strip() for line in said.splitlines()) or type(error).__name__


class Database:
    """One shared study in PostgreSQL."""

    def __init__(self, url: str, name: str) -> None:
        """Connects.

        Args:
            name: of the study, among others in the database.

        Raises:
            ConfigError: it is no URL, or the driver is missing.
            StudyError: it cannot be used.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.storage = open_storage(url)
        self._url = url
        self._study_name = f"pipetune-shared-{name}"
        self._study: optuna.Study | None = None

    def open(self, objectives: Sequence[str]) -> None:
        """Opens the study, or makes it."""
        self._study = open_study(self.storage, self._study_name, objectives)

    @property
    def study(self) -> optuna.Study:
        """The study, once it is open."""
        assert self._study is not None, "the study is opened first"
        return self._study

    def close(self) -> None:
        """Ends the connections."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no other process of the study is within such a block."""
        with self.storage.engine.begin() as connection:
            _lock(connection, self._study_name)
            yield

    def now_s(self) -> float:
        """Seconds since the epoch by the server's clock, the only one that all processes share."""
        with self.storage.engine.connect() as connection:
            return float(
                connection.execute(sqlalchemy.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
            )

    def attributes(self) -> dict[str, Any]:
        """What the study holds beside its trials."""
        return self.study.user_attrs

    def set(self, key: str, value: Any) -> None:
        """Sets one of them."""
        self.study.set_user_attr(key, value)

    def patiently(self, work: Callable[[], _T]) -> _T:
        """Does something that may be done twice, again until the database answers.

        Raises:
            StorageError: it did not for `PATIENCE_S`.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return work()
            except (SQLAlchemyError, StorageInternalError) as error:
                self.storage.remove_session()
                if time.monotonic() >= deadline:
                    raise StorageError(
                        f"storage {shown(self._url)} was lost: {reason(error)}. What was measured is kept; once the "
                        "database is back, go on by --resume"
                    ) from None
                time.sleep(_RETRY_S)
