"""Experiment files: read, overridden, resolved into trials with a content hash, or refused.

Owns what an experiment file may say and what identifies a trial. Resolution, later wins:
config defaults < hyperparameter file (default, the dataset's block, the preset that the algorithm
block names) < the experiment's `steps`, `config`, `data` < its algorithm block < its cases < the
command line.
Owns neither stages (`harness.plan`) nor the meaning of a config (the algorithm's dataclass).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from harness.typed import (
    FieldError,
    at,
    canonical_json,
    check_values,
    config_from_dict,
    config_to_dict,
    content_hash,
    convert,
    expect_mapping,
    field_types,
    plain,
    refuse_unknown,
    suggest,
)

if TYPE_CHECKING:
    from algorithms.api import Recipe
    from harness.registry import Registry

__all__ = [
    "EvaluationSpec",
    "Experiment",
    "Origin",
    "RunOptions",
    "SpecError",
    "TrialSpec",
    "canonical_json",
    "config_from_dict",
    "config_to_dict",
    "content_hash",
    "dataset_names",
    "load_experiment",
    "parse_seeds",
    "read_yaml",
]

MAX_SEED = 2**32 - 1
COMMAND_LINE = "command line: "
_TOP_KEYS = (
    "name",
    "description",
    "algorithms",
    "datasets",
    "seeds",
    "steps",
    "config",
    "data",
    "precision",
    "evaluation",
    "cases",
    "run",
    "claims",
)
_BLOCK_KEYS = ("algorithm", "preset", "config", "data", "steps", "precision")
_CASE_KEYS = ("algorithm", "dataset", "config", "data", "steps", "precision", "evaluation")
Precision = Literal["float32", "tf32", "mixed"]
_PROTOCOL_KEYS = ("every", "episodes", "first_env_seed")


class SpecError(FieldError):
    """An experiment that cannot be resolved; the message begins with the file and the key."""


class Catalog(Protocol):
    """What resolving an experiment asks of the datasets."""

    def match(self, pattern: str) -> Sequence[str]: ...

    def resolve(self, name: str) -> Any: ...

    def digest(self, dataset_id: str) -> str: ...

    def evaluation_environment(self, dataset_id: str) -> Any: ...


class LocalCatalog:
    """The datasets of this machine (`harness.datasets`, `harness.environments`)."""

    def match(self, pattern: str) -> Sequence[str]:
        from harness import datasets

        return datasets.match(pattern)

    def resolve(self, name: str) -> Any:
        from harness import datasets

        return datasets.resolve(name)

    def digest(self, dataset_id: str) -> str:
        from harness import datasets

        return datasets.digest(dataset_id)

    def evaluation_environment(self, dataset_id: str) -> Any:
        from harness import environments

        return environments.evaluation_environment(dataset_id)


# ------------------------------------------------------------------------------------- the types


@dataclass(frozen=True)
class EvaluationSpec:
    """How a trial's policy is evaluated; part of the trial's identity.

    Attributes:
        every: gradient steps between evaluations; the last step is always evaluated.
        episodes: per evaluation; episode e always starts from env seed `first_env_seed + e`.
        environment: what `EnvironmentSpec.describe()` says; filled at resolution.
        simulator: such as "mujoco 3.11.0"; filled at resolution.
    """

    every: int = 5000
    episodes: int = 10
    first_env_seed: int = 0
    environment: Mapping[str, Any] = field(default_factory=dict)
    simulator: str = ""

    def __post_init__(self) -> None:
        for name in ("every", "episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.first_env_seed < 2**31:
            raise ValueError(f"first_env_seed is {self.first_env_seed}; expected 0 to 2**31 - 1")

    def __hash__(self) -> int:
        return hash(canonical_json(self))


@dataclass(frozen=True)
class TrialSpec:
    """Algorithm x dataset x config x seed, fully resolved: the unit of identity and of results.

    `data` and `config` are plain mappings with a value for every field, as `config_to_dict`
    makes them. Neither the label nor the stack a trial runs in is part of its identity.
    `precision` is of the matrix products: see `algorithms.blocks.layers.set_precision`.
    """

    algorithm: str
    revision: int
    dataset_id: str
    dataset_digest: str
    data: Mapping[str, Any]
    config: Mapping[str, Any]
    seed: int
    evaluation: EvaluationSpec
    label: str = ""
    precision: Precision = "float32"

    @functools.cached_property
    def id(self) -> str:
        """sha256 of the canonical JSON of everything but the label."""
        return content_hash(self.identity())

    @functools.cached_property
    def variant_id(self) -> str:
        """The same hash without the seed: trials that may be pooled."""
        return content_hash({k: v for k, v in self.identity().items() if k != "seed"})

    def identity(self) -> dict[str, Any]:
        """Exactly what is hashed, as JSON values."""
        return {
            "algorithm": self.algorithm,
            "revision": self.revision,
            "dataset_id": self.dataset_id,
            "dataset_digest": self.dataset_digest,
            "data": dict(self.data),
            "config": dict(self.config),
            "seed": self.seed,
            "precision": self.precision,
            "evaluation": config_to_dict(self.evaluation),
        }

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class RunOptions:
    """The `run:` block: how a sweep is executed, never part of an identity.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        compile: compile the training step: auto (where it pays), on, off.
        compile_act: where the step is compiled, compile acting in evaluations as well. Takes 20 to
            50 s (minutes for long chains) and saves a third to a half of each policy call.
        cuda_graphs: on a GPU, replay the compiled step as a CUDA graph: one launch for a step.
        cpus_per_stack, gpus_per_stack: resources of one worker process; fractions share a device.
        max_stack: most seeds trained together in one process; auto chooses it for each stage from
            memory and from what can run at once (`harness.memory.stack_size`).
        log_every: gradient steps per chunk; metrics are means over a chunk.
        checkpoint_every: gradient steps between checkpoints.
        max_failures: how often a crashed stack is retried within one sweep.
        max_concurrent: most stacks at once; 0 is as many as fit.
        max_envs: most environments stepped at once per seed; returns do not depend on it.
        stale_after_s: a training without a gradient or environment step for so long is ended and
            tried again; longer than the first step's compilation. 0 is never.
        storage: URL (fsspec's) of what nodes have in common where they share no home folder, see
            `harness.storage`; empty is HARNESS_STORAGE, or a shared home.
    """

    device: str = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    compile_act: bool = False
    cuda_graphs: bool = False
    cpus_per_stack: float = 1.0
    gpus_per_stack: float = 0.0
    max_stack: int | Literal["auto"] = 16
    log_every: int = 500
    checkpoint_every: int = 5000
    max_failures: int = 3
    max_concurrent: int = 0
    max_envs: int = 32
    stale_after_s: float = 3600.0
    storage: str = ""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_stack", 1),
            ("log_every", 1),
            ("checkpoint_every", 1),
            ("max_failures", 0),
            ("max_concurrent", 0),
            ("max_envs", 1),
            ("gpus_per_stack", 0),
            ("stale_after_s", 0),
        ):
            if getattr(self, name) != "auto" and getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.cpus_per_stack <= 0:
            raise ValueError(f"cpus_per_stack is {self.cpus_per_stack}; expected more than 0")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device is {self.device!r}; expected auto, cpu, cuda or cuda:N")

    def on_gpu(self, found: int = 0) -> bool:
        """Whether stacks train on a GPU, as these options say.

        Args:
            found: GPUs of the machine they run on; 0 if it is not looked at.
        """
        wanted = self.gpus_per_stack > 0 or found > 0
        return self.device.startswith("cuda") or (self.device == "auto" and wanted)


@dataclass(frozen=True)
class Origin:
    """Where the settings of one algorithm on one dataset come from, for people to read.

    Attributes:
        requested: the name the experiment uses; `relation` is that of the dataset to it.
        hparams: which block of the hyperparameter file applied.
        changed: what lies over that block and differs from it: "experiment" or "command line" ->
            setting -> value.
    """

    label: str
    algorithm: str
    dataset_id: str
    requested: str
    relation: str
    hparams: str
    note: str = ""
    changed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """What an experiment is to show: that one of its methods is above another.

    Attributes:
        better, than: labels of algorithms.
        text: the claim in words; by default "<better> is above <than>".
        margin: the difference exceeds so many points; negative: "not worse by more than".
        datasets: glob over dataset ids.
    """

    better: str
    than: str
    text: str = ""
    margin: float = 0.0
    datasets: str = "*"


@dataclass(frozen=True)
class Experiment:
    """Everything an experiment file asks for."""

    name: str
    trials: tuple[TrialSpec, ...]
    run: RunOptions
    source: Mapping[str, Any]  # the file with the overrides in it
    origins: tuple[Origin, ...] = ()
    description: str = ""
    claims: tuple[Claim, ...] = ()


def data_spec_class() -> type:
    """The dataclass of a spec's `data` block."""
    from harness.datasets import DataSpec

    return DataSpec


def data_to_dict(data: Any) -> dict[str, Any]:
    """The transforms as a trial's identity holds them.

    Without `held_out` where nothing is: it is younger than many a run, whose ids stay as they were.
    The default `discount`, where it ranks nothing, is 0.99 there: the default of these runs.
    """
    values = config_to_dict(data)
    if values["top_fraction"] == values["discount"] == 1.0:
        values["discount"] = 0.99
    if not values["held_out"]:
        del values["held_out"]
    return values


# ----------------------------------------------------------------------------------------- seeds


def parse_seeds(value: Any, place: str = "seeds") -> tuple[int, ...]:
    """Seeds from a number, text or a list of these, in the order given.

    `10` is the single seed 10; `0-9` is 0 to 9, both included; `0,2,5-7` joins several.

    Raises:
        FieldError: for anything else, a seed that appears twice or is outside [0, 2**32).
    """
    example = "Write a seed (3), a range (0-9, both included) or a list (0,1,2 or 0-3,7)"
    if isinstance(value, bool) or not isinstance(value, int | str | list | tuple):
        raise FieldError(f"{place}: expected seeds, got {value!r}. {example}")
    seeds: list[int] = []
    parts = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, str):
        parts = value.split(",")
    for part in parts:
        if isinstance(part, str) and "," in part:
            seeds.extend(parse_seeds(part, place))
            continue
        seeds.extend(_parse_seed_range(part, place, example))
    if not seeds:
        raise FieldError(f"{place}: no seeds given. {example}")
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1}) if _repeats(seeds) else []
    if repeated:
        raise FieldError(f"{place}: seed {repeated[0]} appears more than once in {value!r}")
    return tuple(seeds)


