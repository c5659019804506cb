"""Training speed beside the authors' own code: seeds x gradient steps per second of the machine.

    python benchmarks/peers.py [--diffusion-ql DIR] [--idql DIR] [--cleandiffuser DIR]
                               [--corl DIR] [--unifloral DIR]
                               [--python NAME=PATH] [--device cpu] [--seconds 10] [--evaluation]
                               [--seeds 1 4] [--precisions float32 mixed]

DIR is the user's own clone of github.com/Zhendong-Wang/Diffusion-Policies-for-Offline-RL,
philippe-eecs/IDQL, CleanDiffuserTeam/CleanDiffuser, tinkoff-ai/CORL or EmptyJackson/unifloral;
nothing of them is in this repository. Their learners are imported from there and fed the same data
(Hopper's shape: 11 observations, 3 actions, 100 000 random transitions), with the same batch and
network sizes as ours: Diffusion-QL 3 x 256, 5 denoising steps, batch 256; IDQL at the sizes of its
December-2023 code, batch 512; IQL and TD3+BC 2 x 256, batch 256. A step of TD3+BC is one update of
the critics and half a one of the actor; Unifloral's, two and one, counts as two.

Everything runs in this one call, one contestant after the other, each in its best arrangement: one
process with all cores, or one process a core, started together and timed over the same seconds.
On a GPU: one process. Read the ratio to the first line of each table. A clone may need packages
that this environment lacks: `--python idql=/path/to/python` names an interpreter for it. Packages a
clone imports but does not use here (simulators, image models) are replaced by empty ones.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OBS, ACTIONS, ROWS = 11, 3, 100_000
DEC_2023 = {
    "actor_updates": 1,
    "batch_size": 512,
    "actor_batch_size": 512,
    "activation": "silu",
    "weight_decay": 1e-4,
    "value_input_norm": True,
    "time_dim": 128,
    "cond_dim": 256,
}
Step = Callable[[], Any]
"""One gradient step of all seeds of a process; waits for the device where that is needed."""


@dataclass(frozen=True)
class Contestant:
    table: str  # contestants of one table train the same algorithm at the same sizes
    name: str
    folder: str = ""  # a clone; empty is ours
    seeds: int = 1  # trained together by one process
    precision: str = "float32"
    compiled: bool = True


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "obs": generator.standard_normal((ROWS, OBS), dtype=np.float32),
        "action": generator.uniform(-1, 1, (ROWS, ACTIONS)).astype(np.float32),
        "reward": generator.standard_normal((ROWS, 1), dtype=np.float32),
        "next_obs": generator.standard_normal((ROWS, OBS), dtype=np.float32),
        "going_on": np.ones((ROWS, 1), dtype=np.float32),
    }


# ------------------------------------------------------------------------------- in a process each


class _Anything:
    """Stands for whatever is imported from a package that is not needed here."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __getattr__(self, name: str) -> _Anything:
        return _Anything()

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return _Anything()

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)


class _Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports empty modules for the given packages and everything below them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        def anything(name: str) -> _Anything:
            if name.startswith("__"):  # what Python itself asks a module for
                raise AttributeError(name)
            return _Anything()

        module.__getattr__ = anything  # type: ignore[method-assign]


def replace_unused(*names: str) -> None:
    """Empty modules in place of packages that are imported and not used."""
    sys.meta_path.insert(0, _Unused(names))


def ours(spec: Contestant, device: str) -> Step:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    from algorithms import diffusion_ql, idql, iql, td3_bc
    from algorithms.blocks.layers import set_precision
    from algorithms.testing import TinyDataset
    from harness.trainer import Trainer

    recipe, config = {
        "Diffusion-QL": (diffusion_ql.recipe, diffusion_ql.Config(clip_norm=9.0)),
        "IDQL": (idql.recipe, idql.Config(**DEC_2023)),
        "IQL": (iql.recipe, iql.Config()),
        "TD3+BC": (td3_bc.recipe, td3_bc.Config()),
    }[spec.table]
    dataset = TinyDataset(obs_dim=OBS, action_dim=ACTIONS, num_episodes=100, episode_length=1000)
    columns = arrays()
    for name in ("obs", "action", "next_obs"):
        setattr(dataset, name, torch.as_tensor(columns[name], device=device))
    dataset.reward = torch.as_tensor(columns["reward"][:, 0], device=device)
    dataset.terminated = torch.zeros(ROWS, device=device)
    dataset.truncated = torch.zeros(ROWS, device=device)
    learner = recipe.stages(config)[-1].learner(config, dataset.spec, range(spec.seeds), {})
    learner.to(device)
    set_precision(learner, spec.precision)
    trainer = Trainer(learner, dataset, range(spec.seeds), torch.device(device), spec.compiled)
    chunk = 10
    trainer.advance(1)

    def step() -> int:
        trainer.advance(chunk)  # reads its metrics at the end, as in a sweep
        return chunk

    return step


