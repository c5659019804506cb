"""Checks of an algorithm's `Config` that say which setting is wrong and what it may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def check_choices(config: Any, choices: Mapping[str, Iterable[str]]) -> None:
    """Refuses a setting that is none of its words.

    Args:
        choices: name of a setting -> words it may be.
    Raises:
        ValueError: naming the first such setting, its value and the words.
    """
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def check_positive(config: Any, *names: str) -> None:
    """Refuses a count below 1.

    Raises:
        ValueError: naming the first such setting and its value.
    """
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
