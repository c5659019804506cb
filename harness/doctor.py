"""Checks of the environment, each with what to do when it is bad."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from typing import Literal

from harness import preflight, provenance
from harness.home import Home
from harness.preflight import Check


def check(home: str | None, db: str | None) -> Iterator[Check]:
    """All checks, cheap ones first; none of them raises."""
    commit, dirty = provenance.git_state()
    code = (
        f"commit {commit[:12]}{' with local changes' if dirty else ''}" if commit else "no commit"
    )
    yield Check("harness", "note" if dirty or not commit else "ok", code)
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for name, version in provenance.versions().items():
        if name not in ("python", "offline-rl-harness"):
            state: Literal["ok", "bad"] = "bad" if version == "absent" else "ok"
            yield Check(name, state, version if state == "ok" else "absent: make install")
    yield _compiler()
    yield _device()
    yield preflight.machine_memory()
    yield _simulator()
    yield from _home(home, db)
    yield _datasets()
    yield _ray()


def _compiler() -> Check:
    found = provenance.compiler()
    if found:
        return Check("compiler", "ok", found)
    return Check("compiler", "note", "no g++: training on CPU runs eagerly, which is slower")


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Check("device", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    return Check("device", "ok", f"CPU, {os.cpu_count()} cores; no CUDA device")


def _simulator() -> Check:
    try:
        import gymnasium

        started = time.perf_counter()
        env = gymnasium.make("HalfCheetah-v5")
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.close()
    except Exception as error:
        return Check("MuJoCo", "bad", f"HalfCheetah-v5 does not step: {error}. make install")
    return Check("MuJoCo", "ok", f"HalfCheetah-v5 steps ({time.perf_counter() - started:.1f} s)")


def _home(home: str | None, db: str | None) -> Iterator[Check]:
    from results.store import Store

    try:
        found = Home.find(home)
        free = preflight.writable(found)
    except OSError as error:
        yield Check("home", "bad", str(error))
        return
    low = free < preflight.LOW_DISK_BYTES
    yield Check("home", "note" if low else "ok", f"{found.root}, {preflight.gib(free)} free")
    if found.storage:
        yield preflight.storage(found)
    try:
        with Store.open(found.database_url(db)) as store:
            counts = store.counts()
            rows = ", ".join(f"{count} {name}" for name, count in counts.items())
            store.check_writable()
            yield Check("database", "ok", f"{store.url} (schema {store.version}; {rows})")
    except Exception as error:
        yield Check("database", "bad", str(error))


def _datasets() -> Check:
    from harness import datasets

    try:
        ids = datasets.match("*")
    except Exception as error:
        return Check("datasets", "note", str(error))
    return Check("datasets", "ok", f"{len(ids)} in the local Minari store")


def _ray() -> Check:
    from harness import tune

    started = time.perf_counter()
    try:
        with tune.cluster():
            resources = tune.resources()
    except Exception as error:
        return Check("Ray", "bad", str(error))
    where = os.environ.get("RAY_ADDRESS", "local")
    took = time.perf_counter() - started
    return Check("Ray", "ok", f"{where}: {resources} ({took:.1f} s to start)")
