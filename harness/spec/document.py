"""An experiment file and what the command line says of it: known keys, and layers of settings.

What the layers mean for an algorithm and a dataset is `harness.spec.resolution`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.spec.reading import (
    COMMAND_LINE,
    as_written,
    parse_override,
    parse_yaml,
    read_text,
    resolved,
)
from harness.spec.types import Claim, EvaluationSpec, Precision, SpecError, data_spec_class
from harness.typed import (
    at,
    check_values,
    config_from_dict,
    convert,
    expect_mapping,
    refuse_unknown,
    suggest,
)

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
_PROTOCOL_KEYS = ("every", "episodes", "first_env_seed")


@dataclass
class Layer:
    """One source of settings; `steps` is already inside `config`."""

    place: str
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    precision: Precision | None = None


@dataclass
class Case:
    layer: Layer
    algorithm: str
    dataset: str


def layer_of(block: Mapping[str, Any], place: str, prefix: str) -> Layer:
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
    return Layer(place, config, data, check_values(EvaluationSpec, evaluation, where), precision)


def _algorithm_blocks(value: Any, place: str) -> dict[str, dict[str, Any]]:
    """`algorithms` as label -> block, from names (a list, or text with commas) or a mapping."""
    value = names_in(value)
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


def names_in(value: Any) -> Any:
    """Text such as `bc, diffusion_ql` as a list; anything else as it is."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


class Document:
    """An experiment file with the overrides applied, and the overrides alone as a last layer."""

    def __init__(self, path: Path, overrides: Sequence[str]) -> None:
        self.file = f"{path.name}: "
        text = read_text(path)
        read = parse_yaml(text, path.name)
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
            parts, value = parse_override(text)
            self._override(content, parts, value, text)
        # Together, so that what the command line says can refer to what the file says.
        overridden = COMMAND_LINE.rstrip(": ")
        self.content = resolved({**content, overridden: self.last}, path.name)
        self.last = self.content.pop(overridden)
        self.labels |= set(self.content.get("algorithms") or {})

    def _refuse_ambiguous(self, seeds: Any, text: str) -> None:
        written = as_written(seeds, text)
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

    def experiment_layer(self) -> Layer:
        return layer_of(self.content, self.file, self.file)

    def block_layer(self, label: str) -> Layer:
        place = f"{self.file}algorithms.{label}"
        block = self.content["algorithms"][label]
        refuse_unknown(block, _BLOCK_KEYS, place)
        return layer_of(block, place, place)

    def _entries(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place and content of each mapping in a list that may be absent."""
        entries = self.content.get(key) or []
        place = self.place(key)
        if not isinstance(entries, list):
            raise SpecError(f"{place}: expected a list of {key}")
        for index, entry in enumerate(entries):
            where = f"{place}[{index}]"
            yield where, expect_mapping(entry, where)

    def cases(self) -> list[Case]:
        cases = []
        for where, case in self._entries("cases"):
            refuse_unknown(case, _CASE_KEYS, where)
            globs = {}
            for key in ("algorithm", "dataset"):
                globs[key] = convert(str, case.get(key, "*"), at(where, key))
            cases.append(Case(layer_of(case, where, where), **globs))
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

    def command_line_layers(self, label: str) -> list[Layer]:
        general = layer_of(self.last, COMMAND_LINE, COMMAND_LINE)
        block = expect_mapping(
            self.last.get("algorithms", {}).get(label), f"{COMMAND_LINE}algorithms.{label}"
        )
        place = f"{COMMAND_LINE}algorithms.{label}"
        return [general, layer_of(block, place, place)]


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
