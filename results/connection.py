"""From a database URL to a migrated engine, and from driver errors to advice.

Owns URLs, pragmas, locks and migration. Knows nothing of what the tables hold.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import StaticPool

from results import schema
from results.errors import StoreError

BUSY_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10
FULL_DISK_BYTES = 1 << 20
_MIGRATION_LOCK = 0x0FF11E_5E1F  # key of PostgreSQL's advisory lock; any constant of our own

# Write-ahead logging needs memory shared between the processes, so one host. FUSE file systems
# are judged by what is behind them. Case does not matter.
# fmt: off
_NETWORK_FILESYSTEMS = frozenset(
    {
        "nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "lustre", "gpfs", "mmfs", "beegfs",
        "ceph", "afs", "panfs", "pvfs2", "orangefs", "glusterfs", "weka", "wekafs", "ncpfs",
        "coda", "davfs", "gfs2", "ocfs2", "daos", "3fs", "juicefs",
        "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.beegfs",
        "fuse.juicefs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.davfs", "fuse.smbnetfs",
        "fuse.dfuse", "fuse.orangefs", "fuse.moosefs", "fuse.mfs",
    }
)
# fmt: on


def parse_url(text: str) -> URL:
    """A SQLAlchemy URL with the driver we use.

    Accepts `sqlite:///relative`, `sqlite:////absolute`, `sqlite://` (in memory) and
    `postgresql://` or `postgresql+psycopg://`.

    Raises:
        StoreError: for anything else.
    """
    expected = (
        "expected sqlite:///path/to/results.db or postgresql://user:password@host:5432/database"
    )
    if not isinstance(text, str):
        raise TypeError(f"a database URL is a string, got {text!r}; {expected}")
    shown = mask(text)
    if "://" not in text:
        raise StoreError(
            f"{shown!r} is not a database URL; {expected}."
            + (f" For a file: sqlite:///{text}" if text else "")
        )
    try:
        url = make_url(text)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise StoreError(f"{shown!r} is not a database URL; {expected}") from error
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        if url.host:
            raise StoreError(
                f"{shown!r} has a host, which SQLite does not know: a path follows three slashes "
                "(sqlite:///relative.db) or four (sqlite:////absolute.db)"
            )
        if (url.database or "").startswith("file:") or url.query:
            raise StoreError(
                f"{shown!r}: SQLite's own URI options are set by this program; give only a path, "
                "as in sqlite:///results.db"
            )
        return url.set(drivername="sqlite+pysqlite")
    if url.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        if not url.database:
            raise StoreError(f"{shown!r} names no database; {expected}")
        return url.set(drivername="postgresql+psycopg")
    raise StoreError(f"{shown!r}: {url.drivername!r} is not supported; {expected}")


def mask(url: str) -> str:
    """The URL as written, without passwords."""
    url = re.sub(r"(://[^:/@?]*):[^@/]*@", r"\1:***@", url)
    return re.sub(r"(password=)[^&]*", r"\1***", url)


def without_password(url: URL) -> str:
    """How a database is named to people: no password, no query that could hold one."""
    query = {key: value for key, value in url.query.items() if "password" not in key.lower()}
    if url.password is not None:
        url = URL.create(url.drivername, url.username, None, url.host, url.port, url.database)
    url = url.set(drivername=url.get_backend_name(), query=query)
    return url.render_as_string(hide_password=True)


def open_engine(url: URL, read_only: bool = False) -> sa.Engine:
    """An engine on a database that exists and is at `schema.VERSION`.

    Raises:
        StoreError: if it is unreachable, not ours, not writable, newer than the code, or SQLite
            on a network file system.
    """
    if url.get_backend_name() == "postgresql":
        engine = _postgres_engine(url, read_only)
    else:
        engine = _sqlite_engine(url, read_only)
    try:
        with explain(url):
            if not _is_current(engine, url):
                if read_only:
                    raise StoreError(
                        f"{without_password(url)} is at version {_read_version(engine)!r}, this "
                        f"code reads {schema.VERSION!r}; open it once for writing to migrate it"
                    )
                _migrate(engine, url)
    except BaseException:
        engine.dispose()
        raise
    return engine


def version(engine: sa.Engine) -> str:
    """The newest migration that was applied."""
    return _read_version(engine) or ""


@contextlib.contextmanager
def explain(url: URL) -> Iterator[None]:
    """Turns the driver's errors into `StoreError` with advice."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise StoreError(_advice(url, error)) from error


