"""A trained policy as files that work without its run: weights, a PyTorch program, or ONNX.

    safetensors    <file>, the weights `act` reads, and what the learner was built from; `load`
                   makes a policy of them that draws its own random numbers
    torch.export   a program (.pt2), and
    onnx           a graph (.onnx): obs [N, O] and every random number as an input -> action [N, A]

Beside each lies a JSON file: shapes, where the policy comes from, and how far the actions of the
files, loaded again, are from the policy's own. Files appear only once that was compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from algorithms.api import DatasetSpec, Rng, StageInput
from algorithms.blocks.layers import set_precision
from algorithms.blocks.rng import RowRng, Stream
from harness import provenance, storage
from harness.artifacts import ArtifactStore
from harness.policies import Loader, Trained, observations
from harness.registry import Registry
from harness.trainer import stack_states
from harness.typed import config_from_dict

SUFFIXES = {"safetensors": ".safetensors", "torch.export": ".pt2", "onnx": ".onnx"}
OPSET = 18  # of ONNX
TOLERANCE = 1e-4  # largest difference of an action, as a part of its range
LEAST_ROWS = 2  # compared


class ExportError(ValueError):
    """A policy cannot be exported in a format; says why and which formats fit."""


@dataclass(frozen=True)
class Exported:
    """What one policy became.

    Attributes:
        files: what was written; the JSON file is the last.
        difference: largest of all compared action dimensions, absolute.
        rows: observations compared.
    """

    trained: Trained
    files: tuple[Path, ...]
    difference: float
    rows: int


@dataclass(frozen=True)
class Draw:
    """One call for random numbers: its kind and what it gave for K = 1 seed, [1, N, ...]."""

    kind: str  # normal | uniform | integers
    values: Tensor
    high: int | None = None  # of integers

    def describe(self, name: str) -> dict[str, Any]:
        kinds = {
            "normal": "standard normal",
            "uniform": "uniform in [0, 1)",
            "integers": f"integers in [0, {self.high})",
        }
        shape = ["N", *self.values.shape[2:]]
        dtype = str(self.values.dtype).removeprefix("torch.")
        return {"name": name, "shape": shape, "dtype": dtype, "values": kinds[self.kind]}


class Recorder:
    """An `Rng` that passes another's numbers on and keeps them."""

    def __init__(self, rng: Rng) -> None:
        self.rng, self.draws = rng, list[Draw]()

    @property
    def step(self) -> Tensor:
        return self.rng.step

    def uniform(self, *shape: int) -> Tensor:
        return self._keep("uniform", self.rng.uniform(*shape))

    def normal(self, *shape: int) -> Tensor:
        return self._keep("normal", self.rng.normal(*shape))

    def integers(self, high: int, *shape: int) -> Tensor:
        return self._keep("integers", self.rng.integers(high, *shape), high)

    def _keep(self, kind: str, values: Tensor, high: int | None = None) -> Tensor:
        self.draws.append(Draw(kind, values, high))
        return values


class Given:
    """An `Rng` whose numbers were given, [N, ...] for each call in order."""

    def __init__(self, step: Tensor, values: Sequence[Tensor]) -> None:
        self.step, self.values, self.calls = step, values, 0

    def normal(self, *shape: int) -> Tensor:
        self.calls += 1
        return self.values[self.calls - 1].unsqueeze(0)

    uniform = normal

    def integers(self, high: int, *shape: int) -> Tensor:
        return self.normal(*shape)


class Actor(nn.Module):
    """A policy of one seed as a function of tensors: obs [N, O], draws [N, ...] -> [N, A]."""

    def __init__(self, policy: nn.Module, step: Tensor) -> None:
        super().__init__()
        self.policy, self.step = policy, step

    def forward(self, obs: Tensor, *draws: Tensor) -> Tensor:
        act: Any = self.policy.act
        return act(obs.unsqueeze(0), Given(self.step, draws)).squeeze(0)