class Buffer:
    """The official Diffusion-QL's replay buffer, on the device."""

    def __init__(self, device: str) -> None:
        import torch

        columns = arrays()
        names = ("obs", "action", "next_obs", "reward", "going_on")
        self.columns = [torch.as_tensor(columns[name], device=device) for name in names]

    def sample(self, batch_size: int) -> tuple[Any, ...]:
        import torch

        rows = torch.randint(0, ROWS, (batch_size,), device=self.columns[0].device)
        return tuple(column[rows] for column in self.columns)


def diffusion_ql_class(folder: str) -> Any:
    replace_unused("d4rl")
    sys.path.insert(0, folder)
    from agents.ql_diffusion import Diffusion_QL

    return Diffusion_QL


def official_diffusion_ql(folder: str, device: str) -> Any:
    return diffusion_ql_class(folder)(
        OBS, ACTIONS, 1.0, device, 0.99, 0.005, eta=1.0, beta_schedule="vp", n_timesteps=5,
        lr_decay=True, lr_maxt=2000, grad_norm=9.0,
    )  # fmt: skip


def peer_diffusion_ql(folder: str, device: str) -> Step:
    learner, buffer = official_diffusion_ql(folder, device), Buffer(device)

    def step() -> int:
        learner.train(buffer, 10, 256)  # reads its losses every step
        return 10

    return step


