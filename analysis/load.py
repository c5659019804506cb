"""From database rows to one score per seed: which rows may be pooled, and which are missing.

Owns normalisation, the choice of an evaluation and the rule that nothing is pooled silently: a
task is a dataset of one digest in one simulator version, a method is one variant (everything but
the seed) on each task, and a seed without a finished run is named, never skipped.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from results.schema import canonical_json
from results.store import Store

if TYPE_CHECKING:
    import pandas as pd


LONGEST_SUFFIX = 48
"""Letters after a label; a longer difference is named by a hash and told in a note."""


class MissingScoresError(ValueError):
    """A matrix was asked for cells that have no score; names them."""


@dataclass(frozen=True)
class Task:
    """What scores may be pooled over seeds: a dataset's content in one simulator version."""

    name: str  # the dataset id, with what distinguishes it where one id stands for several tasks
    dataset_id: str
    digest: str
    simulator: str
    relation: str
    ref_min: float | None
    ref_max: float | None
    ref_source: str

    @property
    def normalized(self) -> bool:
        """Whether returns can be normalised: both references are known, and not the wrong way."""
        return self.ref_min is not None and self.ref_max is not None and self.ref_min < self.ref_max

    def score(self, episode_return: float) -> float:
        """The normalised score, a fraction; the raw return of a task without references."""
        if not self.normalized:
            return episode_return
        assert self.ref_min is not None
        assert self.ref_max is not None
        return (episode_return - self.ref_min) / (self.ref_max - self.ref_min)


@dataclass(frozen=True)
class Cell:
    """One method on one task.

    Attributes:
        scores: seed -> score of the selected evaluation.
        missing: seed -> why there is none ("failed", "diverged", "running", "never run", ...).
        run_ids: the runs behind the scores.
    """

    scores: Mapping[int, float]
    missing: Mapping[int, str] = field(default_factory=dict)
    run_ids: tuple[str, ...] = ()
    variant_id: str = ""


@dataclass(frozen=True)
class Scores:
    """Scores of methods on tasks, with how they were selected.

    Attributes:
        select: the selection rule that was applied.
        notes: what a reader has to know, such as rows that could not be pooled.
    """

    select: str
    methods: tuple[str, ...]
    tasks: tuple[Task, ...]
    cells: Mapping[tuple[str, str], Cell]  # (method, task name)
    notes: tuple[str, ...] = ()

    @property
    def uses_test_rollouts(self) -> bool:
        """Whether the selection itself looked at the returns it reports."""
        return self.select == "best"

    def gaps(self, method: str, tasks: Iterable[Task]) -> list[str]:
        """What a method lacks on these tasks, in words; empty if it is complete."""
        found = []
        for task in tasks:
            cell = self.cells.get((method, task.name))
            if cell is None:
                found.append(f"{task.name}: never run")
            elif cell.missing:
                found.append(f"{task.name}: {missing_text(cell.missing)}")
        return found

    def matrix(self, method: str, tasks: Iterable[Task] | None = None) -> list[list[float]]:
        """Scores of a method, one list of seeds for each task.

        Raises:
            MissingScoresError: naming each cell and seed that has no score.
        """
        tasks = list(self.tasks if tasks is None else tasks)
        gaps = self.gaps(method, tasks)
        if gaps:
            raise MissingScoresError(
                f"{method} lacks scores: {'; '.join(gaps)}. Finish these runs, or leave the task "
                "or the method out explicitly"
            )
        return [
            [score for _, score in sorted(self.cells[method, task.name].scores.items())]
            for task in tasks
        ]


def numbered(count: int | str, noun: str) -> str:
    """`1 seed`, `2 seeds`, `2 to 4 seeds`."""
    return f"{count} {noun}{'' if str(count) == '1' else 's'}"


def missing_text(missing: Mapping[int, str]) -> str:
    """Seeds without a score by reason: "seeds 0-2, 5 failed; seed 3 diverged"."""
    by_reason: dict[str, list[int]] = {}
    for seed, why in sorted(missing.items()):
        by_reason.setdefault(why, []).append(seed)
    parts = []
    for why, seeds in by_reason.items():
        runs = [[seeds[0], seeds[0]]]
        for seed in seeds[1:]:
            if seed == runs[-1][1] + 1:
                runs[-1][1] = seed
            else:
                runs.append([seed, seed])
        text = ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
        parts.append(f"seed{'s' if len(seeds) > 1 else ''} {text} {why}")
    return "; ".join(parts)


