"""The errors of the results database."""

from __future__ import annotations


class StoreError(Exception):
    """The database cannot be opened, read or written; the message says what to do about it."""


class MissingParentError(StoreError):
    """A record refers to a dataset, trial or run that is neither stored nor in the same append."""


class ArchiveError(StoreError):
    """A file is no archive of results, or there is nothing to put into one."""
