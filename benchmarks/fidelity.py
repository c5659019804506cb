"""Scores beside the authors' own code: the same data, settings, steps and evaluation.

    python benchmarks/fidelity.py [METHOD ...] [--rows FILE] [--corl DIR] [--diffusion-ql DIR]
                                  [--idql DIR] [--dataset GLOB] [--seeds 0-3] [--steps N]
                                  [--out FILE] [--threads 1]

`--rows` is an archive of finished trials of ours (`harness archive`; default:
pen-expert of results/evidence). For each METHOD in it (a label; default: all that a given clone
has) the authors' learner is trained on the same dataset, with the rewards and settings of our
trials and as many steps, acts in the same episodes, and the difference is printed with its 95 %
Welch interval over seeds: code that computes something else shows where two versions of one formula
agree on paper. DIR is the user's own clone, see peers.py.

Scores of the authors' code are added to `--out` (default: authors.csv beside the rows) as they
come. A seed that is there is not trained again, so that several processes can share the seeds, and
without a clone what is there is shown. Theirs are their modules, losses and optimizers; ours are
the rows of the data and the evaluation. Their initial weights and draws differ from ours: what
should agree are distributions, not seeds.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peers import Box, corl_td3_bc_networks, diffusion_ql_class, idql_class, script
from scipy.stats import ttest_ind
from torch import Tensor

from analysis.load import read_tasks
from analysis.stats import Estimate
from analysis.tables import markdown_table, mean_text
from harness.datasets.buffers import TransitionDataset, load
from harness.environments import evaluation_environment
from harness.evaluate import Evaluator
from harness.spec.reading import parse_seeds
from results.archive import open_archive

COLUMNS = ("code", "method", "dataset", "variant_id", "seed", "step", "mean_return")
CONFIDENCE = 0.95
ROWS = Path(__file__).parent.parent / "results" / "evidence" / "pen-expert" / "rows.parquet"
CALL_STEPS = 50_000  # of Diffusion-QL's code: its rates change between calls of `train`


class Learner(NamedTuple):
    """An authors' learner.

    Attributes:
        train: so many gradient steps.
        act: observations as the environment gives them, [N, O] -> actions [N, A].
    """

    train: Callable[[int], Any]
    act: Callable[[np.ndarray], np.ndarray]


Build = Callable[[str, Mapping[str, Any], TransitionDataset], Learner]


def expect(config: Mapping[str, Any], **values: Any) -> None:
    """Refuses settings that the authors' code cannot be given."""
    wrong = [f"{name} {config[name]}" for name in values if config[name] != values[name]]
    if wrong:
        raise ValueError(f"the authors' code has no setting for {', '.join(wrong)}")


# --------------------------------------------------------------------------------- their learners


def corl(code: Any, learner: Any, config: Mapping[str, Any], data: TransitionDataset) -> Learner:
    """Batches of normalised observations as CORL's buffer makes them."""
    mean, std = code.compute_mean_std(data.obs.numpy(), eps=1e-3)
    obs = code.normalize_states(data.obs, torch.as_tensor(mean), torch.as_tensor(std))
    next_obs = code.normalize_states(data.next_obs, torch.as_tensor(mean), torch.as_tensor(std))

    def train(steps: int) -> None:
        for _ in range(steps):
            rows = torch.randint(0, len(obs), (config["batch_size"],))
            learner.train([
                obs[rows],
                data.action[rows],
                data.reward[rows, None],
                next_obs[rows],
                data.terminated[rows, None],
            ])  # fmt: skip

    def act(states: np.ndarray) -> np.ndarray:
        return np.stack([learner.actor.act((state - mean) / std) for state in states])

    return Learner(train, act)


def corl_td3_bc(folder: str, config: Mapping[str, Any], data: TransitionDataset) -> Learner:
    code = script(folder, "algorithms/offline/td3_bc.py")
    expect(config, hidden_dim=256, normalize_obs=True)
    sizes = data.spec.obs_dim, data.spec.action_dim
    learner = code.TD3_BC(
        1.0,
        discount=config["discount"],
        tau=config["tau"],
        policy_noise=config["policy_noise"],
        noise_clip=config["noise_clip"],
        policy_freq=config["policy_every"],
        alpha=config["q_coef"],
        **corl_td3_bc_networks(code, sizes, config["lr"], config["critic_lr"]),
    )
    return corl(code, learner, config, data)


def corl_bc(folder: str, config: Mapping[str, Any], data: TransitionDataset) -> Learner:
    code = script(folder, "algorithms/offline/any_percent_bc.py")
    expect(config, hidden_dim=256, normalize_obs=True, head="deterministic")
    actor = code.Actor(data.spec.obs_dim, data.spec.action_dim, 1.0)
    learner = code.BC(1.0, actor, torch.optim.Adam(actor.parameters(), lr=config["lr"]))
    return corl(code, learner, config, data)