def parse_select(select: str) -> tuple[str, int]:
    """The kind of a selection rule and its number: ("last", 5) for `last-5`.

    Raises:
        ValueError: if the rule is none of last, last-K, cloning-loss, cloning-loss-K, best.
    """
    if select == "best":
        return "best", 1
    found = re.fullmatch(r"(last|cloning-loss)(?:-([1-9]\d*))?", select)
    if not found:
        raise ValueError(
            f"selection rule {select!r}; expected last, last-K (mean of the last K evaluations, "
            "such as last-5), cloning-loss (the checkpoint of the lowest behaviour-cloning loss), "
            "cloning-loss-K (of the K-th lowest) or best"
        )
    return found[1], int(found[2] or 1)


def select_by_bc_loss(steps: Sequence[int], losses: pd.DataFrame, rank: int) -> tuple[int, str]:
    """The evaluation that Diffusion-QL's offline selection reports, and why if there is none.

    A checkpoint's loss is the mean of the training loss since the evaluation before it. Training
    counts as stopped at the first checkpoint whose loss exceeds the one before; among the
    checkpoints until then the one with the `rank`-th lowest loss is chosen (Wang et al., 2023:
    the second or third lowest; the released table's `top_k` is rank - 1). The released code takes
    the *rank of checkpoint number* top_k instead, which is the same where the loss only falls.
    With fewer checkpoints than `rank` the last rank is chosen, as in that code.

    Args:
        steps: evaluated gradient steps, ascending.
        losses: columns step and value, each row a mean over the steps since the row before.
        rank: 1 is the lowest.
    Returns:
        The index into `steps` and an empty text, or -1 and what is missing.
    """
    losses = losses.sort_values("step")
    weight = losses.step.diff().fillna(losses.step)
    means: list[float] = []
    start = 0
    for step in steps:
        within = (losses.step > start) & (losses.step <= step)
        if not within.any() or not losses.value[within].map(math.isfinite).all():
            return -1, f"has no finite bc_loss between steps {start} and {step}"
        means.append(float((losses.value * weight)[within].sum() / weight[within].sum()))
        start = step
        if len(means) > 1 and means[-1] > means[-2]:
            break
    return sorted(range(len(means)), key=means.__getitem__)[min(rank, len(means)) - 1], ""


def read_tasks(store: Store, trials: pd.DataFrame) -> dict[tuple[str, str, str], Task]:
    """Tasks of the trials by (dataset id, digest, simulator), with names that tell them apart."""
    datasets = {(row.dataset_id, row.digest): row for row in _rows(store.datasets())}
    keys = sorted(set(zip(trials.dataset_id, trials.dataset_digest, trials.simulator, strict=True)))
    found = {}
    for dataset_id, digest, simulator in keys:
        same = [key for key in keys if key[0] == dataset_id]
        marks = []
        if len({key[1] for key in same}) > 1:
            marks.append(f"data {digest[:8]}")
        if len({key[2] for key in same}) > 1:
            marks.append(simulator)
        row = datasets[dataset_id, digest]
        found[dataset_id, digest, simulator] = Task(
            name=f"{dataset_id} [{', '.join(marks)}]" if marks else dataset_id,
            dataset_id=dataset_id,
            digest=digest,
            simulator=simulator,
            relation=row.relation,
            ref_min=_known(row.ref_min),
            ref_max=_known(row.ref_max),
            ref_source=row.ref_source,
        )
    return found


def _known(value: float | None) -> float | None:
    return None if value is None or value != value else float(value)


def trials_to_show(store: Store, trial_ids: Iterable[str] | None) -> pd.DataFrame:
    """The trials that were asked for, run or not; of a whole database all that ever ran."""
    trials = store.trials(trial_ids)
    if trial_ids is None:
        ran = [state.trial_id for state in store.states() if state.status is not None]
        return trials[trials.trial_id.isin(ran)]
    return trials


def evaluation_frame(store: Store, trial_ids: Iterable[str] | None = None) -> pd.DataFrame:
    """One row per trial and evaluation of finished or diverged runs, ready to plot.

    Columns: method, task, seed, step, score (normalised fraction, or raw return), status,
    trial_id, run_id, variant_id.
    """
    ids = None if trial_ids is None else list(trial_ids)
    trials = trials_to_show(store, ids)
    frame = store.evaluation_means(ids, statuses=("done",))
    if trials.empty or frame.empty:
        return frame.assign(method="", task="", seed=0, score=0.0, variant_id="").iloc[:0]
    tasks = read_tasks(store, trials)
    names, _ = method_names(trials, tasks)
    info = trials.set_index("trial_id")
    frame = frame.join(
        info[["seed", "variant_id", "dataset_id", "dataset_digest", "simulator"]], on="trial_id"
    )
    found = [
        tasks[key]
        for key in zip(frame.dataset_id, frame.dataset_digest, frame.simulator, strict=True)
    ]
    return frame.assign(
        method=[names[trial_id] for trial_id in frame.trial_id],
        task=[task.name for task in found],
        score=[t.score(value) for t, value in zip(found, frame.mean_return, strict=True)],
    ).sort_values(["task", "method", "seed", "step"], ignore_index=True)


