"""Where a number comes from: code, versions, hardware.

Owns nothing but the reading of them; the records that hold them are in `results.records`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

RECORDED_PACKAGES = (
    "offline-rl-harness",
    "torch",
    "numpy",
    "gymnasium",
    "gymnasium-robotics",
    "mujoco",
    "minari",
    "ray",
)


def utc_now() -> str:
    """The time in UTC as ISO 8601 with microseconds and a trailing 'Z'."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@lru_cache(maxsize=1)
def git_state() -> tuple[str, bool]:
    """The commit of the harness's own code and whether tracked files differ from it.

    Outside a checkout (an installed package, a container) the commit is what the build put into
    `HARNESS_GIT_COMMIT`, or "".
    """
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    top = _git(folder, "rev-parse", "--show-toplevel")
    if not commit or not top or Path(top).resolve() != folder.parent:
        return os.environ.get("HARNESS_GIT_COMMIT", ""), False
    return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@lru_cache(maxsize=1)
def hardware() -> dict[str, Any]:
    """Host, processor, cores, what its products run on, memory in bytes and, with CUDA, the GPU."""
    import psutil
    import torch

    from algorithms.blocks import products

    found: dict[str, Any] = {
        "host": platform.node(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "cpu_products": products.library(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use on CPU, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))
