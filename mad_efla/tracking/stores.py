"""Where MLflow keeps runs: addresses, local SQLite databases, locks, and what can go wrong.

A local store is made whole or not at all, and one that this version of MLflow cannot use is refused
with the cure and left as it is. Locks are files that a process locks, so that they die with it.
"""

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from mad_efla.config import ConfigError

_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")


class Problem(Exception):
    """A store that cannot be used; the text holds value, rule and cure."""


class Late(Exception):
    """The time is over, or another process has the store."""


def resolve_uri(option: str | None) -> str:
    """Choose the MLflow store: the option, else MLFLOW_TRACKING_URI, else ./mlflow.db.

    Raises:
        ConfigError: It is neither a server nor a database.
    """
    given = option or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    source = "--tracking-uri" if option else "MLFLOW_TRACKING_URI"
    if given.startswith("sqlite:"):
        path = given.removeprefix("sqlite:///")
        if path in (given, "", ":memory:"):
            raise ConfigError(f"{source} {given}: must name a file, as in sqlite:///mlflow.db")
        return f"sqlite:///{Path(path).absolute()}"
    if given.split(":")[0] == "databricks" or ("://" in given and not given.startswith(("file:", "."))):
        return given
    raise ConfigError(
        f"{source} {given}: must be a server or a database, as in http://localhost:5000 or sqlite:///mlflow.db"
    )


def is_server(uri: str) -> bool:
    """Say whether a store is behind an address, and keeps its artifacts itself."""
    return uri.startswith(("http://", "https://"))


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a local store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def artifacts(uri: str) -> Path:
    """Return where a local store keeps artifacts: beside the database."""
    path = sqlite_path(uri)
    return (path.parent if path else Path.cwd()) / "mlartifacts"


def without_password(text: str) -> str:
    """Return a text that may be shown: addresses in it lose user and password."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def explain(error: Exception, uri: str, out: Path) -> str:
    """Put into one sentence why MLflow is not up to date, and what helps."""
    where = without_password(uri)
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, Problem):
        why = str(error)
    elif isinstance(error, Late):
        why = f"MLflow at {where} is not up to date yet, the time was over"
    elif "malformed" in str(error) or "not a database" in str(error):
        why = _damaged(sqlite_path(uri) or where)
    elif is_server(uri) and "API request to" in text:
        why = f"MLflow at {where} does not answer"
    else:
        why = f"MLflow at {where}: {without_password(text)[:200]}"
    return f"{why}; the runs are safe in {out}; `mad-efla sync` brings MLflow up to date later"


def in_time(deadline: float) -> None:
    """Let the caller go on until a time of the monotonic clock.

    Raises:
        Late: It is over.
    """
    if time.monotonic() > deadline:
        raise Late


@contextlib.contextmanager
def exclusive(uri: str, out: Path, deadline: float) -> Iterator[None]:
    """Be the only process that writes this store, or these runs to a server.

    Raises:
        Late: Another process has it beyond the deadline.
    """
    path = sqlite_path(uri)
    folder = path.parent if path else out
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / (f".{path.name}.lock" if path else ".mlflow.lock")).open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                in_time(deadline)
                time.sleep(0.1)
        yield


@contextlib.contextmanager
def live(out: Path, sweep: str) -> Iterator[None]:
    """Show other processes that this sweep goes on, by a lock that dies with this one."""
    (out / "sweeps").mkdir(parents=True, exist_ok=True)
    with (out / "sweeps" / f"{sweep}.lock").open("ab") as file:
        with contextlib.suppress(BlockingIOError):  # somebody is just asking
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def is_live(out: Path, sweep: str) -> bool:
    """Say whether a process is at this sweep."""
    path = out / "sweeps" / f"{sweep}.lock"
    if not path.exists():
        return False
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def prepare(path: Path) -> None:
    """Make an SQLite store that is not there; refuse one that cannot be used.

    Raises:
        Problem: It is damaged, no MLflow store, or of another schema.
    """
    if not path.exists() or path.stat().st_size == 0:
        _make(path)
        return
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from mlflow import __file__ as package
    from mlflow import __version__ as version

    found = _schema(path)
    known = ScriptDirectory(str(Path(package).parent / "store" / "db_migrations"))
    if found == known.get_current_head():
        return
    try:
        known.get_revision(found)
    except CommandError:
        raise Problem(
            f"{path}: its schema {found} is newer than MLflow {version} knows; install the newer "
            "MLflow, or name another store with --tracking-uri"
        ) from None
    raise Problem(
        f"{path}: its schema {found} is older than MLflow {version} needs; keep a copy and run "
        f"`mlflow db upgrade sqlite:///{path}`"
    )


def _schema(path: Path) -> str:
    """Read which revision of MLflow's schema a database has."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=10)) as database:
            rows = database.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            raise Problem(f"{path}: is a database, but no MLflow store; name another with --tracking-uri") from None
        raise Problem(f"{path}: {error}; name another store with --tracking-uri") from None
    except sqlite3.DatabaseError:
        raise Problem(_damaged(path)) from None
    return str(rows[0][0]) if rows else "none"


def _damaged(where: object) -> str:
    return f"{where}: is damaged, or no SQLite database; move it away and a new one is made"


def _make(path: Path) -> None:
    """Build a store aside and move it into place: a kill half way leaves nothing ruined.

    The caller holds the lock. MLflow's own way is to migrate in place, which fails when two
    processes do it at once, and leaves a database that no version opens when killed.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    store = SqlAlchemyStore(f"sqlite:///{aside}", str(artifacts(f"sqlite:///{path}")))
    store.engine.dispose()
    os.replace(aside, path)


_inside = threading.Lock()
_users = 0
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def mlflow_settings() -> Iterator[None]:
    """Keep MLflow quick to give up, and quiet, while any thread is inside; then as it was.

    What the user set in the environment stands.
    """
    global _users
    with _inside:
        if not _users:
            _undo.enter_context(_quick_and_quiet())
        _users += 1
    try:
        yield
    finally:
        with _inside:
            _users -= 1
            if not _users:
                _undo.close()


@contextlib.contextmanager
def _quick_and_quiet() -> Iterator[None]:
    fresh = {name: text for name, text in _SETTINGS.items() if name not in os.environ}
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    os.environ.update(fresh)
    try:
        import mlflow  # noqa: F401  # configures its loggers

        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for name in fresh:
            os.environ.pop(name, None)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
