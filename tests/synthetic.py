"""Made-up results of any size: algorithms over suites, seeds that diverge, two simulator versions.

Numbers are drawn from a seeded generator and mean nothing; they have the shape of real ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from results.records import (
    DatasetRecord,
    EvalRecord,
    LatencyRecord,
    Record,
    RunRecord,
    TrialRecord,
)
from results.store import Store

TASKS = (
    *(f"mujoco/{e}/{q}-v0" for e in ("hopper", "walker2d") for q in ("medium", "expert", "simple")),
    *(f"D4RL/{e}/{q}-v2" for e in ("pen", "door") for q in ("human", "cloned")),
    *(f"D4RL/pointmaze/{m}-v2" for m in ("umaze", "medium", "large")),
    "D4RL/kitchen/complete-v2",
)
SIMULATORS = ("mujoco 3.11.0", "mujoco 3.2.3")
TIME = "2031-05-06T07:{:02d}:00Z"


def store(
    methods: int = 6,
    seeds: int = 3,
    evaluations: int = 5,
    episodes: int = 2,
    simulators: int = 2,
    tasks: int = len(TASKS),
) -> Store:
    """A database in memory; `methods x tasks x seeds x simulators` runs."""
    found = Store.open("sqlite://")
    found.append(rows(methods, seeds, evaluations, episodes, simulators, tasks))
    return found


def rows(
    methods: int, seeds: int, evaluations: int, episodes: int, simulators: int, tasks: int
) -> Iterator[Record]:
    """The records of such a database. One seed of the first method diverges."""
    rng = np.random.default_rng(0)
    names = [TASKS[i % len(TASKS)].replace("-v", f"{'x' * (i // len(TASKS))}-v")
             for i in range(tasks)]  # fmt: skip
    for name in names:
        yield DatasetRecord(
            name, _hash(name), "Line-v5", "different", 0.0, 100.0, "made up", 1000, 10
        )
    for simulator in SIMULATORS[:simulators]:
        for method in range(methods):
            skill = rng.normal(40, 15)
            for name in names:
                level = skill + rng.normal(0, 10)
                for seed in range(seeds):
                    yield from _trial(
                        f"method_{method:02d}", name, seed, simulator, level + rng.normal(0, 5),
                        evaluations, episodes, rng,
                        diverged=method == 0 and seed == 0 and name == names[0],
                    )  # fmt: skip


def _trial(
    label: str,
    dataset: str,
    seed: int,
    simulator: str,
    level: float,
    evaluations: int,
    episodes: int,
    rng: np.random.Generator,
    diverged: bool,
) -> Iterator[Record]:
    variant = _hash(label, dataset, simulator)
    trial = _hash(variant, str(seed))
    run = f"{trial[:32]}-1"
    environment = {"env_id": "Line-v5", "kwargs": {}, "max_episode_steps": 1000, "wrappers": []}
    evaluation = {"episodes": episodes, "every": 1000, "first_env_seed": 0}
    yield TrialRecord(
        trial_id=trial,
        variant_id=variant,
        label=label,
        algorithm=f"{label.split('_')[0]}_{int(label[-2:]) // 2}",
        revision=1,
        dataset_id=dataset,
        dataset_digest=_hash(dataset),
        data={"reward": "none"},
        config={"lr": 3e-4, "steps": 1000 * evaluations, "hidden_dim": 256, "tau": 0.005},
        seed=seed,
        evaluation={**evaluation, "environment": environment, "simulator": simulator},
        simulator=simulator,
        created_at=TIME.format(seed % 60),
    )
    yield RunRecord(
        run_id=run,
        trial_id=trial,
        attempt=1,
        status="diverged" if diverged else "done",
        started_at=TIME.format(0),
        ended_at=TIME.format(30),
        git_commit="ab" * 20,
        git_dirty=seed == 1,
        versions={"torch": "2.9.0", "mujoco": simulator.split()[1]},
        hardware={"cpu": "made up"},
        device="cuda:0" if label.endswith("1") else "cpu",
        compiled=True,
        stack=(seed,),
        timings={"train": 1000.0 + seed, "evaluate": 100.0},
        steps_done=1000 * evaluations,
        error="critic_loss is nan at step 400" if diverged else None,
    )
    if seed == 0 and not diverged:
        ms = 0.5 + int(label[-2:])
        yield LatencyRecord(
            *(run, TIME.format(40), 1, False, "cpu", 1, 100, ms, 2 * ms, (ms,)),
            versions={},
            hardware={"cpu": "made up"},
        )
    noise = rng.normal(0, 8, (evaluations, episodes))
    rise = 1 - np.exp(-3 * np.arange(1, evaluations + 1) / evaluations)
    for place, values in enumerate(rise[:, None] * level + noise):
        for episode, value in enumerate(values):
            yield EvalRecord(run, 1000 * (place + 1), episode, episode, float(value), 500)


def _hash(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