def peer_cleandiffuser(folder: str, device: str) -> Step:
    """The loop body of its Diffusion-QL pipeline, with its own networks and sampler."""
    replace_unused("torchvision", "d4rl", "gym")
    sys.path.insert(0, folder)
    from copy import deepcopy

    import torch
    from cleandiffuser.diffusion import DiscreteDiffusionSDE
    from cleandiffuser.nn_condition import IdentityCondition
    from cleandiffuser.nn_diffusion import DQLMlp
    from cleandiffuser.utils import DQLCritic, FreezeModules
    from torch.nn import functional

    network = DQLMlp(OBS, ACTIONS, emb_dim=64, timestep_emb_type="positional").to(device)
    bound = torch.ones((1, ACTIONS), device=device)
    actor = DiscreteDiffusionSDE(
        network, IdentityCondition(dropout=0.0).to(device), predict_noise=True,
        optim_params={"lr": 3e-4}, x_max=bound, x_min=-bound, diffusion_steps=5, ema_rate=0.995,
        device=device,
    )  # fmt: skip
    critic = DQLCritic(OBS, ACTIONS, hidden_dim=256).to(device)
    target = deepcopy(critic).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-4)
    actor.train()
    critic.train()
    buffer, prior = Buffer(device), torch.zeros((256, ACTIONS), device=device)
    sampling = {"solver": "ddpm", "n_samples": 256, "sample_steps": 5, "temperature": 1.0}
    sampling["w_cfg"] = 1.0
    done = 0

    def one() -> None:
        nonlocal done
        obs, action, next_obs, reward, going_on = buffer.sample(256)
        next_action, _ = actor.sample(
            prior, use_ema=True, condition_cfg=next_obs, requires_grad=False, **sampling
        )
        with torch.no_grad():
            best = torch.min(*target(next_obs, next_action))
            wanted = reward + going_on * 0.99 * best
        q1, q2 = critic(obs, action)
        loss = functional.mse_loss(q1, wanted) + functional.mse_loss(q2, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cloning = actor.loss(action, obs)
        proposed, _ = actor.sample(
            prior, use_ema=False, condition_cfg=obs, requires_grad=True, **sampling
        )
        with FreezeModules([critic]):
            q1, q2 = critic(obs, proposed)
        if np.random.default_rng(done).random() > 0.5:
            q1, q2 = q2, q1
        loss = cloning - q1.mean() / q2.abs().mean().detach()
        actor.optimizer.zero_grad()
        loss.backward()
        actor.optimizer.step()
        if done % 5 == 0:
            actor.ema_update()
            for mine, theirs in zip(critic.parameters(), target.parameters(), strict=True):
                theirs.data.lerp_(mine.data, 0.005)
        done += 1
        loss.item()

    def step() -> int:
        for _ in range(10):
            one()
        return 10

    return step


class Box:
    """What IDQL's code asks of a space."""

    def __init__(self, size: int) -> None:
        self.shape = (size,)

    def sample(self) -> np.ndarray:
        return np.zeros(self.shape, dtype=np.float32)


def idql_class(folder: str) -> Any:
    replace_unused("d4rl", "gym", "tensorflow_probability")
    sys.path.insert(0, folder)
    from jaxrl5.agents.ddpm_iql_simple.ddpm_iql_learner import DDPMIQLLearner

    return DDPMIQLLearner


def peer_idql(folder: str, device: str) -> Step:
    import jax
    from flax.core import FrozenDict

    learner = idql_class(folder).create(0, Box(OBS), Box(ACTIONS), actor_dropout_rate=0.1)
    columns = {name: jax.numpy.asarray(value) for name, value in arrays().items()}
    names = {"observations": "obs", "actions": "action", "next_observations": "next_obs"}

    @jax.jit
    def sample(key: Any) -> Any:
        rows = jax.random.randint(key, (512,), 0, ROWS)
        batch = {theirs: columns[mine][rows] for theirs, mine in names.items()}
        batch |= {"rewards": columns["reward"][rows, 0], "masks": columns["going_on"][rows, 0]}
        return batch

    key = jax.random.PRNGKey(0)

    def step() -> int:
        nonlocal learner, key
        for _ in range(10):
            key, own = jax.random.split(key)
            learner, info = learner.update(FrozenDict(sample(own)))
        jax.block_until_ready(info)
        return 10

    return step


def script(folder: str, place: str) -> Any:
    """A file of a clone as a module, without what it imports for simulators and logging."""
    replace_unused("d4rl", "gym", "wandb", "pyrallis", "tyro")
    name = f"peer_{Path(place).stem}"
    spec = importlib.util.spec_from_file_location(name, Path(folder) / place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def corl_step(learner: Any, device: str) -> Step:
    """Ten calls of a CORL learner's `train`, rows drawn as its buffer does."""
    buffer = Buffer(device)

    def step() -> int:
        for _ in range(10):
            obs, action, next_obs, reward, going_on = buffer.sample(256)
            learner.train([obs, action, reward, next_obs, 1.0 - going_on])
        return 10

    return step


def peer_corl_iql(folder: str, device: str) -> Step:
    import torch

    code = script(folder, "algorithms/offline/iql.py")
    networks = {
        "actor": code.GaussianPolicy(OBS, ACTIONS, 1.0),
        "q_network": code.TwinQ(OBS, ACTIONS),
        "v_network": code.ValueFunction(OBS),
    }
    for key, optimizer in (("actor", "actor"), ("q_network", "q"), ("v_network", "v")):
        network = networks[key].to(device)
        networks[f"{optimizer}_optimizer"] = torch.optim.Adam(network.parameters(), lr=3e-4)
    return corl_step(code.ImplicitQLearning(1.0, device=device, **networks), device)


def corl_td3_bc_networks(
    code: Any,
    sizes: tuple[int, int],
    lr: float = 3e-4,
    critic_lr: float = 3e-4,
    device: str = "cpu",
) -> dict[str, Any]:
    """Actor, critics and their optimizers under the names of CORL's `TD3_BC`."""
    import torch

    networks: dict[str, Any] = {"actor": code.Actor(*sizes, 1.0)}
    networks |= {f"critic_{n}": code.Critic(*sizes) for n in (1, 2)}
    for name in list(networks):
        rate = lr if name == "actor" else critic_lr
        weights = networks[name].to(device).parameters()
        networks[f"{name}_optimizer"] = torch.optim.Adam(weights, lr=rate)
    return networks


def peer_corl_td3_bc(folder: str, device: str) -> Step:
    code = script(folder, "algorithms/offline/td3_bc.py")
    networks = corl_td3_bc_networks(code, (OBS, ACTIONS), device=device)
    return corl_step(code.TD3_BC(1.0, device=device, **networks), device)


def unifloral_step(code: Any, networks: dict[str, tuple[Any, Any]], work: int) -> Step:
    """A scan of ten of its compiled steps.

    Args:
        networks: name in its train state -> network, and what it is initialised with.
        work: steps that one of its steps stands for.
    """
    import jax

    columns = arrays()
    data = code.Transition(
        obs=columns["obs"],
        action=columns["action"],
        reward=columns["reward"][:, 0],
        next_obs=columns["next_obs"],
        done=1.0 - columns["going_on"][:, 0],
    )
    data = jax.tree_util.tree_map(jax.numpy.asarray, data)
    args = code.Args()
    key = jax.random.PRNGKey(0)
    state = code.AgentTrainState(
        **{
            name: code.create_train_state(args, key, network, dummy)
            for name, (network, dummy) in networks.items()
        }
    )
    apply = [networks[n][0].apply for n in ("actor", "dual_q", "value") if n in networks]
    one = code.make_train_step(args, *apply, data)
    scan = jax.jit(lambda carry: jax.lax.scan(one, carry, None, 10))
    carry = (key, state)

    def step() -> int:
        nonlocal carry
        carry, losses = scan(carry)
        jax.block_until_ready(losses)
        return 10 * work

    return step


def unifloral(folder: str, place: str) -> tuple[Any, Any, list[Any], list[Any]]:
    """Module, and what its networks take: mean and std, an observation, and with an action."""
    code = script(folder, place)
    os.environ.pop("XLA_FLAGS", None)  # set on import, for GPUs; other versions stop at it
    import jax.numpy as jnp

    statistics = (jnp.zeros(OBS), jnp.ones(OBS))
    return code, statistics, [jnp.zeros(OBS)], [jnp.zeros(OBS), jnp.zeros(ACTIONS)]


def peer_unifloral_iql(folder: str, device: str) -> Step:
    code, statistics, obs, both = unifloral(folder, "algorithms/iql.py")
    actor, q = code.TanhGaussianActor(ACTIONS, *statistics), code.DualQNetwork(*statistics)
    networks = {"actor": (actor, obs), "dual_q": (q, both), "dual_q_target": (q, both)}
    networks["value"] = (code.StateValueFunction(*statistics), obs)
    return unifloral_step(code, networks, 1)


def peer_unifloral_td3_bc(folder: str, device: str) -> Step:
    code, statistics, obs, both = unifloral(folder, "algorithms/td3_bc.py")
    actor, q = code.DeterministicTanhActor(ACTIONS, *statistics), code.DualQNetwork(*statistics)
    networks = {"actor": (actor, obs), "actor_target": (actor, obs)}
    networks |= {"dual_q": (q, both), "dual_q_target": (q, both)}
    return unifloral_step(code, networks, code.Args().num_critic_updates_per_step)


PEERS: dict[tuple[str, str], tuple[str, Callable[[str, str], Step]]] = {
    ("Diffusion-QL", "official code"): ("diffusion_ql", peer_diffusion_ql),
    ("Diffusion-QL", "CleanDiffuser"): ("cleandiffuser", peer_cleandiffuser),
    ("IDQL", "official code (JAX)"): ("idql", peer_idql),
    ("IQL", "Unifloral (JAX)"): ("unifloral", peer_unifloral_iql),
    ("IQL", "CORL"): ("corl", peer_corl_iql),
    ("TD3+BC", "Unifloral (JAX)"): ("unifloral", peer_unifloral_td3_bc),
    ("TD3+BC", "CORL"): ("corl", peer_corl_td3_bc),
}
"""Table and contestant -> the option that names its clone, and what builds its step."""


def child(text: str) -> None:
    """Warms up, says so, waits for the word, runs for some seconds and prints its rate."""
    job = json.loads(text)
    os.sched_setaffinity(0, job["cores"])
    spec = Contestant(**job["contestant"])
    if not spec.name.endswith("(JAX)"):
        import torch

        torch.set_num_threads(len(job["cores"]))
    device = job["device"]
    if spec.folder:
        step = PEERS[spec.table, spec.name][1](spec.folder, device)
    else:
        step = ours(spec, device)
    step()
    print("ready", flush=True)
    sys.stdin.readline()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < job["seconds"]:
        count += step()
    elapsed = time.perf_counter() - started
    print(json.dumps(spec.seeds * count / elapsed), flush=True)


def child_evaluation(text: str) -> None:
    """Environment steps per second of the official loop: one environment, one call a step."""
    job = json.loads(text)
    import gymnasium
    import torch

    torch.set_num_threads(1)
    learner = official_diffusion_ql(job["folder"], job["device"])
    env = gymnasium.make("Hopper-v5")
    obs, _ = env.reset(seed=0)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < job["seconds"]:
        obs, _, terminated, truncated, _ = env.step(learner.sample_action(np.asarray(obs)))
        if terminated or truncated:
            obs, _ = env.reset()
        count += 1
    print(json.dumps(count / (time.perf_counter() - started)), flush=True)


# ---------------------------------------------------------------------------------- the comparison


def run(
    spec: Contestant, processes: int, cores: Sequence[int], device: str, seconds: float, python: str
) -> float:
    """Total rate of `processes` copies that share the cores evenly."""
    share = len(cores) // processes
    children = []
    for index in range(processes):
        own = list(cores[index * share : (index + 1) * share])
        job = {"contestant": vars(spec), "cores": own, "device": device, "seconds": seconds}
        command = [python, __file__, "--child", json.dumps(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(share)}
        children.append(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    for process in children:
        assert process.stdout is not None
        line = process.stdout.readline()
        while line and line.strip() != "ready":  # some peers print while they are built
            line = process.stdout.readline()
        if not line:
            _, error = process.communicate()
            for other in children:
                other.kill()
            raise RuntimeError(f"{spec.name} did not start: {error.strip().splitlines()[-1:]}")
    outputs = []
    for process in children:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in children:
        outputs.append(process.communicate()[0])
    return sum(json.loads(output.strip().splitlines()[-1]) for output in outputs)


def best(
    spec: Contestant, device: str, seconds: float, python: str
) -> tuple[float, str, dict[str, float]]:
    """The best arrangement's rate and name, and all of them."""
    cores = sorted(os.sched_getaffinity(0))
    counts = [1] if device != "cpu" else sorted({1, len(cores)})
    rates = {}
    for processes in counts:
        threads = len(cores) // processes
        name = f"{processes} x {threads}" if device == "cpu" else "1"
        rates[name] = run(spec, processes, cores, device, seconds, python)
    chosen = max(rates, key=rates.__getitem__)
    return rates[chosen], chosen, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--diffusion-ql", metavar="DIR")
    parser.add_argument("--idql", metavar="DIR")
    parser.add_argument("--cleandiffuser", metavar="DIR")
    parser.add_argument("--corl", metavar="DIR")
    parser.add_argument("--unifloral", metavar="DIR")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 4], help="sizes of our stacks")
    parser.add_argument(
        "--precisions",
        nargs="+",
        default=["float32", "mixed"],
        choices=["float32", "tf32", "mixed"],
        help="of ours; mixed is slow on a CPU without bfloat16",
    )
    parser.add_argument("--evaluation", action="store_true", help="the official loop as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--child-evaluation", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    if arguments.child_evaluation:
        return child_evaluation(arguments.child_evaluation)
    pythons = dict(item.split("=", 1) for item in arguments.python)
    contestants: list[tuple[str, Contestant]] = []
    for (table, name), (key, _) in PEERS.items():
        folder = getattr(arguments, key)
        if folder:
            if not Path(folder).is_dir():
                parser.error(f"--{key.replace('_', '-')}: {folder} is not a folder")
            python = pythons.get(key.replace("_", "-"), sys.executable)
            contestants.append((python, Contestant(table, name, str(Path(folder).resolve()))))
    tables = list(dict.fromkeys(item.table for _, item in contestants)) or ["Diffusion-QL"]
    for table in tables:
        print(f"{table}, Hopper's sizes, {arguments.device}: seeds x steps per second in total")
        print(f"{'contestant':<34} {'processes x threads':>20} {'rate':>8} {'ratio':>7}   all")
        rows = [item for item in contestants if item[1].table == table]
        for precision in arguments.precisions:
            for seeds in arguments.seeds:
                rows.append((sys.executable, Contestant(table, "ours", "", seeds, precision)))
        base = None
        for python, spec in rows:
            rate, chosen, rates = best(spec, arguments.device, arguments.seconds, python)
            base = base or rate
            name = spec.name if spec.folder else f"ours, {spec.seeds} stacked, {spec.precision}"
            every = ", ".join(f"{key}: {value:.1f}" for key, value in rates.items())
            print(f"{name:<34} {chosen:>20} {rate:8.1f} {rate / base:6.2f}x   {every}", flush=True)
    if arguments.evaluation:
        if not arguments.diffusion_ql:
            parser.error("--evaluation compares with --diffusion-ql; give its folder")
        job = {
            "folder": str(Path(arguments.diffusion_ql).resolve()),
            "device": arguments.device,
            "seconds": arguments.seconds,
        }
        found = subprocess.run(
            [sys.executable, __file__, "--child-evaluation", json.dumps(job)],
            capture_output=True,
            text=True,
            check=True,
        )
        rate = json.loads(found.stdout.strip().splitlines()[-1])
        print(f"evaluation, official loop: {rate:.1f} environment steps/s (Hopper-v5, 1 thread);")
        print("ours: python benchmarks/evaluation.py")


if __name__ == "__main__":
    main()