def latency_frame(store: Store, trial_ids: Iterable[str] | None = None) -> pd.DataFrame:
    """The newest measured latency of each run, batch, mode and machine.

    Columns: those of `Store.latencies`, `condition` (processor, threads and mode: only times under
    one condition compare), `ms`, `ms_low` and `ms_high` (per action: median of all calls, lowest
    and highest median of a round).
    """
    frame = store.latencies(trial_ids)
    conditions = [
        f"{row.hardware.get('gpu') if row.device.startswith('cuda') else row.hardware.get('cpu')}, "
        f"{row.threads} thread{'s' if row.threads > 1 else ''}, "
        f"{'compiled' if row.compiled else 'eager'}"
        for row in _rows(frame)
    ]
    frame = frame.assign(
        condition=conditions,
        ms=frame.median_ms / frame.batch,
        ms_low=[min(row.round_medians_ms) / row.batch for row in _rows(frame)],
        ms_high=[max(row.round_medians_ms) / row.batch for row in _rows(frame)],
    )
    return frame.drop_duplicates(["run_id", "batch", "condition"], keep="last", ignore_index=True)


def method_names(
    trials: pd.DataFrame, tasks: Mapping[tuple[str, str, str], Task]
) -> tuple[dict[str, str], list[str]]:
    """Trial id -> name of its method, and notes about labels that do not stand for one variant.

    Labels that share a variant are one method: seeds of one setting are never told apart by what
    an experiment called it. A label names a method where it stands for one variant on each task.
    Where it stands for several (other hyperparameters, steps or evaluation), each becomes a method
    of its own, named after what differs, so that trials with the same difference meet in one row
    over all tasks.
    """
    trials, same = _unite_labels(trials)
    variants: dict[str, dict[str, dict[str, dict[str, str]]]] = {}  # label, task, variant
    task_of = {}
    for row in _rows(trials):
        task = tasks[row.dataset_id, row.dataset_digest, row.simulator].name
        task_of[row.trial_id] = task
        variants.setdefault(row.label, {}).setdefault(task, {})[row.variant_id] = _settings(row)
    differing = {label: _differing(by_task.values()) for label, by_task in variants.items()}
    names: dict[str, str] = {}
    explained: dict[str, str] = {}
    split: dict[str, set[str]] = {}
    for row in _rows(trials):
        found = variants[row.label][task_of[row.trial_id]]
        marks = [f"{name}={_settings(row).get(name, '-')}" for name in differing[row.label]]
        text = ", ".join(marks)
        if len(text) > LONGEST_SUFFIX:  # a short name, the same on every task, and a note
            short = hashlib.sha256(text.encode()).hexdigest()[:8]
            explained[f"{row.label} ({short})"] = text
            text = short
        if len({tuple(sorted(one.items())) for one in found.values()}) < len(found):
            # They differ in nothing that is recorded: an identity made by other code.
            text = ", ".join(filter(None, (text, row.variant_id[:8])))
        names[row.trial_id] = f"{row.label} ({text})" if text else row.label
        split.setdefault(row.label, set()).add(names[row.trial_id])
    notes = [
        f"{label} was run with several configurations, each a row of its own: "
        f"{'; '.join(sorted(found))}. Name a spec to choose one"
        for label, found in sorted(split.items())
        if len(found) > 1
    ]
    return names, same + notes + [f"{name} is {text}" for name, text in sorted(explained.items())]


