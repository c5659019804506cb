"""Downloads a published dataset: once, checked, and visible only when complete."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.datasets import local
from harness.datasets.catalog import resolve
from harness.datasets.errors import DatasetError
from harness.datasets.minari import read_folder
from harness.datasets.writing import install, locked

DEFAULT_REMOTE = "hf://farama-minari"

Progress = Callable[[int, int | None], None]
"""Called with bytes on disk so far and, if known, bytes expected."""


def download(dataset_id: str, remote: str | None = None, progress: Progress | None = None) -> Path:
    """Makes sure a dataset is in the local store, downloading it if it is not.

    Safe to call from many processes at once: one downloads, the others wait and find it there.
    Files arrive in a hidden folder, are read and checked there, and move into place with one
    rename, so a killed download leaves nothing that could be loaded; the next one continues it.

    Args:
        dataset_id: a Minari id, a D4RL name, or `<scheme>://<owner>/<id>` in full.
        remote: `hf://<owner>`, `gcp://<bucket>` or `file://<folder>` (a mirror with the layout of
            the local store); default `MINARI_REMOTE`, else the catalog's, else Farama's.
        progress: told now and then how far the download is.
    Returns:
        The dataset's folder.
    Raises:
        DatasetError: if it cannot be fetched, or what came is not a complete dataset.
    """
    if "://" in dataset_id:
        scheme, _, rest = dataset_id.partition("://")
        owner, _, dataset_id = rest.partition("/")
        remote = f"{scheme}://{owner}"
        local.check_id(dataset_id)
    else:
        dataset_id, remote = _where(dataset_id, remote)
    if local.is_stored(dataset_id):
        return local.folder(dataset_id)
    with locked(dataset_id):
        if local.is_stored(dataset_id):  # another process was faster
            return local.folder(dataset_id)
        arriving = local.root() / f".download-{dataset_id.replace('/', '__')}"
        arriving.mkdir(parents=True, exist_ok=True)
        try:
            size = _fetch(dataset_id, remote, arriving, progress)
        except DatasetError:
            raise
        except Exception as error:  # HTTP, Hugging Face and Google clients raise their own
            raise DatasetError(
                f"dataset {dataset_id!r} cannot be downloaded from {remote} "
                f"({type(error).__name__}: {str(error)[:200]}). Check the network, --remote and "
                "MINARI_REMOTE (a folder works too: file:///path); on a machine without network "
                f"copy the folder {dataset_id} into {local.root()}"
            ) from error
        folder = arriving / dataset_id
        try:
            metadata_path = folder / "data" / "metadata.json"
            if not metadata_path.is_file():
                raise DatasetError(
                    f"dataset {dataset_id!r}: {remote} sent no {dataset_id}/data/metadata.json; "
                    "expected a Minari dataset. Check the id"
                )
            read_folder(folder, dataset_id, local.read_metadata(metadata_path, dataset_id))
        except DatasetError:
            shutil.rmtree(arriving, ignore_errors=True)  # damaged: do not continue from it
            raise
        install(folder, dataset_id)
        shutil.rmtree(arriving, ignore_errors=True)
        if progress is not None and size is not None:
            progress(size, size)
    return local.folder(dataset_id)


def _where(name: str, remote: str | None) -> tuple[str, str]:
    entry = resolve(name) if _is_known(name) else None
    dataset_id = entry.id if entry is not None else local.check_id(name)
    if entry is not None and not entry.is_stored and entry.relation in ("original", "generated"):
        how = (
            "import D4RL's own HDF5 file with `harness data import FILE --id " + dataset_id + "`"
            if entry.relation == "original"
            else "make it with `harness data make`"
        )
        if remote is None:
            raise DatasetError(f"dataset {dataset_id!r} is not published anywhere; {how}")
    known = str(entry.published.get("remote") or "") if entry is not None else ""
    return dataset_id, remote or os.environ.get("MINARI_REMOTE") or known or DEFAULT_REMOTE


def _is_known(name: str) -> bool:
    try:
        resolve(name)
    except DatasetError:
        return False
    return True


def _fetch(dataset_id: str, remote: str, target: Path, progress: Progress | None) -> int | None:
    """Brings `<target>/<dataset_id>` here; returns the expected bytes if the remote told."""
    scheme, _, place = remote.partition("://")
    if scheme == "file":
        return _copy_from_mirror(Path(place), dataset_id, target, progress)
    from minari.storage.remotes import get_cloud_storage

    storage = get_cloud_storage(remote_path=remote)
    metadata = storage.get_dataset_metadata(dataset_id)
    _check_version(dataset_id, metadata)
    size = metadata.get("dataset_size")
    expected = int(size * 1e6) if isinstance(size, int | float) else None
    with _Watch(target, expected, progress):
        storage.download_dataset(dataset_id, target)
    return expected


def _check_version(dataset_id: str, metadata: dict[str, Any]) -> None:
    import minari

    version = metadata.get("minari_version")
    if version not in minari.supported_dataset_versions:
        raise DatasetError(
            f"dataset {dataset_id!r} was written by Minari {version}, which the installed Minari "
            f"{minari.__version__} cannot read; upgrade Minari or choose another version of it"
        )


def _copy_from_mirror(
    mirror: Path, dataset_id: str, target: Path, progress: Progress | None
) -> int:
    source = mirror / dataset_id / "data"
    if not (source / "metadata.json").is_file():
        raise DatasetError(
            f"dataset {dataset_id!r} is not in the mirror {mirror}; expected {source}. Check the "
            "id and the folder"
        )
    files = sorted(path for path in source.rglob("*") if path.is_file())
    # metadata.json last: it is what makes a folder a dataset
    files.sort(key=lambda path: path == source / "metadata.json")
    total = sum(path.stat().st_size for path in files)
    done = 0
    for path in files:
        copy = target / dataset_id / "data" / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reader, copy.open("wb") as writer:
            while block := reader.read(1 << 22):
                writer.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
    return total


class _Watch:
    """Reports how much of a download is on disk, for clients that tell nothing themselves."""

    def __init__(self, folder: Path, expected: int | None, progress: Progress | None) -> None:
        self.folder, self.expected, self.progress = folder, expected, progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> None:
        if self.progress is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _report(self) -> None:
        assert self.progress is not None
        while not self._stop.wait(0.5):
            size = 0
            for path in self.folder.rglob("*"):
                try:
                    size += path.stat().st_size if path.is_file() else 0
                except OSError:
                    continue  # renamed while we looked
            self.progress(size, self.expected)
