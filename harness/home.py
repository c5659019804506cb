"""Where a sweep keeps its files: one folder, one place that knows its layout. In it:

results.db              the results database, unless a URL says otherwise
artifacts/<stage_id>/   published stages, content-addressed
work/<stage_id>/        spool.jsonl, checkpoints/<step>/, lock, stale: a stage in progress
figures/                what `harness figures` draws

With a `storage` this folder is one node's own, and what others need is copied there: see
`harness.storage`.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

DEFAULT_HOME = "runs"


@dataclass(frozen=True)
class Home:
    """The folder of a sweep's files.

    Attributes:
        storage: URL of the store that nodes have in common; empty where they share the folder.
    """

    root: Path
    storage: str = ""

    @classmethod
    def find(cls, given: str | os.PathLike[str] | None = None) -> Home:
        """`given`, else `HARNESS_HOME`, else ./runs; made absolute, created if absent.

        Its storage is that of `HARNESS_STORAGE`.
        """
        root = Path(given or os.environ.get("HARNESS_HOME") or DEFAULT_HOME).expanduser()
        root = root.resolve()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"cannot create the home folder {root}: {error.strerror}. Choose another with "
                "--home or HARNESS_HOME"
            ) from error
        return cls(root).shared(os.environ.get("HARNESS_STORAGE", ""))

    def shared(self, storage: str) -> Home:
        """With this storage, if one is given; a path of this machine is made absolute."""
        scheme, separator, path = storage.rpartition("://")
        if storage and scheme in ("", "file", "local"):
            storage = scheme + separator + os.path.abspath(os.path.expanduser(path))
        return replace(self, storage=storage) if storage else self

    def on_this_node(self) -> Home:
        """Where this node keeps its files: with a storage, in `HARNESS_NODE_HOME` if it is set."""
        own = os.environ.get("HARNESS_NODE_HOME", "")
        return (
            replace(self, root=Path(own).expanduser().resolve()) if own and self.storage else self
        )

    def stop_file(self) -> Path:
        """A new name for the file whose appearance asks a sweep to stop; it names the sweep too."""
        return self.work / f"stop-{os.getpid()}-{secrets.token_hex(6)}"

    def database_url(self, given: str | None = None) -> str:
        """`given`, else `HARNESS_DB`, else the SQLite file in this folder."""
        return given or os.environ.get("HARNESS_DB") or f"sqlite:///{self.root / 'results.db'}"

    def has_database(self, given: str | None = None) -> bool:
        """Whether a database is named, or the one in this folder exists."""
        named = given or os.environ.get("HARNESS_DB")
        return bool(named) or (self.root / "results.db").exists()

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    def stage(self, stage_id: str) -> Path:
        """The work folder of a stage."""
        return self.work / stage_id

    def spool(self, stage_id: str) -> Path:
        return self.stage(stage_id) / "spool.jsonl"

    def stale(self, stage_id: str) -> Path:
        """Where a process that made no progress was; see `harness.watchdog`."""
        return self.stage(stage_id) / "stale"

    def checkpoints(self, stage_id: str) -> Path:
        return self.stage(stage_id) / "checkpoints"
