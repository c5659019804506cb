"""Signals that ask a sweep to stop: from a person, and from a scheduler that is about to kill."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def interruptible(on_interrupt: Callable[[], None]) -> Iterator[None]:
    """The first signal of `STOPPING` calls `on_interrupt`; the next one is a KeyboardInterrupt.

    Does nothing outside the main thread, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt
        on_interrupt()

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Within the block every signal of `STOPPING` is a KeyboardInterrupt, as Ctrl-C is anyway.

    For what comes before and after a block that is `interruptible`: a scheduler's notice would end
    the process there with a code that nobody takes for an interruption.
    """

    def interrupt() -> None:
        raise KeyboardInterrupt

    with interruptible(interrupt):
        yield


@contextlib.contextmanager
def stop_on_signals(stop_file: Path) -> Iterator[Path]:
    """A file that appears with the first signal and is gone after the block."""
    stop_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with interruptible(stop_file.touch):
            yield stop_file
    finally:
        stop_file.unlink(missing_ok=True)
