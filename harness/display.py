"""What a person sees while something long runs: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from harness.plan_text import duration

PLAIN_LINE_EVERY_S = 15.0


class Display:
    """One line or bar per running stack, and one line for each that ends.

    Args:
        console: where to write; bars only if it is a terminal.
        total: stacks in the plan.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.ended = 0
        self._bars: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._notices: set[str] = set()
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn(
                    "{task.description}",
                    markup=False,
                    table_column=Column(ratio=3, no_wrap=True),
                ),
                BarColumn(bar_width=None, table_column=Column(ratio=2)),
                TextColumn("{task.completed:>7.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[info]}", markup=False),
                TimeElapsedColumn(),
                console=console,
                expand=True,
            )

    def __enter__(self) -> Display:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress:
            self._progress.stop()

    def line(self, text: str | Text) -> None:
        """A line that stays; plain text is shown as it is, for errors are full of brackets."""
        self.console.print(Text.assemble(text), highlight=False, soft_wrap=True)

    def update(self, key: str, title: str, num_seeds: int, progress: Any) -> None:
        """Shows a worker's progress (`harness.job.Progress`)."""
        if progress.notice and progress.notice not in self._notices:
            self._notices.add(progress.notice)
            self.line(Text.assemble(("notice", "yellow"), f" {progress.notice}"))
        info = _info(progress, num_seeds)
        if self._progress:
            if key not in self._bars:
                self._bars[key] = self._progress.add_task(title, total=progress.steps, info=info)
            self._progress.update(
                self._bars[key], completed=progress.step, total=progress.steps, info=info
            )
            return
        now = time.monotonic()
        if now - self._last_line.get(key, -1e9) >= PLAIN_LINE_EVERY_S:
            self._last_line[key] = now
            self.line(f"{title}  step {progress.step}/{progress.steps}  {info}")

    def end(self, key: str, text: str | Text) -> None:
        """A stack has ended; `text` is as in `line`."""
        self.ended += 1
        if self._progress and key in self._bars:
            self._progress.remove_task(self._bars.pop(key))
        self.line(Text.assemble(f"[{self.ended}/{self.total}] ", text))


@contextmanager
def counted(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A function that is told how much is done, of how much, and what comes next."""
    if console.is_terminal:
        with Progress(
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, text: bar.update(
                task, completed=done, total=total, description=text
            )
        return
    last = time.monotonic()

    def line(done: int, total: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_LINE_EVERY_S:
            last = time.monotonic()
            console.print(Text(f"{done}/{total} {text}"), highlight=False, soft_wrap=True)

    yield line


def _info(progress: Any, num_seeds: int) -> str:
    if progress.phase != "train":
        text = {"load": "loading data", "compile": "compiling", "evaluate": "evaluating"}.get(
            progress.phase, progress.phase
        )
        if progress.phase != "evaluate":
            return text
    else:
        text = ""
    if progress.steps_per_second > 0:
        remaining = (progress.steps - progress.step) / progress.steps_per_second
        text += f" {progress.steps_per_second:.1f} steps/s x {num_seeds} seeds"
        if remaining > 0:
            text += f"  ETA {duration(remaining)}"
    if progress.last_return is not None:
        text += f"  return {progress.last_return:.4g}"
    return text.strip()
