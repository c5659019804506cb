"""A store that nodes have in common where they mount no common folder: any URL that fsspec knows.

Every node's home (`harness.home`) is then its own, and what others need is copied to the storage:

artifacts/<stage_id>.json, <stage_id>/<sha256>   a finished stage: its manifest, and its files
work/<stage_id>/checkpoints/<step>.json, ...     the last checkpoints of a stage, likewise
work/<stage_id>/rows/<claim>-<n>-<sha256>        what was spooled, in the order of the names
work/<stage_id>/claims/<number>-<token>          whose stage it is: the last of the names
alive/<token>                                    changes while the process with that token lives
stop/<sweep>                                     this sweep was asked to stop

Names hold digests, files come before the manifest that names them, and small objects are written
under another name and moved: what is there is complete, or is told from its digest. The storage is
what counts; a node that begins a stage takes over what is there, and forgets what it never pushed.
Owns transfers, and who may make them; what a stage means is known to `harness.plan`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from fsspec.core import url_to_fs

from harness import plan
from harness.artifacts import MANIFEST, ArtifactError, ArtifactStore, hash_file
from harness.home import Home
from results.records import ArtifactRecord

PAUSES_S = (0.5, 2.0, 8.0)
"""Before the second, third and last try."""
ALIVE_EVERY_S = 10.0
LEASE_S = 60.0
"""A process of another sweep that shows no life for so long has lost its stages."""
STOP_CHECK_S = 3.0
ROWS_EVERY_S = 10.0
"""Between two pushes of rows; before a checkpoint and at the end they are pushed anyway."""

_HOPELESS = (PermissionError, NotImplementedError, TypeError, ValueError, ImportError)
WORK = "work"
LOCK = "lock"
_PART = ".part-"
_ROWS = re.compile(r"(?P<claim>\d{6}-[0-9a-f]{16})-\d{6}-(?P<sha256>[0-9a-f]{64})")

T = TypeVar("T")


class StorageError(RuntimeError):
    """The storage cannot be used, or holds what is damaged; names the URL and what to do."""


class DamagedError(StorageError):
    """One object of the storage is damaged; the others can be used."""


class StackBusyError(RuntimeError):
    """Another process is at work on one of these stages."""


class _MismatchError(Exception):
    """What was read is not what was written; may be the transfer's fault."""


# ------------------------------------------------------------------------------------- objects


