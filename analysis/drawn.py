"""Files of rows that `harness` commands wrote for a study, read and checked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def read(path: Path, needed: Iterable[str] = (), command: str = "harness actions") -> pd.DataFrame:
    """The table of a file of actions, or of what else `command` wrote.

    Args:
        needed: columns that must be there.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a parquet file, or lacks a column.
    """
    import pandas as pd

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; `{command}` writes it")
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a parquet file; `{command}` writes one ({error})"
        ) from error
    missing = [name for name in needed if name not in frame]
    if missing:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)}; expected a file that `{command}` wrote"
        )
    return frame
