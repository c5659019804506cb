"""Shared fixtures: an isolated home and dataset store, one thread, no network."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# No time limits: a busy machine is not a bug.
hypothesis.settings.register_profile("harness", deadline=None)
hypothesis.settings.load_profile("harness")

# Before torch or a Ray worker starts: stacks of any size agree bitwise with one thread per process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No test reads or writes the user's results, and none meets the user's Ray cluster."""
    monkeypatch.setenv("HARNESS_HOME", str(tmp_path / "runs"))
    unset = ("HARNESS_DB", "HARNESS_STORAGE", "HARNESS_NODE_HOME", "RAY_ADDRESS", "HARNESS_DEBUG")
    for name in unset:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The Minari root with real datasets that a development checkout may have beside it."""
    root = REPOSITORY.parent / "shared" / "data" / "minari"
    if not root.is_dir():
        pytest.skip(f"no real datasets at {root}")
    return root


@pytest.fixture(scope="session")
def _generated_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset store with a small bandit, `generated/bandit2d-v0`."""
    from harness.datasets.bandit2d import make_bandit2d

    root = tmp_path_factory.mktemp("datasets")
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        make_bandit2d(seed=0, steps=400)
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
    return root


@pytest.fixture
def bandit(_generated_root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a small real dataset that is in the store."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(_generated_root))
    return "generated/bandit2d-v0"