class Storage:
    """Objects below one URL, by their names: `a/b/c`.

    Every operation is tried again a few times. Absence is an answer (FileNotFoundError), not tried
    again.

    Raises:
        StorageError: if the URL cannot be used, or an operation keeps failing.
    """

    def __init__(self, url: str) -> None:
        self.url = re.sub(r"//([^/:@]*):[^/@]*@", r"//\1:***@", url.rstrip("/"))
        self.fs, root = self._tried("", "reach", lambda: _connected(url))
        self.root = root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _tried(self, name: str, verb: str, action: Callable[[], T]) -> T:
        place = f"{self.url}/{name}" if name else self.url
        for pause in (*PAUSES_S, None):
            try:
                return action()
            except _MismatchError as error:
                if pause is None:
                    raise DamagedError(
                        f"{place} is damaged: {error}. Delete {self.url}/{_whole(name)} to have it "
                        "made again (without a checkpoint, from the one before it; without rows, "
                        "from the stage's beginning)"
                    ) from error
            except Exception as error:  # every driver has its own
                if isinstance(error, FileNotFoundError) and verb != "write":
                    raise
                if pause is None or isinstance(error, _HOPELESS):
                    text = " ".join(str(error).split()) or "no message"
                    raise StorageError(
                        f"cannot {verb} {place}: {type(error).__name__}: {text}. Check the URL "
                        "(run.storage or HARNESS_STORAGE), this machine's credentials for it and "
                        "the network; the same command continues"
                    ) from error
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _writing(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except FileNotFoundError:  # no such folder, where the storage has folders
            self.fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            action()

    def read(self, name: str) -> bytes:
        """An object; raises FileNotFoundError if it is absent."""
        return self._tried(name, "read", lambda: self.fs.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Writes a small object, which is there whole or not at all."""
        part = f"{name}{_PART}{secrets.token_hex(4)}"

        def action() -> None:
            self._writing(part, lambda: self.fs.pipe_file(self._path(part), data))
            self.fs.mv(self._path(part), self._path(name))

        self._tried(name, "write", action)

    def upload(self, name: str, path: Path) -> None:
        """Copies a file to an object, which may be there in part until this returns."""

        def action() -> None:
            self._writing(name, lambda: self.fs.put_file(str(path), self._path(name)))

        self._tried(name, "write", action)

    def download(self, name: str, path: Path, sha256: str) -> None:
        """Copies an object to a file, if it has this digest; FileNotFoundError if it is absent."""

        def action() -> None:
            self.fs.get_file(self._path(name), str(path))
            found, size = hash_file(path)
            if found != sha256:
                raise _MismatchError(
                    f"{size} bytes with sha256 {found[:12]}..., not {sha256[:12]}..."
                )

        self._tried(name, "read", action)

    def read_rows(self, name: str) -> bytes:
        """A part of a spool, whose name holds its digest."""
        expected = _ROWS.fullmatch(name.rpartition("/")[2])
        if expected is None:
            raise DamagedError(
                f"{self.url}/{name} is not named as the harness names rows. Remove it"
            )

        def action() -> bytes:
            data = self.fs.cat_file(self._path(name))
            found = hashlib.sha256(data).hexdigest()
            if found != expected["sha256"]:
                raise _MismatchError(f"{len(data)} bytes with sha256 {found[:12]}...")
            return data

        return self._tried(name, "read", action)

    def names(self, folder: str) -> list[str]:
        """Names directly below a folder, sorted; none if there is no such folder."""
        path = self._path(folder)

        def action() -> list[str]:
            self.fs.invalidate_cache()
            found = (str(name).rstrip("/") for name in self.fs.ls(path, detail=False))
            return sorted(n.rpartition("/")[2] for n in found if n != path and _PART not in n)

        try:
            return self._tried(folder, "list", action)
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        def action() -> bool:
            self.fs.invalidate_cache()
            self.fs.info(self._path(name))  # `fs.exists` takes every error for absence
            return True

        try:
            return self._tried(name, "look at", action)
        except FileNotFoundError:
            return False

    def remove(self, name: str) -> None:
        """Deletes an object, or everything below a folder, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._tried(name, "delete", lambda: self.fs.rm(self._path(name), recursive=True))

    def check(self) -> None:
        """Writes a small object, reads it back and deletes it.

        Raises:
            StorageError: if any of that fails.
        """
        name, data = secrets.token_hex(8), secrets.token_bytes(64)
        self.write(f"probe/{name}", data)
        found, listed = self.read(f"probe/{name}"), name in self.names("probe")
        self.remove(f"probe/{name}")
        if found != data or not listed or name in self.names("probe"):
            raise StorageError(
                f"{self.url} does not give back what is written to it, or keeps what is deleted; "
                "it cannot be a storage"
            )


def _connected(url: str) -> tuple[Any, str]:
    """A file system and the path in it; its package may be missing."""
    try:
        return url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or "fsspec"
        raise ImportError(f"{error}: pip install {package.partition('.')[0]}") from error


def _whole(name: str) -> str:
    """What to delete if an object is damaged: the manifest of its artifact, or a stage's work."""
    parts = name.split("/")
    if "rows" in parts:
        return "/".join(parts[:2])
    return f"{'/'.join(parts[:-1])}.json" if len(parts[-1]) == 64 else name


def of(home: Home) -> Storage | None:
    """The storage of a home, if it has one."""
    return Storage(home.storage) if home.storage else None


# ------------------------------------------------------------------- artifacts and checkpoints


class SharedArtifacts(ArtifactStore):
    """Published stages in the storage; a folder of this node holds copies of some.

    A copy is compared with the storage's manifest whenever it is asked for, and replaced if it is
    another one's.
    """

    def __init__(self, storage: Storage, home: Home, root: Path) -> None:
        super().__init__(root)
        self.local = ArtifactStore(root)
        self.storage = storage
        self.folder = root.relative_to(home.root).as_posix()

    def has(self, stage_id: str) -> bool:
        """Whether the storage has it whole. One that only this node has is pushed first."""
        if self.storage.exists(self._manifest(stage_id)):
            return True
        return self._pushed(stage_id)

    def present(self, stage_ids: Iterable[str]) -> frozenset[str]:
        there = set(self.ids())
        return frozenset(i for i in stage_ids if i in there or self._pushed(i))

    def ids(self) -> list[str]:
        names = self.storage.names(self.folder)
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def publish(
        self, stage_id: str, write: Callable[[Path], None], manifest: Mapping[str, Any]
    ) -> ArtifactRecord:
        if not self.has(stage_id):
            self.local.publish(stage_id, write, manifest)
            self._pushed(stage_id)
        return self.record(stage_id)

    def manifest(self, stage_id: str) -> dict[str, Any]:
        """Of the copy on this node, which is fetched if it is not here."""
        name = self._manifest(stage_id)
        try:
            raw = self.storage.read(name)
        except FileNotFoundError:
            raise ArtifactError(f"no artifact {self.storage.url}/{name}") from None
        copy = self.path(stage_id) / MANIFEST
        if not (self.local.has(stage_id) and copy.read_bytes() == raw):
            place = f"{self.storage.url}/{name}"
            self.local.install(stage_id, raw, place, lambda *file: self._fetch(stage_id, *file))
        return self.local.manifest(stage_id)

    def remove(self, stage_id: str) -> None:
        """Deletes an artifact in the storage and here."""
        self.storage.remove(self._manifest(stage_id))
        self.storage.remove(f"{self.folder}/{stage_id}")
        self.local.remove(stage_id)

    def _manifest(self, stage_id: str) -> str:
        return f"{self.folder}/{self.path(stage_id).name}.json"

    def _pushed(self, stage_id: str) -> bool:
        """Copies what is whole on this node to the storage; False if nothing is."""
        if not self.local.has(stage_id):
            return False
        self.local.verify(stage_id)
        folder = self.path(stage_id)
        for name, entry in self.local.manifest(stage_id)["files"].items():
            self.storage.upload(f"{self.folder}/{stage_id}/{entry['sha256']}", folder / name)
        self.storage.write(self._manifest(stage_id), (folder / MANIFEST).read_bytes())
        return True

    def _fetch(self, stage_id: str, entry: Mapping[str, Any], path: Path) -> None:
        name = f"{self.folder}/{stage_id}/{entry['sha256']}"
        try:
            self.storage.download(name, path, entry["sha256"])
        except FileNotFoundError:
            raise StorageError(
                f"{self.storage.url}/{name} is missing, though its manifest is there. Delete "
                f"{self.storage.url}/{self._manifest(stage_id)} to have it made again"
            ) from None


def _store(home: Home, root: Path) -> ArtifactStore:
    storage = of(home)
    return ArtifactStore(root) if storage is None else SharedArtifacts(storage, home, root)


def artifacts(home: Home) -> ArtifactStore:
    """The finished stages of a home, or of the storage it shares."""
    return _store(home, home.artifacts)


def checkpoints(home: Home, stage_id: str) -> ArtifactStore:
    """A stage's checkpoints, likewise."""
    return _store(home, home.checkpoints(stage_id))


# ------------------------------------------------------------------------------------- workers


@contextlib.contextmanager
def locked(folder: Path, timeout_s: float) -> Iterator[None]:
    """Keeps other processes that see a stage's work folder out of it, within the block.

    Raises:
        StackBusyError: if one is still in it after so many seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / LOCK))
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise StackBusyError(
            f"another process is working in {folder}. If no sweep is running there, the process "
            "that holds the lock is still ending; the same command later continues"
        ) from error
    try:
        yield
    finally:
        lock.release()


class Hold:
    """A process's right to the rows and checkpoints of stages; nothing where homes are shared.

    Entering claims the stages and makes their spools those of the storage. A sweep takes over from
    its own dead workers at once, from another sweep after LEASE_S without a sign of life (looked at
    for so long: clocks do not matter). Whoever lost a stage notices before it pushes again.

    Args:
        sweep: names the sweep; empty is like no other.
    Raises:
        StackBusyError: on entering, if another sweep is at work; later, if a stage was taken over.
        StorageError: if the storage cannot be used.
    """

    def __init__(self, home: Home, stage_ids: Sequence[str], sweep: str = "") -> None:
        self.home, self.stage_ids, self.sweep = home, stage_ids, sweep
        self.storage = of(home)
        self.token = secrets.token_hex(8)
        self._claims: dict[str, str] = {}  # stage id -> our claim
        self._pushed: dict[str, int] = {}  # stage id -> bytes of the spool
        self._parts = 0
        self._pushed_at = time.monotonic()
        self._over, self._asked = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True, name="storage")

    def __enter__(self) -> Hold:
        if self.storage is not None:
            self._show_life(0)
            self._thread.start()
            try:
                for stage_id in self.stage_ids:
                    self._claim(self.storage, stage_id)
                for stage_id in self.stage_ids:
                    self._take_over(self.storage, stage_id)
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()

    @property
    def asked_to_stop(self) -> bool:
        """Whether the sweep was asked to stop, on whichever node."""
        return self._asked.is_set()

    def push_rows(self, every_s: float = 0.0) -> None:
        """Pushes what was spooled since the last push, if that is `every_s` ago."""
        now = time.monotonic()
        if self.storage is None or now - self._pushed_at < every_s:
            return
        self._pushed_at = now
        for stage_id in self.stage_ids:
            self._push_rows(self.storage, stage_id)

    def _push_rows(self, storage: Storage, stage_id: str) -> None:
        data = _whole_lines(self.home.spool(stage_id))[self._pushed[stage_id] :]
        if data:
            self._check(storage, stage_id)
            digest = hashlib.sha256(data).hexdigest()
            name = f"{self._claims[stage_id]}-{self._parts:06d}-{digest}"
            storage.write(f"{_rows(stage_id)}/{name}", data)
            self._parts += 1
            self._pushed[stage_id] += len(data)

    def push_checkpoints(self, stage_id: str, names: Collection[str]) -> None:
        """Makes a stage's checkpoints in the storage these, new ones before old ones go."""
        if self.storage is None:
            return
        self._check(self.storage, stage_id)
        store = checkpoints(self.home, stage_id)
        store.present(names)  # pushes those that are not
        for name in set(store.ids()).difference(names):
            store.remove(name)

    def forget(self) -> None:
        """Removes what this node keeps of the stages' work but the lock: all of it was pushed."""
        if self.storage is not None:
            for stage_id in self.stage_ids:
                self.home.spool(stage_id).unlink(missing_ok=True)
                shutil.rmtree(self.home.checkpoints(stage_id), ignore_errors=True)

    # ------------------------------------------------------------------------------ ownership

    def _claim(self, storage: Storage, stage_id: str) -> None:
        last = (storage.names(_claims(stage_id)) or [""])[-1]
        if last:
            self._wait_for(storage, stage_id, last.partition("-")[2])
        claim = f"{int(last.partition('-')[0] or 0) + 1:06d}-{self.token}"
        storage.write(f"{_claims(stage_id)}/{claim}", b"{}")
        self._claims[stage_id] = claim
        self._check(storage, stage_id)  # two may have come at once: the last name wins

    def _wait_for(self, storage: Storage, stage_id: str, token: str) -> None:
        """Returns when the process of a token is of this sweep, has ended or shows no life."""
        name = f"alive/{token}"
        with contextlib.suppress(FileNotFoundError):
            first = storage.read(name)
            ours = bool(self.sweep) and f'"sweep": {json.dumps(self.sweep)}'.encode() in first
            deadline = time.monotonic() + (0.0 if ours else LEASE_S)
            while time.monotonic() < deadline:
                time.sleep(min(1.0, LEASE_S / 10.0))
                if storage.read(name) != first:
                    raise StackBusyError(
                        f"another sweep is at work on {storage.url}/{_work(stage_id)}: "
                        f"{first.decode(errors='replace')}"
                    )
            storage.remove(name)

    def _check(self, storage: Storage, stage_id: str) -> None:
        last = (storage.names(_claims(stage_id)) or [""])[-1]
        if last != self._claims[stage_id]:
            raise StackBusyError(
                f"{storage.url}/{_work(stage_id)} was taken over by another sweep while this "
                "process showed no life; what it did since its last push is lost"
            )

    def _release(self) -> None:
        if self.storage is not None:
            self._over.set()
            self._thread.join()
            with contextlib.suppress(StorageError):  # others then wait for LEASE_S
                self.storage.remove(f"alive/{self.token}")

    def _live(self) -> None:
        """Shows life, and looks whether the sweep was asked to stop, until the hold is over."""
        assert self.storage is not None
        beats, shown = 0, time.monotonic()
        while not self._over.wait(min(STOP_CHECK_S, LEASE_S / 10.0)):
            with contextlib.suppress(Exception):  # what fails for good is told by the next push
                if time.monotonic() - shown > min(ALIVE_EVERY_S, LEASE_S / 6.0):
                    beats, shown = beats + 1, time.monotonic()
                    self._show_life(beats)
                if self.sweep and self.storage.exists(f"stop/{self.sweep}"):
                    self._asked.set()

    def _show_life(self, beats: int) -> None:
        assert self.storage is not None
        who = {"sweep": self.sweep, "host": socket.gethostname(), "pid": os.getpid(), "beat": beats}
        self.storage.write(f"alive/{self.token}", json.dumps(who).encode("ascii"))

    # -------------------------------------------------------------------------- what is there

    def _take_over(self, storage: Storage, stage_id: str) -> None:
        """Makes the spool that of the storage; one that the storage knows nothing of is pushed."""
        spool, folder = self.home.spool(stage_id), self.home.checkpoints(stage_id)
        rows = b"".join(
            storage.read_rows(f"{_rows(stage_id)}/{name}")
            for name in storage.names(_rows(stage_id))
        )
        here = _whole_lines(spool)
        self._pushed[stage_id] = len(rows)
        if rows and here != rows:
            spool.parent.mkdir(parents=True, exist_ok=True)
            part = spool.with_name(f"{spool.name}{_PART}")
            part.write_bytes(rows)
            os.replace(part, spool)
        elif here and not rows:
            self._push_rows(storage, stage_id)
            self.push_checkpoints(stage_id, ArtifactStore(folder).ids())


def _whole_lines(spool: Path) -> bytes:
    """A spool without the half of a line that a killed writer left, which nobody acknowledged."""
    data = spool.read_bytes() if spool.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def _work(stage_id: str) -> str:
    return f"{WORK}/{stage_id}"


def _rows(stage_id: str) -> str:
    return f"{_work(stage_id)}/rows"


def _claims(stage_id: str) -> str:
    return f"{_work(stage_id)}/claims"


# -------------------------------------------------------------------------------------- driver


def new_rows(storage: Storage, stage_id: str, seen: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Parts of a stage's spool that are not in `seen`, by name, in order."""
    for name in storage.names(_rows(stage_id)):
        if name not in seen:
            yield name, storage.read_rows(f"{_rows(stage_id)}/{name}")


def stages(storage: Storage) -> list[str]:
    """Ids of the stages that are being worked on, or were until something ended."""
    return storage.names(WORK)


def checkpoint_steps(home: Home) -> Callable[[str], list[int]]:
    """What tells the steps of a stage's complete checkpoints, ascending, by the stage's id."""
    storage = of(home)
    if storage is None:
        return lambda stage_id: plan.checkpoint_steps(home.checkpoints(stage_id))
    begun = set(stages(storage))
    return lambda i: [int(name) for name in checkpoints(home, i).ids()] if i in begun else []


def forget(home: Home, stage_id: str) -> bool:
    """Removes a stage's work, here and in the storage, unless a process is at it; whether it did.

    The lock stays: a process that waits for a file that is gone would wait for nothing, and the
    next one would not see it.
    """
    folder, storage = home.stage(stage_id), of(home)
    here: contextlib.AbstractContextManager[None] = (
        locked(folder, 0.0) if folder.is_dir() else contextlib.nullcontext()
    )
    with contextlib.suppress(StackBusyError), here:
        if storage is not None:
            if _is_held(storage, stage_id):
                return False
            storage.remove(_work(stage_id))
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)
        return True
    return False


def _is_held(storage: Storage, stage_id: str) -> bool:
    """Whether the process that claimed a stage last has not ended, as far as it can be told."""
    last = (storage.names(_claims(stage_id)) or [""])[-1]
    return bool(last) and storage.exists(f"alive/{last.partition('-')[2]}")


def ask_to_stop(home: Home, sweep: str) -> None:
    """Tells the workers of a sweep on other nodes to stop; returns at once, for signal handlers."""
    if home.storage:
        write = lambda: Storage(home.storage).write(f"stop/{sweep}", b"{}")  # noqa: E731
        threading.Thread(target=write, name="ask-to-stop").start()


def was_stopped(home: Home, sweep: str) -> None:
    """Takes back `ask_to_stop`."""
    storage = of(home)
    if storage is not None:
        storage.remove(f"stop/{sweep}")