def _unite_labels(trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Trials whose labels are one, the most frequent, where they share a variant; notes on that."""
    label_of: dict[str, str] = {}  # label -> another of the same method; ends at itself

    def root(label: str) -> str:
        while label_of.setdefault(label, label) != label:
            label = label_of[label]
        return label

    for _, labels in trials.groupby("variant_id").label.unique().items():
        for other in labels[1:]:
            label_of[root(other)] = root(labels[0])
    groups: dict[str, set[str]] = {}
    for label in trials.label.unique():
        groups.setdefault(root(label), set()).add(label)
    counts = trials.label.value_counts()
    shown = {
        label: min(group, key=lambda name: (-counts[name], name))
        for group in groups.values()
        for label in group
    }
    notes = [
        f"{', '.join(sorted(group - {shown[first]}))} shown as {shown[first]}: the same settings"
        for first, group in sorted(groups.items())
        if len(group) > 1
    ]
    return trials.assign(label=trials.label.map(shown)), notes


def _rows(frame: pd.DataFrame) -> Iterator[Any]:
    """Rows by column name; pandas' own annotation makes every value a union of a dozen types."""
    yield from frame.itertuples()


def _settings(row: Any) -> dict[str, str]:
    """All that two trials on one task may differ in besides the seed, flat."""
    settings = {
        "algorithm": row.algorithm,
        "revision": str(row.revision),
        "precision": row.precision,
    }
    for prefix, block in (("", row.config), ("data.", row.data), ("evaluation.", row.evaluation)):
        for name, value in block.items():
            settings[prefix + name] = value if isinstance(value, str) else canonical_json(value)
    return settings


def _differing(tasks: Iterable[Mapping[str, Mapping[str, str]]]) -> list[str]:
    """Settings that differ between the variants on at least one task."""
    found = set()
    for variants in tasks:
        for name in set().union(*variants.values()):
            if len({variant.get(name) for variant in variants.values()}) > 1:
                found.add(name)
    return sorted(found)


def load_scores(
    store: Store, trial_ids: Iterable[str] | None = None, select: str = "last"
) -> Scores:
    """One score per method, task and seed.

    Args:
        trial_ids: the trials to look at, run or not; None for all that ever ran. Ids that the
            database does not know cannot be named here: `harness sweep --dry-run` lists them.
        select: `last`, `last-K` (mean of a run's last K evaluations), `cloning-loss[-K]`
            (offline, by the training loss: `select_by_bc_loss`), or `best` (the largest
            evaluation, which chooses by test rollouts).

    Raises:
        ValueError: if the rule is unknown.
    """
    kind, count = parse_select(select)
    ids = None if trial_ids is None else list(trial_ids)
    trials = trials_to_show(store, ids)
    if trials.empty:
        return Scores(select, (), (), {}, ("the database has none of these trials",))
    unknown = 0 if ids is None else len(set(ids)) - len(trials)
    tasks = read_tasks(store, trials)
    names, notes = method_names(trials, tasks)
    if unknown:
        notes.append(f"{unknown} trials were never planned into this database: not shown")
    means = store.evaluation_means(list(trials.trial_id), statuses=("done",))
    curves = dict(iter(means.groupby("trial_id", sort=False)))
    losses: dict[str, pd.DataFrame] = {}
    if kind == "cloning-loss":
        rows = store.metrics(list(trials.trial_id), ["bc_loss"])
        losses = {str(run): frame for run, frame in rows.groupby("run_id", sort=False)}
    statuses = store.statuses(list(trials.trial_id))
    scores: dict[tuple[str, str], dict[int, float]] = {}
    missing: dict[tuple[str, str], dict[int, str]] = {}
    runs: dict[tuple[str, str], list[str]] = {}
    variant: dict[tuple[str, str], str] = {}
    last_step: dict[tuple[str, str], int] = {}
    for row in _rows(trials):
        if row.trial_id in curves:
            task = tasks[row.dataset_id, row.dataset_digest, row.simulator]
            key = names[row.trial_id], task.name
            last_step[key] = max(last_step.get(key, 0), curves[row.trial_id].step.max())
    for row in _rows(trials):
        task = tasks[row.dataset_id, row.dataset_digest, row.simulator]
        key = names[row.trial_id], task.name
        for table in (scores, missing):
            table.setdefault(key, {})
        variant[key] = row.variant_id
        run = statuses.get(row.trial_id)
        curve = curves.get(row.trial_id)
        if run is None or run.status != "done" or curve is None:
            missing[key][row.seed] = run.status if run is not None else "never run"
            continue
        curve = curve.sort_values("step")
        returns = curve.mean_return
        why = ""
        if kind == "last" and len(returns) < count:
            why = f"has only {len(returns)} evaluations"
        elif not all(map(math.isfinite, returns)):
            why = "has a return that is not finite"
        elif curve.step.max() < last_step[key]:
            why = f"was evaluated only up to step {curve.step.max()} of {last_step[key]}"
        elif kind == "cloning-loss" and run.run_id not in losses:
            why = "has no metric bc_loss"
        elif kind == "cloning-loss":
            chosen_index, why = select_by_bc_loss(list(curve.step), losses[run.run_id], count)
        if why:
            missing[key][row.seed] = why
            continue
        if kind == "cloning-loss":
            chosen = returns.iloc[chosen_index]
        else:
            chosen = returns.max() if kind == "best" else returns.tail(count).mean()
        scores[key][row.seed] = task.score(float(chosen))
        runs.setdefault(key, []).append(run.run_id)
    cells = {
        key: Cell(scores[key], missing[key], tuple(runs.get(key, ())), variant[key])
        for key in scores
    }
    ordered = tuple(sorted(tasks.values(), key=lambda task: task.name))
    methods = tuple(sorted({method for method, _ in cells}))
    return Scores(select, methods, ordered, cells, tuple(notes))
