"""File hygiene for pre-commit: exits 1 and names each file with a fault."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import yaml

MAX_BYTES = 1_000_000


def faults(path: Path) -> list[str]:
    """What is wrong with one text file."""
    content = path.read_bytes()
    found = []
    if len(content) > MAX_BYTES:
        found.append(f"has {len(content)} bytes; the limit is {MAX_BYTES}")
    if content and not content.endswith(b"\n"):
        found.append("has no newline at its end")
    lines = content.decode().split("\n")
    if path.suffix != ".csv" and any(line != line.rstrip() for line in lines):
        found.append("has trailing blanks")
    try:
        if path.suffix in (".yaml", ".yml"):
            list(yaml.safe_load_all(content))
        elif path.suffix == ".toml":
            tomllib.loads(content.decode())
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        found.append(f"does not parse: {error}")
    return found


def main(names: list[str]) -> int:
    bad = [(name, fault) for name in names for fault in faults(Path(name))]
    for name, fault in bad:
        print(f"{name}: {fault}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
