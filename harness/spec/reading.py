"""Text to plain values: YAML files, `key=value` of the command line, seeds.

Refuses what YAML would read as something else than it looks like.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.spec.types import SpecError
from harness.typed import FieldError, expect_mapping

MAX_SEED = 2**32 - 1
COMMAND_LINE = "command line: "


def parse_seeds(value: Any, place: str = "seeds") -> tuple[int, ...]:
    """Seeds from a number, text or a list of these, in the order given.

    `10` is the single seed 10; `0-9` is 0 to 9, both included; `0,2,5-7` joins several.

    Raises:
        FieldError: for anything else, a seed that appears twice or is outside [0, 2**32).
    """
    example = "Write a seed (3), a range (0-9, both included) or a list (0,1,2 or 0-3,7)"
    if isinstance(value, bool) or not isinstance(value, int | str | list | tuple):
        raise FieldError(f"{place}: expected seeds, got {value!r}. {example}")
    seeds: list[int] = []
    parts = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, str):
        parts = value.split(",")
    for part in parts:
        if isinstance(part, str) and "," in part:
            seeds.extend(parse_seeds(part, place))
            continue
        seeds.extend(_parse_seed_range(part, place, example))
    if not seeds:
        raise FieldError(f"{place}: no seeds given. {example}")
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1}) if _repeats(seeds) else []
    if repeated:
        raise FieldError(f"{place}: seed {repeated[0]} appears more than once in {value!r}")
    return tuple(seeds)


def _repeats(seeds: Sequence[int]) -> bool:
    return len(set(seeds)) != len(seeds)


def _parse_seed_range(part: Any, place: str, example: str) -> range | list[int]:
    if isinstance(part, int) and not isinstance(part, bool):
        first = last = part
    else:
        found = (
            re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part) if isinstance(part, str) else None
        )
        if not found or not str(part).isascii():
            raise FieldError(f"{place}: cannot read seeds from {part!r}. {example}")
        first = int(found[1])
        last = int(found[2]) if found[2] is not None else first
    if first > last:
        raise FieldError(
            f"{place}: the range {part!r} is descending; ranges are ascending: {last}-{first}"
        )
    if first < 0 or last > MAX_SEED:
        raise FieldError(f"{place}: seed {part} is outside 0 to {MAX_SEED}")
    if last - first >= 1_000_000:
        raise FieldError(
            f"{place}: the range {part!r} has {last - first + 1} seeds; is that meant?"
        )
    return range(first, last + 1)


# ------------------------------------------------------------------------------------------ YAML


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a YAML file as plain values.

    Raises:
        SpecError: if it cannot be read or is not plain YAML. Duplicate keys are refused, and so
            are tags that would make Python objects.
    """
    path = Path(path)
    return parse_yaml(read_text(path), path.name)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise SpecError(f"{path} is a folder; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as text: {error}") from error


def parse_yaml(text: str, place: str) -> Any:
    import io

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    # OmegaConf's loader is safe (no Python tags), refuses duplicate keys, reads 1e-3 as a float.
    # It raises OSError for a text that is a bare number.
    try:
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (YAMLError, OmegaConfBaseException, RecursionError, OSError) as error:
        raise SpecError(f"{place}: not valid YAML: {_one_line(error)}") from error


def as_written(value: Any, text: str) -> Any:
    """The seeds that `seeds: ...` in a text gives, those that YAML reads as another number as text.

    YAML 1.1 has octal 010 (8), 0x10, 1_000 and, in base 60, 1:30.

    Args:
        value: what YAML made of them.
    """
    import yaml

    def compared(value: Any, text: Any) -> Any:
        if isinstance(value, list) and isinstance(text, list):
            return [compared(*pair) for pair in zip(value, text, strict=True)]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return text if is_number and isinstance(text, str) and str(value) != text else value

    return compared(value, yaml.load(text, yaml.BaseLoader).get("seeds"))


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()


def resolved(content: dict[str, Any], place: str) -> dict[str, Any]:
    """Interpolations (`${steps}`) replaced by their values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.create(content)
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise SpecError(f"{place}: {_one_line(error)}") from error
    return expect_mapping(plain, place)


def parse_override(text: str) -> tuple[list[str], Any]:
    """`evaluation.every=500` as its key path and its YAML value."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise SpecError(
            f"{COMMAND_LINE}{text!r} is not an override; expected key=value, for example steps=2000"
        )
    # A block of its own, so that a bare scalar is a value and not a key.
    value = parse_yaml(f"value: {raw}", f"{COMMAND_LINE}{text!r}")
    if not isinstance(value, dict) or list(value) != ["value"]:
        raise SpecError(f"{COMMAND_LINE}{text!r}: cannot read the value {raw!r}")
    parts = _split_key(key, text)
    if parts[0] == "seeds":
        return parts, as_written(value["value"], f"seeds: {raw}")
    return parts, value["value"]


def _split_key(key: str, text: str) -> list[str]:
    """The parts of a dotted key; `cases[0].steps` is the same as `cases.0.steps`."""
    parts = re.sub(r"\[([^\[\]]*)\]", r".\1", key).split(".")
    if not all(parts) or any(c in key.replace("[", "").replace("]", "") for c in "[]"):
        raise SpecError(f"{COMMAND_LINE}{text!r}: cannot read the key {key!r}")
    return parts