def _repeats(seeds: Sequence[int]) -> bool:
    return len(set(seeds)) != len(seeds)


def _parse_seed_range(part: Any, place: str, example: str) -> range | list[int]:
    if isinstance(part, int) and not isinstance(part, bool):
        first = last = part
    else:
        found = (
            re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part) if isinstance(part, str) else None
        )
        if not found or not str(part).isascii():
            raise FieldError(f"{place}: cannot read seeds from {part!r}. {example}")
        first = int(found[1])
        last = int(found[2]) if found[2] is not None else first
    if first > last:
        raise FieldError(
            f"{place}: the range {part!r} is descending; ranges are ascending: {last}-{first}"
        )
    if first < 0 or last > MAX_SEED:
        raise FieldError(f"{place}: seed {part} is outside 0 to {MAX_SEED}")
    if last - first >= 1_000_000:
        raise FieldError(
            f"{place}: the range {part!r} has {last - first + 1} seeds; is that meant?"
        )
    return range(first, last + 1)


# ------------------------------------------------------------------------------------------ YAML


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a YAML file as plain values.

    Raises:
        SpecError: if it cannot be read or is not plain YAML. Duplicate keys are refused, and so
            are tags that would make Python objects.
    """
    path = Path(path)
    return _parse_yaml(_read_text(path), path.name)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise SpecError(f"{path} is a folder; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as text: {error}") from error


def _parse_yaml(text: str, place: str) -> Any:
    import io

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    # OmegaConf's loader is safe (no Python tags), refuses duplicate keys, reads 1e-3 as a float.
    # It raises OSError for a text that is a bare number.
    try:
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (YAMLError, OmegaConfBaseException, RecursionError, OSError) as error:
        raise SpecError(f"{place}: not valid YAML: {_one_line(error)}") from error


def _as_written(value: Any, text: str) -> Any:
    """The seeds that `seeds: ...` in a text gives, those that YAML reads as another number as text.

    YAML 1.1 has octal 010 (8), 0x10, 1_000 and, in base 60, 1:30.

    Args:
        value: what YAML made of them.
    """
    import yaml

    def compared(value: Any, text: Any) -> Any:
        if isinstance(value, list) and isinstance(text, list):
            return [compared(*pair) for pair in zip(value, text, strict=True)]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return text if is_number and isinstance(text, str) and str(value) != text else value

    return compared(value, yaml.load(text, yaml.BaseLoader).get("seeds"))


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()


def _resolved(content: dict[str, Any], place: str) -> dict[str, Any]:
    """Interpolations (`${steps}`) replaced by their values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.create(content)
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise SpecError(f"{place}: {_one_line(error)}") from error
    return expect_mapping(plain, place)


