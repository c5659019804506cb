"""The content-addressed store of finished stages: one folder each, published atomically.

    <root>/<stage_id>/manifest.json     written last; names every other file with its sha256
    <root>/<stage_id>/...               whatever the stage wrote
    <root>/.tmp-<stage_id>-...          a publication in progress, or what a killed one left

A folder appears under its final name complete or not at all: everything is written and flushed
to disk in a temporary folder, which is then renamed. Owns files only; what a stage means is known
to `harness.plan`, and the rows about artifacts to `results.store`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import psutil

from harness.full_disk import explained
from harness.provenance import utc_now
from harness.typed import FieldError, canonical_json
from results.records import ArtifactRecord

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
STATE = "state.safetensors"
FORMAT = 1
_RESERVED = ("format", "id", "created_at", "files", "self_sha256")
_VALID_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_TEMPORARY = ".tmp-"
_CHUNK_BYTES = 1 << 20


class ArtifactError(RuntimeError):
    """An artifact is absent, incomplete or not what its manifest says; names the file."""


class ArtifactStore:
    """Published stages below one folder.

    Safe with many publishing processes and with processes killed at any point, as long as the
    folder is on one file system (publication is a rename).
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, stage_id: str) -> Path:
        """The folder of an artifact, published or not.

        Raises:
            ValueError: if the id is not a plain name (letters, digits, '_' and '-').
        """
        if not isinstance(stage_id, str) or not _VALID_ID.fullmatch(stage_id):
            raise ValueError(
                f"artifact id {stage_id!r} is not a plain name; expected 1 to 128 letters, "
                "digits, '_' or '-'"
            )
        return self.root / stage_id

    def has(self, stage_id: str) -> bool:
        """Whether the artifact is there: a readable manifest, every file with its size.

        Cheap (no file is hashed); `verify` reads everything.
        """
        try:
            folder = self.path(stage_id)
            files = self.manifest(stage_id)["files"]
            return all((folder / name).stat().st_size == f["bytes"] for name, f in files.items())
        except (ArtifactError, OSError):
            return False

    def present(self, stage_ids: Iterable[str]) -> frozenset[str]:
        """Those of many that are there, as `has`."""
        return frozenset(stage_id for stage_id in stage_ids if self.has(stage_id))

    def ids(self) -> list[str]:
        """Ids of all published artifacts, sorted."""
        if not self.root.is_dir():
            return []
        names = (entry.name for entry in self.root.iterdir() if entry.is_dir())
        return sorted(name for name in names if _VALID_ID.fullmatch(name) and self.has(name))

    def publish(
        self,
        stage_id: str,
        write: Callable[[Path], None],
        manifest: Mapping[str, Any],
    ) -> ArtifactRecord:
        """Publishes what `write(folder)` puts into an empty folder, under `stage_id`.

        If the artifact is already there, or another process publishes it first, the published
        one stays as it is and this one is dropped: equal ids mean equal inputs.

        Args:
            manifest: JSON values to keep with the files (inputs, versions, ...). `stage` (a name,
                or a mapping with one) and `run_id`, if given, also go into the returned record.

        Raises:
            ValueError: for a bad id, manifest or file name.
            ArtifactError: if `write` left nothing or a file that is not a regular one.
            DiskFullError: if there is no room; nothing of the publication is left then.
        """
        final = self.path(stage_id)
        for name in _RESERVED:
            if name in manifest:
                raise ValueError(f"manifest key {name!r} is written by the store; leave it out")
        if self.has(stage_id):
            return self.record(stage_id)
        with explained(final):
            return self._publish(final, stage_id, write, manifest)

    def _publish(
        self,
        final: Path,
        stage_id: str,
        write: Callable[[Path], None],
        manifest: Mapping[str, Any],
    ) -> ArtifactRecord:
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary(stage_id)
        temporary.mkdir()
        try:
            write(temporary)
            files = {}
            for name in _walk(temporary, stage_id):
                digest, size = hash_file(temporary / name, flush=True)
                files[name] = {"sha256": digest, "bytes": size}
            if not files:
                raise ArtifactError(f"stage {stage_id} wrote no file; nothing to publish")
            if MANIFEST in files:
                raise ValueError(f"{MANIFEST} is written by the store; use another file name")
            content = {
                **manifest,
                "format": FORMAT,
                "id": stage_id,
                "created_at": utc_now(),
                "files": files,
            }
            _write_flushed(temporary / MANIFEST, _manifest_bytes(content))
            for folder in {temporary / PurePosixPath(name).parent for name in files}:
                _flush_folder(folder)
            _flush_folder(temporary)
            self._rename(temporary, final, stage_id)
            return self.record(stage_id)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def install(
        self,
        stage_id: str,
        raw: bytes,
        place: str,
        fetch: Callable[[Mapping[str, Any], Path], None],
    ) -> None:
        """Publishes an artifact that was made elsewhere, in place of one that is here.

        Args:
            raw: its manifest, as read from `place`.
            fetch: given a file's entry in the manifest (`sha256`, `bytes`), writes that file,
                verified, to a path.

        Raises:
            ArtifactError: if the manifest is damaged, or of another artifact.
            DiskFullError: if there is no room; what was here before is left then.
        """
        final = self.path(stage_id)
        with explained(final):
            self.root.mkdir(parents=True, exist_ok=True)
            temporary = self._temporary(stage_id)
            temporary.mkdir()
            try:
                for name, entry in parse_manifest(raw, stage_id, place)["files"].items():
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    fetch(entry, temporary / name)
                    hash_file(temporary / name, flush=True)
                _write_flushed(temporary / MANIFEST, raw)
                _flush_folder(temporary)
                self._set_aside(final)
                self._rename(temporary, final, stage_id)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _temporary(self, stage_id: str) -> Path:
        return self.root / f"{_TEMPORARY}{stage_id}-{os.getpid()}-{secrets.token_hex(4)}"

    def _rename(self, temporary: Path, final: Path, stage_id: str) -> None:
        for _ in range(100):
            try:
                os.rename(temporary, final)
                _flush_folder(self.root)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            if self.has(stage_id):
                return  # another process was first
            self._set_aside(final)  # a damaged folder, such as one that was half deleted
        raise ArtifactError(f"cannot publish {final}: something keeps recreating it")

    def _set_aside(self, folder: Path) -> None:
        aside = self._temporary(folder.name)
        try:
            os.rename(folder, aside)
        except FileNotFoundError:
            return
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)

    def remove(self, stage_id: str) -> None:
        """Deletes an artifact; it is gone at once or still whole, never half there."""
        self._set_aside(self.path(stage_id))

    def clean(self, older_than_s: float = 86_400.0) -> list[str]:
        """Deletes what killed publications left, and returns the names of those folders.

        Args:
            older_than_s: leave younger folders alone: another process may be writing them. So may,
                after it was suspended, one whose process is alive on this machine.
        """
        removed = []
        if self.root.is_dir():
            for entry in sorted(self.root.iterdir()):
                try:
                    old = time.time() - entry.stat().st_mtime >= older_than_s
                except FileNotFoundError:
                    continue
                if entry.name.startswith(_TEMPORARY) and old and not _maker_lives(entry):
                    shutil.rmtree(entry, ignore_errors=True)
                    removed.append(entry.name)
        return removed

    def manifest(self, stage_id: str) -> dict[str, Any]:
        """The manifest of a published artifact, checked against its own hash.

        Raises:
            ArtifactError: if it is absent, unreadable or was changed.
        """
        path = self.path(stage_id) / MANIFEST
        try:
            raw = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ArtifactError(
                f"no artifact {stage_id} in {self.root}: {MANIFEST} is missing"
            ) from None
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error}") from error
        return parse_manifest(raw, stage_id, str(path))

    def record(self, stage_id: str) -> ArtifactRecord:
        """The row about a published artifact."""
        manifest = self.manifest(stage_id)
        stage = manifest.get("stage", "")
        raw = (self.path(stage_id) / MANIFEST).read_bytes()
        return ArtifactRecord(
            stage_id=stage_id,
            run_id=manifest.get("run_id"),
            stage=str(stage.get("name", "") if isinstance(stage, dict) else stage),
            path=stage_id,
            sha256=hashlib.sha256(raw).hexdigest(),
            num_bytes=len(raw) + sum(f["bytes"] for f in manifest["files"].values()),
            created_at=manifest["created_at"],
        )

    def verify(self, stage_id: str) -> None:
        """Reads every file and compares it with the manifest.

        Raises:
            ArtifactError: naming the first file that is missing, changed or unexpected.
        """
        folder = self.path(stage_id)
        files = self.manifest(stage_id)["files"]
        for name in files:
            self._verify_file(folder, name, files[name])
        for name in _walk(folder, stage_id):
            if name != MANIFEST and name not in files:
                raise ArtifactError(f"{folder / name} is not in the manifest. Delete it")

    def _verify_file(self, folder: Path, name: str, expected: Mapping[str, Any]) -> None:
        path = folder / name
        try:
            digest, size = hash_file(path)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}. {_REDO}") from error
        if size != expected["bytes"]:
            raise ArtifactError(
                f"{path} has {size} bytes, the manifest says {expected['bytes']}. {_REDO}"
            )
        if digest != expected["sha256"]:
            raise ArtifactError(
                f"{path} has sha256 {digest[:12]}..., the manifest says "
                f"{expected['sha256'][:12]}... {_REDO}"
            )

    @staticmethod
    def save_state(folder: Path, state: Mapping[str, Tensor], file: str = STATE) -> None:
        """Writes tensors as safetensors into `folder`; views and shared storage are copied."""
        from safetensors.torch import save_file

        # safetensors refuses tensors that share memory, as tied weights and slices do.
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        contiguous = {name: tensor.contiguous() for name, tensor in copies.items()}
        save_file(contiguous, str(folder / file))

    def load_state(self, stage_id: str, file: str = STATE) -> dict[str, Tensor]:
        """The tensors of `file`, on CPU, after checking its hash.

        Raises:
            ArtifactError: if the file is absent, damaged or not safetensors.
        """
        folder = self.path(stage_id)
        files = self.manifest(stage_id)["files"]
        if file not in files:
            raise ArtifactError(f"artifact {stage_id} has no file {file!r}; it has {list(files)}")
        self._verify_file(folder, file, files[file])
        from safetensors.torch import load

        try:
            return load((folder / file).read_bytes())
        except Exception as error:  # safetensors has its own exception type, outside OSError
            raise ArtifactError(f"{folder / file} is not a safetensors file: {error}") from error