def _advice(url: URL, error: sa.exc.DBAPIError) -> str:
    name = without_password(url)
    cause = " ".join(str(error.orig).split())
    if url.password:
        cause = cause.replace(str(url.password), "***")
    lower = cause.lower()
    if url.get_backend_name() == "sqlite":
        if "not a database" in lower or "malformed" in lower:
            return (
                f"{url.database} is not a SQLite database, or is damaged ({cause}). "
                "Check the path; if it is a damaged database, restore a copy or move it away and "
                "ingest the runs' spools again"
            )
        if "readonly" in lower or "read-only" in lower:
            return (
                f"{url.database} cannot be written ({cause}). Make the file and its folder "
                "writable, or open it with read_only=True"
            )
        if "unable to open" in lower:
            return f"{url.database} cannot be opened ({cause}). Check that path and permissions"
        if "locked" in lower or "busy" in lower:
            return (
                f"{url.database} was locked by another process for more than "
                f"{BUSY_TIMEOUT_S:.0f} s. Find who holds it (fuser {url.database}); many writers "
                "belong on PostgreSQL"
            )
        io_error = "disk i/o error" in lower  # SQLite says so too where its index finds no room
        if "disk is full" in lower or (io_error and _is_full(Path(str(url.database)))):
            return f"the disk that holds {url.database} is full: nothing was written; make room"
        if io_error:
            return (
                f"{url.database} could not be read or written ({cause}): nothing was written. "
                "Check the disk and its quota (dmesg, df), or use another one"
            )
    elif isinstance(error, sa.exc.OperationalError) and (
        error.connection_invalidated or "connection" in lower or "resolve" in lower
    ):
        return (
            f"cannot reach {name}: {cause}. Check that the server runs, and host, port, user, "
            "password and database in the URL"
        )
    return f"{name}: {cause}"


def _is_full(path: Path) -> bool:
    """Whether the disk of a file has less room than SQLite's index of a log may need."""
    try:
        return shutil.disk_usage(path.parent).free < FULL_DISK_BYTES
    except OSError:
        return False


# ---------------------------------------------------------------------------- SQLite