def _parse_override(text: str) -> tuple[list[str], Any]:
    """`evaluation.every=500` as its key path and its YAML value."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise SpecError(
            f"{COMMAND_LINE}{text!r} is not an override; expected key=value, for example steps=2000"
        )
    # A block of its own, so that a bare scalar is a value and not a key.
    value = _parse_yaml(f"value: {raw}", f"{COMMAND_LINE}{text!r}")
    if not isinstance(value, dict) or list(value) != ["value"]:
        raise SpecError(f"{COMMAND_LINE}{text!r}: cannot read the value {raw!r}")
    parts = _split_key(key, text)
    if parts[0] == "seeds":
        return parts, _as_written(value["value"], f"seeds: {raw}")
    return parts, value["value"]


def _split_key(key: str, text: str) -> list[str]:
    """The parts of a dotted key; `cases[0].steps` is the same as `cases.0.steps`."""
    parts = re.sub(r"\[([^\[\]]*)\]", r".\1", key).split(".")
    if not all(parts) or any(c in key.replace("[", "").replace("]", "") for c in "[]"):
        raise SpecError(f"{COMMAND_LINE}{text!r}: cannot read the key {key!r}")
    return parts


# ----------------------------------------------------------------------------------- the document


@dataclass
class _Layer:
    """One source of settings; `steps` is already inside `config`."""

    place: str
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    precision: Precision | None = None


@dataclass
class _Case:
    layer: _Layer
    algorithm: str
    dataset: str


def _layer(block: Mapping[str, Any], place: str, prefix: str) -> _Layer:
    """The layer a mapping with `steps`, `config`, `data` and `evaluation` describes."""
    config = expect_mapping(block.get("config"), at(prefix, "config"))
    if "steps" in block:
        if "steps" in config:
            raise SpecError(f"{at(prefix, 'steps')}: given here and in config.steps; give one")
        config["steps"] = convert(int, block["steps"], at(prefix, "steps"))
    data = check_values(data_spec_class(), block.get("data"), at(prefix, "data"))
    evaluation = expect_mapping(block.get("evaluation"), at(prefix, "evaluation"))
    where = at(prefix, "evaluation")
    for key in ("environment", "simulator"):
        if key in evaluation:
            raise SpecError(f"{at(where, key)}: follows from the dataset and cannot be set")
    refuse_unknown(evaluation, _PROTOCOL_KEYS, where)
    precision = block.get("precision")
    if precision is not None:
        precision = convert(Precision, precision, at(prefix, "precision"))
    return _Layer(place, config, data, check_values(EvaluationSpec, evaluation, where), precision)


def _algorithm_blocks(value: Any, place: str) -> dict[str, dict[str, Any]]:
    """`algorithms` as label -> block, from names (a list, or text with commas) or a mapping."""
    value = _names(value)
    if isinstance(value, list):
        blocks: dict[str, dict[str, Any]] = {}
        for index, name in enumerate(value):
            if not isinstance(name, str) or not name:
                raise SpecError(f"{place}[{index}]: expected an algorithm's name, got {name!r}")
            if name in blocks:
                raise SpecError(f"{place}[{index}]: {name!r} appears twice")
            blocks[name] = {}
    else:
        blocks = {
            label: expect_mapping(block, at(place, label))
            for label, block in expect_mapping(value, place).items()
        }
    if not blocks:
        raise SpecError(f"{place}: no algorithm given")
    for label in blocks:
        if not label.strip() or not label.isprintable():
            raise SpecError(f"{place}: label {label!r} is empty or not printable")
    return blocks


def _names(value: Any) -> Any:
    """Text such as `bc, diffusion_ql` as a list; anything else as it is."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