class _TensorsRead(TorchDispatchMode):
    """Notes the storages that operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.storages.add(leaf.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.storages


@dataclass(frozen=True)
class _Example:
    """Observations, the draws that acting on them takes, and the actions: what is compared."""

    obs: Tensor  # [N, O]
    draws: tuple[Draw, ...]
    actions: Tensor  # [N, A]
    read: _TensorsRead

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.obs, *(draw.values.squeeze(0) for draw in self.draws))

    @property
    def names(self) -> list[str]:
        return ["obs", *(f"{draw.kind}_{i}" for i, draw in enumerate(self.draws))]


def export(trained: Trained, loader: Loader, out: Path, format: str, rows: int = 256) -> Exported:
    """Writes a policy below `out` as `<run id>/policy.*`, loaded again and compared.

    Args:
        loader: on the CPU.
        format: safetensors | torch.export | onnx.
        rows: observations of the policy's dataset that are compared.
    Raises:
        ValueError: for another format or too few rows.
        ExportError: if the policy cannot be traced or converted, or acts differently once loaded.
        ImportError: if `onnx` was asked for and its packages are missing.
    """
    if format not in SUFFIXES:
        raise ValueError(f"unknown format {format!r}; expected one of {', '.join(SUFFIXES)}")
    if rows < LEAST_ROWS:
        raise ValueError(f"rows is {rows}; expected at least {LEAST_ROWS}")
    if format == "onnx":
        _onnx_packages()
    trainer, dataset = loader.load(trained)
    policy: Any = trainer.learner
    _, obs = observations(dataset, rows)
    example = _act(policy, trainer.seeds, trainer.step, obs)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as name:
        path = Path(name) / f"policy{SUFFIXES[format]}"
        about = _describe(trained, dataset.spec, format, trainer.steps_done)
        about["inputs"] = [_describe_obs(example), *_describe_draws(example)]
        about["output"] = {"name": "action", "shape": ["N", example.actions.shape[-1]]}
        if format == "safetensors":
            about["inputs"] = about["inputs"][:1]  # it draws the others itself
            _write_weights(path, policy, example.read)
            _write_needs(Path(name), trained)
            about["sha256"] = _sha256(path)
            _write_json(path, about)
            again = load(Path(name), loader.registry)
            actions = _act(again, trainer.seeds, trainer.step, obs).actions
        else:
            write, run = {
                "torch.export": (_write_program, _run_program),
                "onnx": (_write_onnx, _run_onnx),
            }[format]
            _prune(policy, example.read)
            try:
                write(path, Actor(policy, trainer.step).eval(), example)
            except Exception as error:  # of the tracer or the converter, which have many kinds
                raise ExportError(
                    f"{trained.title} cannot be written as {format}: {error}\n"
                    "Nothing was written; safetensors fits every policy"
                ) from error
            # One row alone as well: the number of rows has to be free.
            first = run(path, tuple(value[:1] for value in example.inputs), example.names)
            rest = run(path, tuple(value[1:] for value in example.inputs), example.names)
            actions = torch.cat((first, rest))
        difference = _compare(actions, example.actions, dataset.spec, trained, format)
        about["compared"] = {
            "observations": rows,
            "max_abs_difference": difference,
            "allowed": f"{TOLERANCE} of an action's range",
        }
        about["sha256"] = _sha256(path)
        _write_json(path, about)
        folder = out / trained.run_id
        folder.mkdir(exist_ok=True)
        # What describes the others comes last.
        written = sorted(Path(name).iterdir(), key=lambda file: (file.suffix == ".json", file.name))
        files = tuple(folder / file.name for file in written)
        for source, target in zip(written, files, strict=True):
            os.replace(source, target)
    return Exported(trained, files, difference, rows)


def _act(policy: Any, seeds: Tensor, step: Tensor, obs: Tensor) -> _Example:
    """What the policy does, with the numbers that `harness actions` draws."""
    row = torch.arange(len(obs)).unsqueeze(0)
    recorder = Recorder(RowRng(seeds, step, Stream.ACTIONS, row, torch.zeros_like(row)))
    with torch.no_grad(), _TensorsRead() as read:
        actions = policy.act(obs.unsqueeze(0), recorder).squeeze(0)
    return _Example(obs, tuple(recorder.draws), actions, read)


def _compare(
    found: Tensor, expected: Tensor, spec: DatasetSpec, trained: Trained, format: str
) -> float:
    """The largest difference, if it is within the tolerance."""
    difference = (found - expected).abs()
    reach = torch.tensor(spec.action_high) - torch.tensor(spec.action_low)
    wrong = ~(difference <= TOLERANCE * reach).all(dim=-1)  # also where it is not a number
    if wrong.any():
        raise ExportError(
            f"{trained.title} acts differently as {format}: {int(wrong.sum())} of {len(wrong)} "
            f"actions by up to {float(difference[wrong].max()):.3g}. Nothing was written; "
            "safetensors keeps the policy's own arithmetic"
        )
    return float(difference.max())


# ------------------------------------------------------------------------------------ JSON


def _describe(trained: Trained, spec: DatasetSpec, format: str, steps_done: int) -> dict[str, Any]:
    commit, dirty = provenance.git_state()
    return {
        "format": format,
        "created_at": provenance.utc_now(),
        "label": trained.trial.label,
        "trial": trained.trial.identity(),
        "trial_id": trained.trial.id,
        "run_id": trained.run_id,
        "stage": trained.stage.name,
        "stage_id": trained.stage.id,
        "needs": list(trained.stage.needs),
        "steps_done": steps_done,
        "dataset": dataclasses.asdict(spec),
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": provenance.versions(),
    }


def _describe_obs(example: _Example) -> dict[str, Any]:
    return {"name": "obs", "shape": ["N", example.obs.shape[-1]], "dtype": "float32"}


def _describe_draws(example: _Example) -> list[dict[str, Any]]:
    named = zip(example.draws, example.names[1:], strict=True)
    return [draw.describe(name) for draw, name in named]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, about: Mapping[str, Any]) -> None:
    text = json.dumps(about, indent=1, sort_keys=True)
    path.with_name(f"{path.name}.json").write_text(text + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------- safetensors


def _write_weights(path: Path, policy: nn.Module, read: _TensorsRead) -> None:
    state = {name: tensor for name, tensor in policy.state_dict().items() if read.has(tensor)}
    ArtifactStore.save_state(path.parent, state, path.name)


def _write_needs(folder: Path, trained: Trained) -> None:
    """The states of the stages that the learner is built from, such as a teacher."""
    store = storage.artifacts(trained.home)
    for need, stage_id in trained.stage.needs.items():
        state = stack_states([store.load_state(stage_id)])  # as the learner was given it
        ArtifactStore.save_state(folder, state, _need_file(need))


def _need_file(need: str) -> str:
    return f"need-{need}{SUFFIXES['safetensors']}"


def load(folder: Path, registry: Registry | None = None) -> Any:
    """The policy that was exported into `folder` as safetensors: `act(obs [1, N, O], rng)`.

    Only what acting reads is there; everything else of the learner is nan, so that it cannot be
    trained on by mistake.

    Raises:
        FileNotFoundError: if nothing was exported there.
        ExportError: if the files are not those that were written, or the installed algorithm has
            another revision.
    """
    from safetensors.torch import load_file

    path = folder / "policy.safetensors"
    about = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    if _sha256(path) != about["sha256"]:
        raise ExportError(f"{path} is not the file that its JSON file describes; export it again")
    trial = about["trial"]
    recipe = (registry or Registry()).get(trial["algorithm"])
    if recipe.revision != trial["revision"]:
        raise ExportError(
            f"{path} is of {recipe.name} revision {trial['revision']}, but revision "
            f"{recipe.revision} is installed"
        )
    config = config_from_dict(recipe.config, trial["config"], f"{path}.json")
    stages: dict[str, Any] = {stage.name: stage for stage in recipe.stages(config)}
    stage = stages[about["stage"]]
    inputs = {
        need: StageInput(stages[need].config, load_file(folder / _need_file(need)))
        for need in stage.needs
    }
    spec = config_from_dict(DatasetSpec, about["dataset"], f"{path}.json: dataset")
    policy = stage.learner(stage.config, spec, [trial["seed"]], inputs)
    set_precision(policy, trial["precision"])
    for tensor in policy.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    unknown = policy.load_state_dict(load_file(path), strict=False).unexpected_keys
    if unknown:
        raise ExportError(f"{path} holds tensors that {recipe.name} does not have: {unknown}")
    return policy


# ------------------------------------------------------------------------ programs and ONNX


def _prune(module: nn.Module, read: _TensorsRead) -> None:
    """Removes submodules none of whose tensors acting reads: critics, averages, optimizers."""
    for name, child in list(module.named_children()):
        tensors = [*child.parameters(), *child.buffers()]
        if tensors and not any(read.has(tensor) for tensor in tensors):
            delattr(module, name)
        else:
            _prune(child, read)


def _dynamic_rows(example: _Example) -> dict[str, Any]:
    rows = torch.export.Dim("rows")
    draws = tuple({0: rows} for _ in example.draws)
    return {"obs": {0: rows}, **({"draws": draws} if draws else {})}


def _program(actor: Actor, example: _Example) -> torch.export.ExportedProgram:
    few = tuple(value[:LEAST_ROWS] for value in example.inputs)  # they are kept in the file
    return torch.export.export(actor, few, dynamic_shapes=_dynamic_rows(example))


def _write_program(path: Path, actor: Actor, example: _Example) -> None:
    with torch.no_grad():
        torch.export.save(_program(actor, example), path)


def _run_program(path: Path, inputs: tuple[Tensor, ...], names: list[str]) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(*inputs)


def _write_onnx(path: Path, actor: Actor, example: _Example) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # else: torchvision is not installed
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the converter, about itself
        torch.onnx.export(
            _program(actor, example),
            (),
            str(path),
            input_names=example.names,
            output_names=["action"],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _run_onnx(path: Path, inputs: tuple[Tensor, ...], names: list[str]) -> Tensor:
    session = _onnx_packages().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(["action"], values)[0])


def _onnx_packages() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"exporting to ONNX needs {error.name}: pip install 'offline-rl-harness[export]'"
        ) from error
    return onnxruntime