def official_diffusion_ql(
    folder: str, config: Mapping[str, Any], data: TransitionDataset
) -> Learner:
    expect(
        config,
        hidden_dim=256,
        time_dim=16,
        critic_lr=3e-4,
        bc_only=False,
        lr_decay="as_run",
        q_normalizer="other_critic",
        candidate_choice="softmax",
        num_candidates=50,
        backup_actions=10,
    )
    learner = diffusion_ql_class(folder)(
        data.spec.obs_dim,
        data.spec.action_dim,
        1.0,
        "cpu",
        config["discount"],
        config["tau"],
        max_q_backup=config["max_q_backup"],
        eta=config["q_coef"],
        beta_schedule=config["schedule"],
        n_timesteps=config["denoise_steps"],
        ema_decay=config["ema_decay"],
        step_start_ema=config["ema_start"],
        update_ema_every=config["ema_every"],
        lr=config["lr"],
        lr_decay=False,
        grad_norm=config["clip_norm"],
    )

    class Sampler:
        def sample(self, batch_size: int) -> tuple[Tensor, ...]:
            rows = torch.randint(0, len(data.obs), (batch_size,))
            going_on = 1.0 - data.terminated[rows, None]
            kept = data.obs[rows], data.action[rows], data.next_obs[rows]
            return *kept, data.reward[rows, None], going_on

    def train(steps: int) -> None:
        if learner.step + steps > CALL_STEPS:
            raise ValueError(
                f"more than {CALL_STEPS} steps: there the authors' code changes its rates"
            )
        learner.train(Sampler(), steps, config["batch_size"])

    return Learner(train, lambda states: np.stack([learner.sample_action(s) for s in states]))


def official_idql(folder: str, config: Mapping[str, Any], data: TransitionDataset) -> Learner:
    """December's code."""
    import jax
    from flax.core import FrozenDict

    expect(
        config,
        critic_objective="expectile",
        actor_objective="bc",
        candidate_choice="greedy",
        actor_updates=1,
        actor_batch_size=config["batch_size"],
        hidden_dim=256,
        activation="silu",
        cond_dim=2 * config["time_dim"],
        value_input_norm=True,
        weight_decay=1e-4,
        lr_decay="cosine",
    )

    learner = idql_class(folder).create(
        torch.initial_seed(),
        Box(data.spec.obs_dim),
        Box(data.spec.action_dim),
        actor_lr=config["lr"],
        critic_lr=config["critic_lr"],
        value_lr=config["critic_lr"],
        discount=config["discount"],
        tau=config["tau"],
        critic_hyperparam=config["expectile"],
        ddpm_temperature=config["sample_noise_scale"],
        actor_num_blocks=config["num_blocks"],
        actor_tau=1.0 - config["ema_decay"],
        actor_dropout_rate=config["dropout_rate"],
        T=config["denoise_steps"],
        time_dim=config["time_dim"],
        N=config["num_candidates"],
        beta_schedule=config["schedule"],
        decay_steps=config["steps"],
    )
    columns = {
        "observations": data.obs,
        "actions": data.action,
        "next_observations": data.next_obs,
        "rewards": data.reward,
        "masks": 1.0 - data.terminated,
    }
    arrays = {name: jax.numpy.asarray(column.numpy()) for name, column in columns.items()}

    def train(steps: int) -> None:
        nonlocal learner
        for _ in range(steps):
            rows = torch.randint(0, len(data.obs), (config["batch_size"],)).numpy()
            batch = {name: array[rows] for name, array in arrays.items()}
            learner, _ = learner.update(FrozenDict(batch))

    def act(states: np.ndarray) -> np.ndarray:
        nonlocal learner
        actions = []
        for state in states:
            action, learner = learner.eval_actions(state)
            actions.append(action)
        return np.stack(actions)

    return Learner(train, act)


AUTHORS: dict[str, tuple[str, Build]] = {  # algorithm of ours -> argument, learner
    "bc": ("corl", corl_bc),
    "td3_bc": ("corl", corl_td3_bc),
    "diffusion_ql": ("diffusion_ql", official_diffusion_ql),
    "idql": ("idql", official_idql),
}


# ------------------------------------------------------------------------------------------- runs


