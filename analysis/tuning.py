"""How good a policy one gets for a number of policy evaluations: the tuning budget.

Whoever deploys a method trains several policies (settings x seeds) and may evaluate some of them
in the environment. The protocol (Jackson et al., 2025, "A Clean Slate for Offline Reinforcement
Learning") is a bandit over policies: each pull evaluates one for an episode, an upper confidence
bound chooses which, and after each pull the policy of the best mean so far is the one deployed;
what counts is that policy's mean over all of its stored episodes.

Their released code has three properties that we do not share. There, a policy that was not pulled
counts with a mean of 0, so it wins where returns are negative: here each policy is pulled once, in
random order, before the bound is used, and only pulled policies are deployed. There, the bonus
takes returns to be of order 1: here it is multiplied by their standard deviation within policies,
so the unit of returns changes nothing. There, ties go to the lower index: here to a random one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.load import read_tasks
from analysis.stats import MIN_SEEDS, check
from results.store import Store

ALPHA = 2.0  # of the bound, as in the released code
SAMPLE = 20  # policies at hand, as in the released code
REPEATS_PER_POOL = 50  # for the bounds


@dataclass(frozen=True)
class TuningCurve:
    """Expected score of the deployed policy after 1, 2, ... policy evaluations: arrays [pulls].

    Attributes:
        low, high: percentile bounds over resampled pools of policies; None below `MIN_SEEDS`
            policies.
        num_policies: in the pool.
        sample: of these, at hand in each repeat.
    """

    value: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    num_policies: int
    sample: int


def policies(
    store: Store, trial_ids: Iterable[str] | None = None
) -> dict[tuple[str, str], list[list[float]]]:
    """(algorithm, task) -> scores of the last evaluation's episodes, one list per policy.

    Every finished trial is a policy, whatever its settings, label or seed.
    """
    ids = None if trial_ids is None else list(trial_ids)
    trials = store.trials(ids)
    last = store.evaluation_means(ids, statuses=("done",)).groupby("run_id").step.max()
    if last.empty:
        return {}
    tasks = read_tasks(store, trials)
    origin = {
        row["trial_id"]: (
            row["algorithm"],
            tasks[row["dataset_id"], row["dataset_digest"], row["simulator"]],
        )
        for row in trials.to_dict("records")
    }
    episodes = store.evaluations(ids, run_ids=[str(run) for run in last.index])
    episodes = episodes[episodes.step == episodes.run_id.map(last)]
    found: dict[tuple[str, str], list[list[float]]] = {}
    for trial_id, part in episodes.groupby("trial_id"):
        algorithm, task = origin[trial_id]
        scores = [task.score(value) for value in part.episode_return]
        found.setdefault((algorithm, task.name), []).append(scores)
    return dict(sorted(found.items()))


def expected_best(values: Sequence[float]) -> np.ndarray:
    """Expected maximum of 1, 2, ..., n of the n values, drawn without replacement: [n].

    The tuning curve if one evaluation told a policy's mean exactly: the k-th smallest value is the
    maximum of t draws in C(k - 1, t - 1) of C(n, t) cases.
    """
    ordered = sorted(values)
    n = len(ordered)
    return np.array(
        [
            sum(v * math.comb(k, t - 1) for k, v in enumerate(ordered)) / math.comb(n, t)
            for t in range(1, n + 1)
        ]
    )


def tuning_curve(
    scores: Sequence[Sequence[float]],
    pulls: int = 200,
    sample: int = SAMPLE,
    repeats: int = 1000,
    alpha: float = ALPHA,
    seed: int = 0,
    reps: int = 200,
    confidence: float = 0.95,
) -> TuningCurve:
    """The expected score of the deployed policy by number of evaluations.

    Args:
        scores: of the stored episodes of each policy; numbers of episodes may differ.
        pulls: policy evaluations.
        sample: policies at hand, drawn without replacement in each repeat; all if there are fewer.
        repeats: simulated tunings.
        alpha: of the bound, mean + std sqrt(alpha log t / n).
        seed: equal seeds give equal bytes.
        reps: resampled pools of policies for the bounds, with `REPEATS_PER_POOL` tunings each.
    Raises:
        ValueError: without policies, or for one without episodes or with one that is not finite.
    """
    check(scores, [f"policy {index}" for index in range(len(scores))])
    for name, number in (("pulls", pulls), ("sample", sample), ("repeats", repeats)):
        if number < 1:
            raise ValueError(f"{name} is {number}; expected at least 1")
    pool = len(scores)
    sample = min(sample, pool)
    rng = np.random.default_rng(seed)
    value = _deployed(scores, _subsets(rng, repeats, pool, sample), pulls, alpha, rng).mean(axis=0)
    if pool < MIN_SEEDS:
        return TuningCurve(value, None, None, pool, sample)
    pools = np.repeat(rng.integers(pool, size=(reps, pool)), REPEATS_PER_POOL, axis=0)
    arms = np.take_along_axis(pools, _subsets(rng, len(pools), pool, sample), axis=1)
    draws = _deployed(scores, arms, pulls, alpha, rng)
    means = draws.reshape(reps, REPEATS_PER_POOL, pulls).mean(axis=1)
    low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)], axis=0)
    return TuningCurve(value, low, high, pool, sample)


def _subsets(rng: np.random.Generator, rows: int, count: int, size: int) -> np.ndarray:
    """`size` different ones of `count` in random order, for each row: [rows, size]."""
    return rng.permuted(np.tile(np.arange(count), (rows, 1)), axis=1)[:, :size]


def _deployed(
    scores: Sequence[Sequence[float]],
    arms: np.ndarray,
    pulls: int,
    alpha: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """The mean score of the policy that each tuning deploys after each pull: [rows, pulls].

    Args:
        arms: indices of the policies at hand, in random order, [rows, K].
    """
    counts = np.array([len(values) for values in scores])
    table = np.zeros((len(scores), counts.max()))
    for index, values in enumerate(scores):
        table[index, : len(values)] = values
    means = np.array([np.mean(values) for values in scores])
    spread = math.sqrt(float(np.mean([np.var(values) for values in scores])))
    rows, k = arms.shape
    row = np.arange(rows)
    pulled, total = np.zeros((rows, k)), np.zeros((rows, k))
    deployed = np.empty((rows, pulls))
    for pull in range(pulls):
        if pull < k:  # each once
            chosen = np.full(rows, pull)
        else:
            bonus = spread * np.sqrt(alpha * math.log(pull + 1) / pulled)
            chosen = _argmax(total / pulled + bonus, rng)
        arm = arms[row, chosen]
        total[row, chosen] += table[arm, (rng.random(rows) * counts[arm]).astype(np.int64)]
        pulled[row, chosen] += 1
        best = np.where(pulled > 0, total / np.maximum(pulled, 1), -np.inf)
        deployed[:, pull] = means[arms[row, _argmax(best, rng)]]
    return deployed


def _argmax(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The column of each row's maximum, a random one of several: [R, K] -> [R]."""
    ties = values == values.max(axis=1, keepdims=True)
    return np.where(ties, rng.random(values.shape), -1.0).argmax(axis=1)
