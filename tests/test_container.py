"""The image's two locks agree, and its build uses them."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
CPU, CUDA = REPOSITORY / "constraints.txt", REPOSITORY / "docker" / "constraints-cuda.txt"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()

ONLY_CUDA = re.compile(r"(cuda|nvidia)-.+|triton")
"""What only the CUDA build of torch requires (on Linux): its libraries and its compiler."""


def pins(path: Path) -> dict[str, str]:
    """Package -> version; any line that is neither a comment nor one exact pin is an error."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = re.fullmatch(r"([a-z0-9-]+)==([0-9][a-z0-9.]*)", line)
        assert pin, f"{path.name}: {line!r} is no exact pin without a local suffix"
        assert pin[1] not in found, f"{path.name} pins {pin[1]} twice"
        found[pin[1]] = pin[2]
    return found


def required(extras: set[str]) -> set[str]:
    """What the project needs with these extras, and what that needs, as far as it is installed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    own = canonicalize_name(project["name"])
    declared = {own: [*project["dependencies"]]}
    for extra, texts in project["optional-dependencies"].items():
        declared[own] += [f'{text}; extra == "{extra}"' for text in texts]
    waiting, seen = [(own, extra) for extra in {"", *extras}], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or ONLY_CUDA.fullmatch(name):
            continue  # torch's own needs differ between builds
        seen.add((name, extra))
        for text in declared[name] if name == own else _needs_of(name):
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(need.name), part) for part in {"", *need.extras}]
    return {name for name, _ in seen} - {own}


def _needs_of(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # an extra that is not installed here
        return []


def test_the_locks_differ_in_what_cuda_adds_alone():
    cpu, cuda = pins(CPU), pins(CUDA)
    added = {name for name in cuda if ONLY_CUDA.fullmatch(name)}
    assert {name: cuda[name] for name in cuda if name not in added} == cpu
    assert not [name for name in cpu if ONLY_CUDA.fullmatch(name)]
    assert {"triton", "nvidia-cublas", "nvidia-cuda-runtime"} <= added


@pytest.mark.parametrize("path", [CPU, CUDA], ids=lambda path: path.name)
def test_everything_that_is_installed_is_pinned(path):
    needed = required({"dev", "notebooks", "postgres"})
    assert {"torch", "numpy", "psycopg-binary", "pytest", "jinja2"} <= needed
    assert sorted(needed - pins(path).keys()) == []


def test_the_image_is_built_with_the_lock_of_its_backend():
    version = ".".join(pins(CUDA)["nvidia-cuda-runtime"].split(".")[:2])
    backend = f"cu{version.replace('.', '')}"
    locks = dict(re.findall(r'^ +([a-z0-9|"]+)\) lock=(\S+) ;;', DOCKERFILE, re.MULTILINE))
    assert locks == {"cpu": CPU.name, f'{backend}|""': CUDA.name}
    (copied,) = re.findall(r"^COPY pyproject.toml (.+) \./$", DOCKERFILE, re.MULTILINE)
    assert {CPU.name, CUDA.relative_to(REPOSITORY).as_posix()} <= set(copied.split())
    install, *_ = re.findall(r"uv pip install(?:.|\n)*?-r pyproject.toml", DOCKERFILE)
    assert re.findall(r"-c (\S+)", install) == ['"${lock}"']
    assert f"--build-arg TORCH_BACKEND={backend}" in DOCKERFILE
    assert f"--build-arg TORCH_BACKEND={backend}" in (REPOSITORY / "README.md").read_text()
    assert "conda" not in DOCKERFILE
