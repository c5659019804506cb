"""What a Ray worker runs in a test where it must not read data itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def train_without_reading(config: dict[str, Any]) -> None:
    """Fails, also after the stack is done, unless its data lie in Ray's object store."""
    from harness import stages, tune

    def refused(*_: Any) -> None:
        raise AssertionError("this worker read data that its node has")

    stages.load_dataset = refused
    tune._train_stack(config)
    (data,) = stages._held.values()
    for name in ("obs", "action", "next_obs"):
        assert "plasma" in mapping(getattr(data, name).data_ptr()), "a copy"


def mapping(address: int) -> str:
    """The line of this process's memory map that an address is in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= address < int(last, 16):
            return line
    return ""
