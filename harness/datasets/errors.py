"""The two errors every function of this package raises about data."""

from __future__ import annotations


class DatasetError(Exception):
    """A dataset is missing, damaged or not what was asked for; the message says what to do."""


class UnknownDatasetError(DatasetError, KeyError):
    """A name that is neither a known dataset nor a stored one."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0]) if self.args else ""