def _sqlite_engine(url: URL, read_only: bool) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        engine = sa.create_engine(
            url, poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
    else:
        path = Path(url.database).expanduser().absolute()
        if path.is_dir():
            raise StoreError(f"{path} is a folder; expected a file, such as {path / 'results.db'}")
        if read_only:
            engine = _read_only_sqlite_engine(url, path)
        else:
            filesystem = network_filesystem(path)
            if filesystem:
                raise StoreError(
                    f"{path} is on a network file system ({filesystem}), where SQLite's locks and "
                    "write-ahead log are not safe. Use a local disk, or PostgreSQL: "
                    "--db postgresql://user:password@host/database"
                )
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(
                    f"the folder {path.parent} cannot be made ({error.strerror}); "
                    "choose a writable place for the database"
                ) from error
            engine = sa.create_engine(
                url.set(database=str(path)), connect_args={"timeout": BUSY_TIMEOUT_S}
            )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A writer takes the write lock at once: a reader that turns into a writer half-way cannot
        # wait for another writer, it fails.
        reads = connection.get_execution_options().get("reads", False)
        connection.exec_driver_sql("BEGIN" if reads or read_only else "BEGIN IMMEDIATE")

    return engine


def _read_only_sqlite_engine(url: URL, path: Path) -> sa.Engine:
    if not path.exists():
        raise StoreError(f"{path} does not exist; nothing to read")
    # Write-ahead logging needs a writable folder even to read, unless whoever writes has the log
    # and its index open, or nobody does: only then the file alone is all there is.
    written = all(path.with_name(path.name + end).exists() for end in ("-wal", "-shm"))
    immutable = not os.access(path.parent, os.W_OK) and not written
    name = f"file:{quote(str(path))}?mode=ro" + ("&immutable=1" if immutable else "")
    return sa.create_engine(
        url.set(database=name).update_query_dict({"uri": "true"}),
        connect_args={"timeout": BUSY_TIMEOUT_S},
    )


def network_filesystem(path: Path, mounts: str | None = None) -> str | None:
    """The type of the network file system that holds `path`, or None.

    Args:
        path: need not exist yet.
        mounts: the text of /proc/mounts; read from there by default, and where there is no such
            file (not Linux) nothing is known and None is returned.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text(errors="surrogateescape")
        except OSError:
            return None
    place = Path(os.path.realpath(path))
    deepest, found = -1, None
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # Spaces, tabs, newlines and backslashes in names are written as octal escapes.
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        # >= : of two mounts on one folder the later one is seen.
        if (place == point or point in place.parents) and len(point.parts) >= deepest:
            deepest, found = len(point.parts), fields[2].lower()
    return found if found in _NETWORK_FILESYSTEMS else None


# ---------------------------------------------------------------------------- PostgreSQL


def _postgres_engine(url: URL, read_only: bool) -> sa.Engine:
    arguments: dict[str, Any] = {}
    if "connect_timeout" not in url.query:
        arguments["connect_timeout"] = CONNECT_TIMEOUT_S
    if "application_name" not in url.query:
        arguments["application_name"] = "offline-rl-harness"
    try:
        engine = sa.create_engine(url, connect_args=arguments, pool_pre_ping=True)
    except ImportError as error:
        raise StoreError(
            "PostgreSQL needs the psycopg driver, which is not installed "
            f"({error}). Install it: pip install 'offline-rl-harness[postgres]'"
        ) from error
    if read_only:

        @event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")

    return engine


# ---------------------------------------------------------------------------- migration


def _read_version(engine: sa.Engine) -> str | None:
    """The version in the database; None if there are no tables of ours yet."""
    with engine.connect().execution_options(reads=True) as connection:
        return _version_of(connection)


def _version_of(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table(schema.VERSION_TABLE):
        return None
    rows = connection.execute(sa.text(f"SELECT version_num FROM {schema.VERSION_TABLE}")).all()
    return rows[0][0] if rows else None


def _is_current(engine: sa.Engine, url: URL) -> bool:
    if engine.dialect.name == "sqlite" and not _in_wal_mode(engine):
        return False
    return _read_version(engine) == schema.VERSION


def _in_wal_mode(engine: sa.Engine) -> bool:
    if isinstance(engine.pool, StaticPool) or engine.url.query:  # in memory, or read only
        return True
    return _pragma(engine, "PRAGMA journal_mode") == "wal"


def _pragma(engine: sa.Engine, statement: str) -> Any:
    """The answer to a pragma, asked outside of any transaction."""
    with engine.connect() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        try:
            return raw.execute(statement).fetchone()[0]
        except sqlite3.Error as error:
            raise sa.exc.DatabaseError(statement, {}, error) from error


def _migrate(engine: sa.Engine, url: URL) -> None:
    """Brings the database to `schema.VERSION`; of many processes one does it, the others wait."""
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:  # the lock goes with the transaction
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            _upgrade(connection, url)
        return
    if isinstance(engine.pool, StaticPool):
        with engine.begin() as connection:
            _upgrade(connection, url)
        return
    import filelock

    lock = f"{engine.url.database}.lock"
    try:
        with filelock.FileLock(lock, timeout=10 * BUSY_TIMEOUT_S):
            _switch_to_wal(engine)
            with engine.begin() as connection:
                _upgrade(connection, url)
    except filelock.Timeout as error:
        raise StoreError(
            f"another process has been migrating {engine.url.database} for more than "
            f"{10 * BUSY_TIMEOUT_S:.0f} s; if none runs any more, try again"
        ) from error
    except OSError as error:
        raise StoreError(
            f"{engine.url.database} must be created or migrated, but {lock} cannot be written "
            f"({error.strerror}); make the folder writable, or choose another place"
        ) from error


def _upgrade(connection: sa.Connection, url: URL) -> None:
    from results import migrations

    name = without_password(url)
    found = _version_of(connection)
    if found == schema.VERSION:
        return
    if found is None:
        existing = set(sa.inspect(connection).get_table_names())
        taken = sorted(existing & set(schema.metadata.tables))
        if taken:
            raise StoreError(
                f"{name} holds tables named {', '.join(taken)} that are not ours (there is no "
                f"table '{schema.VERSION_TABLE}'). Use a database or a PostgreSQL schema of its own"
            )
    elif found not in migrations.known_versions():
        raise StoreError(
            f"{name} is at version {found!r}, which this code does not know (it knows up to "
            f"{schema.VERSION!r}): it was written by a newer offline-rl-harness. Upgrade with "
            "pip install -U offline-rl-harness, or use another database"
        )
    migrations.upgrade(connection)


def _switch_to_wal(engine: sa.Engine) -> None:
    """Readers then never block the writer. The mode is kept in the file."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            mode = _pragma(engine, "PRAGMA journal_mode = WAL")
        except sa.exc.DatabaseError as error:
            # The switch does not wait for readers by itself.
            if "locked" not in str(error.orig) or time.monotonic() > deadline:
                raise
        else:
            if mode != "wal":
                raise StoreError(
                    f"{engine.url.database} cannot use write-ahead logging (journal mode stays "
                    f"{mode!r}); its file system lacks shared memory. Use a local disk, or "
                    "PostgreSQL"
                )
            return
        time.sleep(0.05)