class _Document:
    """An experiment file with the overrides applied, and the overrides alone as a last layer."""

    def __init__(self, path: Path, overrides: Sequence[str]) -> None:
        self.file = f"{path.name}: "
        text = _read_text(path)
        read = _parse_yaml(text, path.name)
        if read in (None, {}):
            raise SpecError(
                f"{path.name} is empty; an experiment needs name, algorithms, datasets and seeds"
            )
        content = expect_mapping(read, path.name)
        refuse_unknown(content, _TOP_KEYS, self.file)
        if "seeds" in content:
            self._refuse_ambiguous(content["seeds"], text)
        if "algorithms" in content:
            content["algorithms"] = _algorithm_blocks(
                content["algorithms"], f"{self.file}algorithms"
            )
        self.labels = set(content.get("algorithms") or {})  # those of the file
        self.last: dict[str, Any] = {}  # what the command line says about settings
        self.from_command_line: set[str] = set()
        for text in overrides:
            parts, value = _parse_override(text)
            self._override(content, parts, value, text)
        # Together, so that what the command line says can refer to what the file says.
        overridden = COMMAND_LINE.rstrip(": ")
        self.content = _resolved({**content, overridden: self.last}, path.name)
        self.last = self.content.pop(overridden)
        self.labels |= set(self.content.get("algorithms") or {})

    def _refuse_ambiguous(self, seeds: Any, text: str) -> None:
        written = _as_written(seeds, text)
        if written != seeds:
            raise SpecError(
                f"{self.file}seeds: YAML reads {written!r} as {seeds!r}: it has octal (010), "
                "hexadecimal and base-60 numbers. Write plain decimal ones, such as 10"
            )

    def _override(self, content: dict[str, Any], parts: list[str], value: Any, text: str) -> None:
        top = parts[0]
        if top not in _TOP_KEYS:
            raise SpecError(f"{COMMAND_LINE}unknown key {top!r}. {suggest(top, _TOP_KEYS)}")
        if top == "algorithms":
            blocks = content.setdefault("algorithms", {})
            if len(parts) == 1:
                self._select_algorithms(content, value)
                self.from_command_line.add(top)
                return
            if len(parts) > 2 and parts[1] not in blocks:
                raise SpecError(
                    f"{COMMAND_LINE}{text}: the experiment has no algorithm {parts[1]!r}. "
                    f"{suggest(parts[1], blocks, 'It has')}"
                )
        if top == "cases":
            content["cases"] = content.get("cases") or []
        _assign(content, parts, value, text)
        if top in ("algorithms", "steps", "config", "data", "precision", "evaluation"):
            _assign(self.last, parts, value, text)
        if len(parts) == 1:
            self.from_command_line.add(top)

    def _select_algorithms(self, content: dict[str, Any], value: Any) -> None:
        """`algorithms=[bc]` keeps the file's block of each name it lists."""
        before = content.get("algorithms") or {}
        chosen = _algorithm_blocks(value, f"{COMMAND_LINE}algorithms")
        if isinstance(value, str | list):
            chosen = {label: before.get(label, {}) for label in chosen}
        content["algorithms"] = chosen
        kept = self.last.get("algorithms", {})
        self.last["algorithms"] = {k: v for k, v in kept.items() if k in chosen}

    def place(self, key: str) -> str:
        """Where a top-level key stands."""
        return f"{COMMAND_LINE if key in self.from_command_line else self.file}{key}"

    def required(self, key: str) -> Any:
        if self.content.get(key) in (None, [], {}, ""):
            what = "is empty" if key in self.content else "is missing"
            raise SpecError(f"{self.place(key)} {what}; an experiment needs it")
        return self.content[key]

    # ------------------------------------------------------------------ layers, in their order

    def experiment_layer(self) -> _Layer:
        return _layer(self.content, self.file, self.file)

    def block_layer(self, label: str) -> _Layer:
        place = f"{self.file}algorithms.{label}"
        block = self.content["algorithms"][label]
        refuse_unknown(block, _BLOCK_KEYS, place)
        return _layer(block, place, place)

    def _entries(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place and content of each mapping in a list that may be absent."""
        entries = self.content.get(key) or []
        place = self.place(key)
        if not isinstance(entries, list):
            raise SpecError(f"{place}: expected a list of {key}")
        for index, entry in enumerate(entries):
            where = f"{place}[{index}]"
            yield where, expect_mapping(entry, where)

    def cases(self) -> list[_Case]:
        cases = []
        for where, case in self._entries("cases"):
            refuse_unknown(case, _CASE_KEYS, where)
            globs = {}
            for key in ("algorithm", "dataset"):
                globs[key] = convert(str, case.get(key, "*"), at(where, key))
            cases.append(_Case(_layer(case, where, where), **globs))
        return cases

    def claims(self, dataset_ids: Collection[str] | None = None) -> tuple[Claim, ...]:
        """The claims about what is selected; names nobody has are refused.

        Args:
            dataset_ids: of the experiment; None to leave globs unchecked.
        """
        found = []
        for where, entry in self._entries("claims"):
            for key in ("better", "than"):
                if key not in entry:
                    raise SpecError(f"{at(where, key)} is missing; a claim needs it")
            claim = config_from_dict(Claim, entry, where)
            for key in ("better", "than"):
                label = getattr(claim, key)
                if label not in self.labels:
                    raise SpecError(
                        f"{at(where, key)}: the experiment has no algorithm {label!r}. "
                        f"{suggest(label, self.labels, 'It has')}"
                    )
            if claim.better == claim.than:
                raise SpecError(f"{at(where, 'than')}: a method is not above itself")
            if not {claim.better, claim.than} <= set(self.content.get("algorithms") or {}):
                continue  # the command line selected others
            if dataset_ids is not None and not any(
                fnmatchcase(dataset_id, claim.datasets) for dataset_id in dataset_ids
            ):
                if "datasets" in self.from_command_line:
                    continue
                raise SpecError(
                    f"{at(where, 'datasets')}: {claim.datasets!r} matches none of "
                    f"{', '.join(sorted(dataset_ids))}"
                )
            text = claim.text or f"{claim.better} is above {claim.than}"
            found.append(dataclasses.replace(claim, text=text))
        return tuple(found)

    def command_line_layers(self, label: str) -> list[_Layer]:
        general = _layer(self.last, COMMAND_LINE, COMMAND_LINE)
        block = expect_mapping(
            self.last.get("algorithms", {}).get(label), f"{COMMAND_LINE}algorithms.{label}"
        )
        place = f"{COMMAND_LINE}algorithms.{label}"
        return [general, _layer(block, place, place)]


def _assign(target: dict[str, Any], parts: list[str], value: Any, text: str) -> None:
    """Sets a nested value, making mappings on the way; a list index must exist."""
    here: Any = target
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                raise SpecError(
                    f"{COMMAND_LINE}{text}: {'.'.join(parts[:depth])} has {len(here)} entries, "
                    f"counted from 0; {part!r} is none of them"
                )
            if last:
                here[int(part)] = value
            here = here[int(part)]
            continue
        if not isinstance(here, dict):
            raise SpecError(
                f"{COMMAND_LINE}{text}: {'.'.join(parts[:depth])} is {here!r}, not a mapping"
            )
        if last:
            here[part] = value
        elif here.get(part) is None:
            here[part] = {}
        here = here[part]


# -------------------------------------------------------------------------------------- resolution


@dataclass(frozen=True)
class _Dataset:
    entry: Any  # harness.datasets.DatasetEntry
    digest: str
    environment: Mapping[str, Any]
    simulator: str

    @property
    def names(self) -> tuple[str, ...]:
        """As requested, the Minari id, D4RL's name; without repetitions or empty names."""
        entry = self.entry
        named = (entry.requested, entry.id, getattr(entry, "legacy_id", ""))
        return tuple(dict.fromkeys(name for name in named if name))


def load_experiment(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    registry: Registry | None = None,
    datasets: Catalog | None = None,
) -> Experiment:
    """The experiment a file describes, resolved and validated.

    Args:
        overrides: `key=value` with dotted keys, applied last; each sets what the key names.
            `algorithms=[bc]` selects among the file's algorithms and keeps their blocks.
        registry: where algorithms come from; by default the installed packages.
        datasets: where datasets come from; by default this machine's.

    Raises:
        SpecError: naming the file and the key, for anything that is not valid.
        DatasetError: if a dataset is not on disk or damaged.
    """
    if registry is None:
        from harness.registry import Registry

        registry = Registry()
    try:
        return _Resolver(_Document(Path(path), overrides), registry, datasets).experiment()
    except SpecError:
        raise
    except FieldError as error:
        raise SpecError(str(error)) from error


def dataset_names(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[str]:
    """The datasets that an experiment names, globs as they are; none needs to be stored.

    Raises:
        SpecError: if the file cannot be read or names no dataset.
    """
    names = _names(_Document(Path(path), overrides).required("datasets"))
    return [name for name in names if isinstance(name, str)]


def claims_of(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[Claim, ...]:
    """What an experiment claims; no dataset needs to be stored.

    Raises:
        SpecError: if the file cannot be read, or a claim is not valid.
    """
    try:
        return _Document(Path(path), overrides).claims()
    except SpecError:
        raise
    except FieldError as error:
        raise SpecError(str(error)) from error


class _Resolver:
    """Turns a document into trials."""

    def __init__(self, document: _Document, registry: Registry, catalog: Catalog | None) -> None:
        self.document = document
        self.registry = registry
        self.catalog = catalog or LocalCatalog()
        self.presets: dict[str, str] = {}  # label -> preset, "" for none

    def experiment(self) -> Experiment:
        document = self.document
        name = convert(str, document.required("name"), document.place("name"))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise SpecError(
                f"{document.place('name')}: {name!r} is not a plain name; use letters, digits, "
                "'_', '-' and '.'"
            )
        description = convert(
            str, document.content.get("description") or "", document.place("description")
        )
        run = self._run_options()
        seeds = parse_seeds(document.required("seeds"), document.place("seeds"))
        document.required("algorithms")
        recipes = self._recipes()
        cases = document.cases()
        self._check_fields(recipes, cases)
        datasets = self._datasets()
        self._check_cases(recipes, datasets, cases)
        trials: list[TrialSpec] = []
        origins: list[Origin] = []
        owner: dict[str, str] = {}
        for dataset in datasets:
            for label, recipe in recipes.items():
                first, origin = self._resolve(label, recipe, dataset, cases, seeds[0])
                if owner.setdefault(first.variant_id, label) != label:
                    raise SpecError(
                        f"{document.file}algorithms.{label}: the same trials as "
                        f"algorithms.{owner[first.variant_id]} on {dataset.entry.id!r}; a trial "
                        "has one label. Remove one, or change its config"
                    )
                origins.append(origin)
                trials.extend(dataclasses.replace(first, seed=seed) for seed in seeds)
        claims = document.claims({trial.dataset_id for trial in trials})
        # Those about what was selected: the source is to be a file that can be run again.
        source = {**document.content, "claims": [dataclasses.asdict(claim) for claim in claims]}
        if not claims:
            del source["claims"]
        return Experiment(name, tuple(trials), run, source, tuple(origins), description, claims)

    def _run_options(self) -> RunOptions:
        place = self.document.place("run")
        values = expect_mapping(self.document.content.get("run"), place)
        if isinstance(values.get("compile"), bool):  # YAML reads a bare on or off as a boolean
            values["compile"] = "on" if values["compile"] else "off"
        return config_from_dict(RunOptions, values, place)

    def _recipes(self) -> dict[str, Recipe]:
        """Label -> recipe; notes the preset of each label."""
        from harness.registry import RecipeError, UnknownAlgorithmError

        recipes = {}
        for label, block in self.document.content["algorithms"].items():
            place = f"{self.document.place('algorithms')}.{label}"
            block = expect_mapping(block, place)
            self.document.content["algorithms"][label] = block
            name = convert(str, block.get("algorithm", label), at(place, "algorithm"))
            try:
                recipes[label] = self.registry.get(name)
            except (UnknownAlgorithmError, RecipeError) as error:
                raise SpecError(f"{place}: {error}") from error
            self.presets[label] = self._preset(block, recipes[label], place)
        return recipes

    @staticmethod
    def _preset(block: Mapping[str, Any], recipe: Recipe, place: str) -> str:
        from harness.registry import presets_of

        if block.get("preset") is None:
            return ""
        place = at(place, "preset")
        name = convert(str, block["preset"], place)
        known = presets_of(recipe)
        if name not in known:
            raise SpecError(
                f"{place}: {recipe.name!r} has no preset {name!r}. {suggest(name, known)}"
            )
        return name

    def _datasets(self) -> list[_Dataset]:
        """The datasets named, in that order; one named in full keeps that name over a glob's."""
        place = self.document.place("datasets")
        patterns = _names(self.document.required("datasets"))
        if not isinstance(patterns, list):
            raise SpecError(f"{place}: expected a list of ids, D4RL names or globs")
        entries: dict[str, Any] = {}
        explicit: set[str] = set()
        for index, pattern in enumerate(patterns):
            where = f"{place}[{index}]"
            if not isinstance(pattern, str):
                raise SpecError(f"{where}: expected a dataset's name, got {pattern!r}")
            is_glob = any(char in pattern for char in "*?[")
            try:
                names = self.catalog.match(pattern) if is_glob else [pattern]
                found = [self.catalog.resolve(name) for name in names]
            except KeyError as error:
                raise SpecError(f"{where}: {error.args[0] if error.args else error}") from error
            for entry in found:
                if entry.id in explicit and not is_glob:
                    raise SpecError(
                        f"{where}: {pattern!r} is {entry.id!r}, which is already in the list as "
                        f"{entries[entry.id].requested!r}"
                    )
                if not is_glob:
                    explicit.add(entry.id)
                if entry.id not in entries or not is_glob:
                    entries[entry.id] = entry
        return self._loaded(list(entries.values()))

    def _loaded(self, entries: Sequence[Any]) -> list[_Dataset]:
        """Digests and environments of the entries; one error for all that cannot be used."""
        from harness.datasets import DatasetError

        found, errors = [], []
        for entry in entries:
            try:
                found.append(self._dataset(entry))
            except DatasetError as error:
                asked = "" if entry.requested == entry.id else f"{entry.requested}: "
                errors.append((f"{asked}{error}", error))
        if errors:
            lines = "\n".join(f"  {text}" for text, _ in errors)
            place = self.document.place("datasets")
            raise DatasetError(
                f"{place}: {len(errors)} of {len(entries)} cannot be used:\n{lines}"
            ) from errors[0][1]
        return found

    def _dataset(self, entry: Any) -> _Dataset:
        digest = self.catalog.digest(entry.id)
        environment = self.catalog.evaluation_environment(entry.id)
        return _Dataset(entry, digest, environment.describe(), environment.simulator)

    def _check_fields(self, recipes: Mapping[str, Recipe], cases: Sequence[_Case]) -> None:
        """Every config key must be a field of an algorithm it is meant for, with its type."""
        document = self.document
        shared = [
            (_layer(document.last, COMMAND_LINE, COMMAND_LINE), recipes),
            (document.experiment_layer(), recipes),
        ]
        shared += [
            (case.layer, {k: r for k, r in recipes.items() if _is_for(case, k, r)})
            for case in cases
        ]
        for layer, chosen in shared:
            place = at(layer.place, "config")
            fields = {key: r for r in chosen.values() for key in field_types(r.config)}
            if chosen:
                refuse_unknown(layer.config, fields, place)
            for key, value in layer.config.items():
                for recipe in chosen.values():
                    if key in field_types(recipe.config):
                        convert(field_types(recipe.config)[key], value, at(place, key))
        for label, recipe in recipes.items():
            for layer in (document.command_line_layers(label)[1], document.block_layer(label)):
                check_values(recipe.config, layer.config, at(layer.place, "config"))

    def _check_cases(
        self,
        recipes: Mapping[str, Recipe],
        datasets: Sequence[_Dataset],
        cases: Sequence[_Case],
    ) -> None:
        """A case of the file must match; what the command line narrows down is not held to it."""
        narrowed = self.document.from_command_line
        for case in cases:
            used = {
                "algorithms": any(_is_for(case, label, r) for label, r in recipes.items()),
                "datasets": any(_is_about(case, dataset) for dataset in datasets),
            }
            for key, matches in used.items():
                if matches or (key in narrowed and "cases" not in narrowed):
                    continue
                glob = case.algorithm if key == "algorithms" else case.dataset
                names = recipes if key == "algorithms" else [d.entry.id for d in datasets]
                raise SpecError(
                    f"{case.layer.place}: the case matches nothing: {glob!r} is none of the {key} "
                    f"{', '.join(names)}"
                )

    def _resolve(
        self, label: str, recipe: Recipe, dataset: _Dataset, cases: Sequence[_Case], seed: int
    ) -> tuple[TrialSpec, Origin]:
        """One seed's trial of `label` on `dataset`."""
        from harness.registry import hparams_for

        document = self.document
        hparams = hparams_for(recipe, dataset.names, self.presets[label])
        layers = [_Layer(document.file, hparams.config, hparams.data)]
        layers += [document.experiment_layer(), document.block_layer(label)]
        layers += [
            case.layer
            for case in cases
            if _is_for(case, label, recipe) and _is_about(case, dataset)
        ]
        layers += document.command_line_layers(label)
        where = f"{document.file}{label} on {dataset.entry.id}"
        upstream, data, sources = self._upstream(recipe, layers, dataset, at(where, "config"))
        table_data = {**data, **hparams.data}
        config: dict[str, Any] = dict(upstream)
        fields = field_types(recipe.config).keys() - upstream.keys()
        protocol: dict[str, Any] = {}
        precision: Precision = "float32"
        for layer in layers:
            precision = layer.precision or precision
            config.update({key: item for key, item in layer.config.items() if key in fields})
            data.update(layer.data)
            protocol.update(layer.evaluation)
        resolved = config_from_dict(recipe.config, config, at(where, "config"))
        if resolved.steps < 1:
            raise SpecError(f"{where}: steps is {resolved.steps}; expected at least 1")
        _check_rates(resolved, at(where, "config"))
        protocol["environment"] = dataset.environment
        protocol["simulator"] = dataset.simulator
        transforms = config_from_dict(data_spec_class(), data, at(where, "data"))
        trial = TrialSpec(
            algorithm=recipe.name,
            revision=recipe.revision,
            dataset_id=dataset.entry.id,
            dataset_digest=dataset.digest,
            data=data_to_dict(transforms),
            config=config_to_dict(resolved),
            seed=seed,
            evaluation=config_from_dict(EvaluationSpec, protocol, at(where, "evaluation")),
            label=label,
            precision=precision,
        )
        table = {**config_to_dict(recipe.config()), **hparams.config}
        before = {**{key: table[key] for key in fields}, **_prefixed(data_spec_class()())}
        before.update({f"data.{key}": item for key, item in table_data.items()})
        after = {**config_to_dict(resolved), **_prefixed(transforms)}
        origin = Origin(
            label,
            recipe.name,
            dataset.entry.id,
            dataset.entry.requested,
            dataset.entry.relation,
            _joined(hparams.source, sources),
            getattr(dataset.entry, "note", ""),
            _changed(layers[1:], plain(before), after),
        )
        return trial, origin

    def _upstream(
        self, recipe: Recipe, layers: Sequence[_Layer], dataset: _Dataset, place: str
    ) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """The algorithms that a config names as its `Pretrained` fields, each complete.

        Returns:
            Those fields; the data transforms the algorithms ask for on this dataset, which lie
            under the trial's own, since its stages share their data; where the settings come from.
        """
        from algorithms.api import Pretrained
        from harness.registry import RecipeError, UnknownAlgorithmError, hparams_for

        found: dict[str, Any] = {}
        data: dict[str, Any] = {}
        sources = []
        for name, annotation in field_types(recipe.config).items():
            if annotation is not Pretrained:
                continue
            where = at(place, name)
            asked = _said(getattr(recipe.config(), name), where)
            for layer in layers:
                if name in layer.config:
                    asked = _over(asked, _said(layer.config[name], where))
            try:
                other = self.registry.get(asked.get("algorithm", ""))
            except (UnknownAlgorithmError, RecipeError) as error:
                raise SpecError(f"{at(where, 'algorithm')}: {error}") from error
            hparams = hparams_for(other, dataset.names, asked.get("preset", ""))
            values = {**hparams.config, **asked.get("config", {})}
            pretrained = config_from_dict(other.config, values, at(where, "config"))
            _check_rates(pretrained, at(where, "config"))
            config = config_to_dict(pretrained)
            found[name] = Pretrained(other.name, "", config, other.revision)
            data.update(hparams.data)
            sources.append(f"{name} {other.name}: {hparams.source}")
        return found, data, sources


def _check_rates(config: Any, place: str) -> None:
    """A learning rate that is not positive trains nothing, or away from what it should."""
    for name in (item.name for item in dataclasses.fields(config)):
        value = getattr(config, name)
        is_rate = (name == "lr" or name.endswith("_lr")) and isinstance(value, int | float)
        if is_rate and value <= 0:
            raise SpecError(f"{at(place, name)} is {value}; expected a learning rate above 0")


def _changed(
    layers: Sequence[_Layer], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What layers changed, by who said it last; of a `Pretrained` field, what they say of it.

    Args:
        before: settings under the layers, without `Pretrained` fields.
        after: settings with them.
    """
    found: dict[str, dict[str, Any]] = {}
    for layer in layers:
        who = "command line" if layer.place.startswith(COMMAND_LINE) else "experiment"
        said = {**layer.config, **{f"data.{key}": item for key, item in layer.data.items()}}
        for key in said.keys() & after.keys():
            for others in found.values():
                others.pop(key, None)
            if key not in before:
                found.setdefault(who, {})[key] = plain(said[key])
            elif after[key] != before[key]:
                found.setdefault(who, {})[key] = after[key]
    return {who: dict(sorted(settings.items())) for who, settings in found.items() if settings}


def _prefixed(data: Any) -> dict[str, Any]:
    return {f"data.{key}": item for key, item in config_to_dict(data).items()}


def _joined(source: str, others: Sequence[str]) -> str:
    """`block (source)` with where other settings come from inside the parentheses."""
    if not others:
        return source
    block, _, own = source.removesuffix(")").partition(" (")
    return f"{block} ({'; '.join(filter(None, [own, *others]))})"


def _said(value: Any, place: str) -> dict[str, Any]:
    """What is said of a `Pretrained` field; blank entries say nothing."""
    given = config_to_dict(value) if dataclasses.is_dataclass(value) else value
    return {key: item for key, item in expect_mapping(given, place).items() if item}


def _over(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` laid over `before`, unless it names another algorithm: then it stands alone."""
    if given.get("algorithm", before.get("algorithm")) != before.get("algorithm"):
        return dict(given)
    return {**before, **given, "config": {**before.get("config", {}), **given.get("config", {})}}


def _is_for(case: _Case, label: str, recipe: Recipe) -> bool:
    return fnmatchcase(label, case.algorithm) or fnmatchcase(recipe.name, case.algorithm)


def _is_about(case: _Case, dataset: _Dataset) -> bool:
    return any(fnmatchcase(name, case.dataset) for name in dataset.names)
