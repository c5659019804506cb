"""The record kept of a dataset when it is first seen: its digest, and its files' hashes.

Beside the data; for a read-only store in the user's cache folder. With it the hashes of files as
they were last read, so that a file that nobody wrote to since is not read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGEST_FILE = "harness_digest.json"
HASHES_FILE = "harness_hashes.json"
SETTLED_NS = 2 * 10**9
"""A file that changed more recently might change again within one tick of its file system."""


@dataclass(frozen=True)
class Record:
    """What was recorded about a dataset when it was first seen."""

    digest: str
    files: Mapping[str, Mapping[str, Any]]  # path in the folder -> size, mtime_ns, sha256

    @staticmethod
    def path(folder: Path) -> Path:
        """Beside the data; for a read-only store in the user's cache."""
        found = folder / DIGEST_FILE
        return found if found.is_file() else _place(folder, DIGEST_FILE, "digests")

    @classmethod
    def of(cls, folder: Path) -> Record | None:
        try:
            content = json.loads(cls.path(folder).read_text())
            return cls(str(content["digest"]), dict(content["files"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent or unreadable: recorded anew

    def matches(self, folder: Path) -> bool:
        found = file_stats(folder)
        return found.keys() == self.files.keys() and all(
            (stat["size"], stat["mtime_ns"])
            == (self.files[name].get("size"), self.files[name].get("mtime_ns"))
            for name, stat in found.items()
        )

    @classmethod
    def write(cls, folder: Path, content_digest: str) -> None:
        stats = file_stats(folder)  # before hashing: a change meanwhile shows as a mismatch
        hashes = file_hashes(folder, read_all=True)
        files = {name: {**stats[name], "sha256": hashes[name]} for name in stats}
        path = cls.path(folder)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                path, json.dumps({"digest": content_digest, "files": files}, indent=1).encode()
            )
        except OSError:
            return  # nowhere to keep it: computed again next time

    @classmethod
    def forget(cls, folder: Path) -> None:
        cls.path(folder).unlink(missing_ok=True)


def file_stats(folder: Path) -> dict[str, dict[str, int]]:
    stats = {}
    for path in sorted((folder / "data").rglob("*")):
        if path.is_file():
            stat = path.stat()
            name = path.relative_to(folder).as_posix()
            stats[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return stats


def file_hashes(folder: Path, read_all: bool = False) -> dict[str, str]:
    """sha256 of each file; of one that was read before and not written to since, the same again.

    Written to means another size, inode, mtime or ctime. The kernel alone sets a ctime, so a byte
    that is changed with the mtime put back is found; what a disk changes by itself is not.

    Args:
        read_all: read every byte again.
    """
    place = _place(folder, HASHES_FILE, "hashes")
    before = {} if read_all else _known_hashes(place)
    hashes, known, now = {}, {}, time.time_ns()
    for name in file_stats(folder):
        stat = (folder / name).stat()  # before reading: a change meanwhile shows as another state
        state = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        if before.get(name, {}).get("state") == state:
            hashes[name] = str(before[name]["sha256"])
        else:
            with (folder / name).open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
        if now - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS:
            known[name] = {"state": state, "sha256": hashes[name]}
    if known != before:
        with contextlib.suppress(OSError):  # nowhere to keep them: read again next time
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps(known, indent=1).encode())
    return hashes


def _known_hashes(place: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(place.read_text())
        return {
            name: {"state": kept["state"], "sha256": kept["sha256"]} for name, kept in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # absent or unreadable


def _place(folder: Path, name: str, kind: str) -> Path:
    """Where something is kept about a dataset: beside it, or in the user's cache."""
    if is_writable(folder):
        return folder / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return cache / "offline-rl-harness" / kind / f"{key}.json"


def is_writable(folder: Path) -> bool:
    """Whether the folder may be written to; a folder without write bits is left alone by root."""
    try:
        return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)
    except OSError:
        return False


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is either whole or absent."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # stores are shared; mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
