"""Ends a process that stops making progress, saying where every thread was.

A hung environment or kernel cannot be asked to stop, and may hold Python's lock. So the timer is
`faulthandler`'s, which needs neither: it writes the tracebacks and exits at once. What is on disk
is then what a kill leaves, and the stack is started again from its last checkpoint.
"""

from __future__ import annotations

import faulthandler
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

FEED_EVERY_S = 1.0


class Watchdog:
    """Armed between `__enter__` and `__exit__`; `feed` starts its time anew.

    Args:
        path: where the tracebacks go; removed when the block ends by itself.
        seconds: without a feed until the process ends; 0 never ends it.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._file: TextIO | None = None
        self._fed = 0.0

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self._file = self.path.open("w", encoding="utf-8")
            self.feed()
        return self

    def feed(self) -> None:
        """Something happened. Cheap: the timer is set at most once a second."""
        now = time.monotonic()
        if self._file is not None and now - self._fed >= min(FEED_EVERY_S, self.seconds / 4.0):
            self._fed = now
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._file)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self.path.unlink(missing_ok=True)


def report(path: Path, seconds: float) -> str | None:
    """What a watchdog wrote when it ended its process, or None if it did not."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    if not text.strip():
        return None
    lines = [line.strip() for line in text.splitlines()]
    first = next((line for line in lines if line.startswith("File ")), "")
    return f"{text}\nno progress for {seconds:g} s (run.stale_after_s), last at {first}"
