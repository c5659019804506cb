"""Exit codes: what a script may conclude from how a command ended.

0 ok, 1 some runs failed or diverged, 2 usage (a wrong argument, spec, name or dataset), 3
environment (database, Ray, disk, a missing package), 130 interrupted.
"""

from __future__ import annotations

OK, SOME_FAILED, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130


BUGS = (
    *(ArithmeticError, AssertionError, AttributeError, IndexError, NameError),
    *(NotImplementedError, RecursionError),
)
"""Exceptions that nobody raises to tell a user something."""


def exit_code(error: BaseException) -> int:
    """The exit code that an exception stands for."""
    from harness.datasets import DatasetError
    from results.errors import ArchiveError, StoreError

    if isinstance(error, ArchiveError):
        return USAGE
    if isinstance(error, (StoreError, ImportError)):
        return ENVIRONMENT
    if isinstance(error, (DatasetError, ValueError, TypeError, KeyError, FileNotFoundError)):
        return USAGE
    return ENVIRONMENT
