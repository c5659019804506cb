"""A disk without room, said in words: which path, what is safe, what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """There is no room where a file was to be written; names the path."""


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the errors of writing below `path` that mean "no room" into `DiskFullError`."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        # safetensors tells errors of the system in words alone.
        in_words = type(error).__name__ == "SafetensorError" and f"os error {_FULL[0]}" in str(
            error
        )
        if not in_words and getattr(error, "errno", None) not in _FULL:
            raise
        raise DiskFullError(
            f"no room left on the disk that holds {path}. Rows and checkpoints written before are "
            "whole. Make room, or move the home folder to a larger disk; the same command continues"
        ) from error