def parse_manifest(raw: bytes, stage_id: str, place: str) -> dict[str, Any]:
    """A manifest as it was read from `place`, checked against its own hash.

    Raises:
        ArtifactError: naming the place, if it was changed or is of another artifact.
    """
    try:
        content = json.loads(raw)
        # Byte for byte what publish writes for this content, self hash included.
        intact = isinstance(content, dict) and _manifest_bytes(content) == raw
        intact = intact and content["id"] == stage_id and content["format"] == FORMAT
        files = content["files"] if intact else {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{place} is damaged: {error}. {_REDO}") from error
    if not intact:
        raise ArtifactError(f"{place} is damaged: it does not match its own hash. {_REDO}")
    for name in files:
        _check_name(name, place)
    return content


_REDO = "Delete the artifact's folder to have it made again"


def _manifest_bytes(content: Mapping[str, Any]) -> bytes:
    body = {name: value for name, value in content.items() if name != "self_sha256"}
    try:
        canonical = canonical_json(body)
    except FieldError as error:
        raise ValueError(f"manifest: {error}") from error
    digest = hashlib.sha256(canonical.encode("ascii")).hexdigest()
    text = json.dumps({**json.loads(canonical), "self_sha256": digest}, indent=1, sort_keys=True)
    return text.encode("ascii") + b"\n"


def _maker_lives(folder: Path) -> bool:
    """Whether the process in a temporary folder's name is alive here, and not a later namesake."""
    try:
        process = psutil.Process(int(folder.name.rsplit("-", 2)[1]))
        return process.create_time() <= folder.stat().st_mtime
    except (psutil.Error, ValueError, FileNotFoundError):
        return False


def _walk(folder: Path, stage_id: str) -> Iterator[str]:
    """Relative names of all files below `folder`, sorted; refuses links and special files."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(f"stage {stage_id} holds {path}, which is not a regular file")
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            _check_name(name, folder)
            yield name


def _check_name(name: Any, where: Path | str) -> None:
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    safe = parts and not PurePosixPath(name).is_absolute() and "\\" not in name
    if not safe or ".." in parts or str(PurePosixPath(name)) != name or not name.isprintable():
        raise ArtifactError(f"{where}: file name {name!r} is not a plain relative path")


def hash_file(path: Path, flush: bool = False) -> tuple[str, int]:
    """The sha256 of a file, and its bytes; `flush` has it on the disk before."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
        if flush:
            os.fsync(file.fileno())
    return digest.hexdigest(), size


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
