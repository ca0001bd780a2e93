"""The database that processes share: one at a time where they must agree, one clock, patience with short outages."""

import contextlib
import errno
import functools
import hashlib
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from urllib.parse import quote

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from pipetune.bench.errors import StorageError, StudyError
from pipetune.tuner.config.storage_url import connectable, is_postgresql, shown, sqlite_path
from pipetune.tuner.ranking.values import Objective

SHARED = "pipetune-shared-"
"""Begin of the names that shared studies have in a database."""
PATIENCE_S = 60.0
"""How long a database that was there is waited for."""
LOCKED_S = 600.0
"""How long an SQLite file that another program holds is waited for: a backup, a dashboard, a tool left open."""
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
_P = ParamSpec("_P")
_O = TypeVar("_O", bound="_OverDatabase")


class CorruptDatabaseError(StudyError):
    """An SQLite file that is damaged, or none at all."""


def open_storage(url: str, say: Callable[[str], None] = lambda text: None) -> optuna.storages.RDBStorage:
    """Opens an Optuna database; `say` is told once when an SQLite file is waited for, now or later. ConfigError: it is
    no URL, or the driver is missing; CorruptDatabaseError: an SQLite file that is damaged, which is left as it is;
    StudyError: it cannot be used, is held for `LOCKED_S`, or is another program's; no password is shown."""
    target = connectable(url)
    path = sqlite_path(target)
    held = f"another program holds it; it is waited for, up to {LOCKED_S:.0f} s"
    waiting: dict[str, Any] = {"timeout": _RETRY_S, "factory": _waiting(lambda: say(f"{path}: {held}"))}
    if path is not None and path.is_file() and path.stat().st_size:
        _check_file(path, url, waiting)
    # Optuna puts its schema's version into braces.
    optunas = target.replace("{", "{{").replace("}", "}}")
    try:
        if not is_postgresql(target):
            return optuna.storages.RDBStorage(optunas, engine_kwargs={"connect_args": waiting} if path else None)
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
    """The study of that name, made where it is not there yet; whether it `aims_at` the objectives is not looked at."""
    directions = [Objective(metric=metric).direction for metric in objectives]
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
        if study.metric_names is None and aims_at(study, objectives):
            study.set_metric_names(list(objectives))
    return study


def aims_at(study: optuna.Study, objectives: Sequence[str]) -> bool:
    """Whether as many values are wanted of its trials, each as high or as low."""
    wanted = [Objective(metric=metric).direction for metric in objectives]
    return [direction.name.lower() for direction in study.directions] == wanted


def _waiting(say: Callable[[], None]) -> type[sqlite3.Connection]:
    """Connections to an SQLite file that wait while another program holds it, and say so."""
    # Optuna tries again itself: all its attempts together wait no longer.
    since_s: float | None = None

    def patiently(work: Callable[..., Any]) -> Callable[..., Any]:
        def again(*args: Any) -> Any:
            nonlocal since_s
            while True:
                try:
                    done = work(*args)
                except sqlite3.OperationalError as error:
                    if not _is_locked(error) or (since_s and time.monotonic() >= since_s + LOCKED_S):
                        raise
                    if since_s is None:
                        say()
                    since_s = since_s or time.monotonic()
                    time.sleep(_RETRY_S / 10)
                else:
                    since_s = None
                    return done

        return again

    calls = {name: patiently(getattr(sqlite3.Cursor, name)) for name in ("execute", "executemany")}
    cursor = type("Cursor", (sqlite3.Cursor,), calls)
    commit = patiently(sqlite3.Connection.commit)
    opened = {"commit": commit, "cursor": lambda self, factory=cursor: sqlite3.Connection.cursor(self, factory)}
    return type("Connection", (sqlite3.Connection,), opened)


def _is_locked(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY")


_OPTUNAS = {"studies": "study_name", "version_info": "schema_version"}
"""Tables of an Optuna database, each with a column by which it is known."""


def _check_file(path: Path, url: str, waiting: Mapping[str, Any]) -> None:
    """Looks at an SQLite file without writing to it; one of Optuna's with a journal is left to Optuna to mend.
    CorruptDatabaseError where it is damaged, StudyError where it is another program's, or may be."""
    is_optunas = False
    # Whose a file is shows past locks and journals, and leaves none; whether it is whole shows only with them.
    for mode in ("immutable=1", "mode=ro"):
        found = "ok"
        try:
            opened = sqlite3.connect(f"file:{quote(str(path))}?{mode}", uri=True, **waiting)
            with contextlib.closing(opened), contextlib.closing(opened.cursor()) as cursor:
                names = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
                tables = {name for (name,) in cursor.execute(names)}
                columns = {name: {row[1] for row in cursor.execute(f"PRAGMA table_info({name})")} for name in _OPTUNAS}
                if mode == "mode=ro":
                    found = cursor.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if mode == "immutable=1":
                continue
            if error.sqlite_errorname not in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
                if is_optunas and not _is_locked(error):
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


@contextlib.contextmanager
def naming_losses(url: str) -> Iterator[None]:
    """A block in which a database that was there may fail: OSError names an SQLite file, StorageError another one."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        if (path := sqlite_path(url)) is not None:
            raise OSError(errno.EIO, reason(error), str(path)) from None
        raise StorageError(
            f"storage {shown(url)} was lost: {reason(error)}. What was measured is kept; once the database is back, "
            "go on by --resume"
        ) from None


class Database:
    """One shared study in PostgreSQL."""

    def __init__(self, url: str, name: str, objectives: Sequence[str]) -> None:
        """Connects for the study of that name, among others in the database; raises as `open_storage`."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.storage = open_storage(url)
        self.url = url
        self._study_name, self._objectives = f"{SHARED}{name}", objectives

    @functools.cached_property
    def study(self) -> optuna.Study:
        """The study; whoever is the first to ask for it has the database to itself."""
        return open_study(self.storage, self._study_name, self._objectives)

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
        now = sqlalchemy.text("SELECT extract(epoch FROM clock_timestamp())")
        with self.storage.engine.connect() as connection:
            return float(connection.execute(now).scalar_one())


class _OverDatabase(Protocol):
    @property
    def database(self) -> Database: ...


def patient(work: Callable[Concatenate[_O, _P], _T]) -> Callable[Concatenate[_O, _P], _T]:
    """A method that may be done twice, and is done again until its object's database answers; `StorageError` where it
    does not for `PATIENCE_S`."""

    @functools.wraps(work)
    def again(self: _O, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        database, deadline = self.database, time.monotonic() + PATIENCE_S
        with naming_losses(database.url):
            while True:
                try:
                    return work(self, *args, **kwargs)
                except (SQLAlchemyError, StorageInternalError):
                    database.storage.remove_session()
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(_RETRY_S)

    return again