class Playing:
    """An authors' learner as a policy of the harness' evaluator."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def act(self, obs: Tensor, rng: Any) -> Tensor:
        del rng  # their draws are the global generator's
        return torch.as_tensor(self.learner.act(obs[0].numpy()), dtype=torch.float32)[None]


def run(code: str, build: Build, folder: str, trial: Any, seed: int, steps: int, out: Path) -> None:
    """Trains one seed of the authors' code as our trial was, and adds its evaluations to `out`."""
    data = load(trial.dataset_id, trial.data)
    if data.spec.digest != trial.dataset_digest:
        raise ValueError(f"{trial.dataset_id} here is not the data of the rows")
    if not np.allclose([data.spec.action_low, data.spec.action_high], [[-1.0], [1.0]]):
        raise ValueError("the authors' code was given actions in [-1, 1]; these are not")
    asked = trial.evaluation
    environment = evaluation_environment(trial.dataset_id)
    if (environment.describe(), environment.simulator) != (
        asked["environment"],
        asked["simulator"],
    ):
        raise ValueError(
            f"the rows were evaluated in {asked['environment']} on {asked['simulator']}; here are "
            f"{environment.describe()} and {environment.simulator}"
        )
    torch.manual_seed(seed)
    np.random.seed(seed)  # theirs asks the global generator  # noqa: NPY002
    learner = build(folder, trial.config, data)
    evaluator = Evaluator(
        environment.make,
        1,
        asked["episodes"],
        asked["episodes"],
        asked["first_env_seed"],
    )
    started = time.perf_counter()
    done = 0
    for step in (*range(asked["every"], steps, asked["every"]), steps):
        learner.train(step - done)
        done = step
        place = torch.tensor([seed]), torch.tensor([step])
        (episodes,), failed = evaluator.run(Playing(learner), *place, [True])
        if failed:
            raise RuntimeError(f"{code} {trial.label} seed {seed}: {failed[0]}")
        score = float(np.mean([episode.episode_return for episode in episodes]))
        row = (code, trial.label, trial.dataset_id, trial.variant_id, seed, step, score)
        new = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([COLUMNS] * new + [row])
        rate = step / (time.perf_counter() - started)
        where = f"{code} {trial.label} on {trial.dataset_id}, seed {seed}, step {step}"
        print(f"{where}: return {score:.1f}, {rate:.0f} steps/s with evaluations", flush=True)
    evaluator.close()


def code_of(folder: str) -> str:
    """Name and commit of a clone."""
    command = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{Path(folder).resolve().name} {told.stdout.strip() or 'of unknown commit'}"


def theirs(out: Path, trial: Any) -> dict[int, dict[int, float]]:
    """Mean returns in `out` of the authors' code trained as `trial` was: step -> seed -> return."""
    found: dict[int, dict[int, float]] = {}
    if out.exists():
        with out.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["variant_id"] == trial.variant_id:
                    by_seed = found.setdefault(int(row["step"]), {})
                    by_seed[int(row["seed"])] = float(row["mean_return"])
    return found


def compared(trial: Any, ours: Any, score: Callable[[float], float], out: Path) -> list[list[str]]:
    """Rows of the table: scores after each step that both were evaluated at, and the difference.

    Args:
        ours: rows of `Store.evaluation_means` of all seeds of the trial's variant.
    """
    rows = []
    for step, returns in sorted(theirs(out, trial).items()):
        a = 100 * np.array([score(value) for value in ours.mean_return[ours.step == step]])
        b = 100 * np.array([score(value) for value in returns.values()])
        difference = "–"
        if min(len(a), len(b)) > 1:
            bounds = ttest_ind(a, b, equal_var=False).confidence_interval(CONFIDENCE)
            difference = Estimate(a.mean() - b.mean(), *bounds).text(1, sign="+")
        method = trial.label + f" ({trial.precision})" * (trial.precision != "float32")
        rows.append(
            [
                method,
                trial.dataset_id,
                str(step),
                mean_text(b),
                mean_text(a) if len(a) else "–",
                difference,
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--corl", metavar="DIR")
    parser.add_argument("--diffusion-ql", metavar="DIR")
    parser.add_argument("--idql", metavar="DIR", help="needs jax, flax and optax")
    parser.add_argument("--dataset", default="*")
    parser.add_argument("--seeds", default="0-3")
    parser.add_argument("--steps", type=int, help="fewer than our trials had")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    out = given.out or given.rows.with_name("authors.csv")
    torch.set_num_threads(given.threads)
    with open_archive(given.rows) as store:
        trials, means = store.trials(), store.evaluation_means(statuses=("done",))
        tasks = read_tasks(store, trials)
    means = means.merge(trials[["trial_id", "variant_id"]], on="trial_id")
    rows = []
    for trial in trials.drop_duplicates("variant_id").itertuples():
        if (
            trial.algorithm not in AUTHORS
            or (given.methods and trial.label not in given.methods)
            or not fnmatch.fnmatch(trial.dataset_id, given.dataset)
        ):
            continue
        argument, build = AUTHORS[trial.algorithm]
        folder = getattr(given, argument)
        steps = min(trial.config["steps"], given.steps or trial.config["steps"])
        for seed in parse_seeds(given.seeds) if folder else ():
            if seed not in theirs(out, trial).get(steps, {}):
                run(code_of(folder), build, folder, trial, seed, steps, out)
        task = tasks[trial.dataset_id, trial.dataset_digest, trial.simulator]
        rows += compared(trial, means[means.variant_id == trial.variant_id], task.score, out)
    if not rows:
        sys.exit(f"{out} has no scores beside those of {given.rows}; give a clone (--help)")
    header = ["method", "dataset", "step", "authors' code", "ours"]
    print(markdown_table([*header, f"ours less theirs, {CONFIDENCE:.0%} Welch"], rows))


if __name__ == "__main__":
    main()
