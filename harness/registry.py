"""Name -> Recipe, through entry points in the group `harness.algorithms`.

Our own algorithms and those of other packages register the same way. Also reads a recipe's
hyperparameter file. Nothing is imported until a recipe is asked for: listing names is cheap.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.typed import (
    FieldError,
    at,
    check_values,
    config_to_dict,
    expect_mapping,
    field_types,
    refuse_unknown,
    suggest,
)

if TYPE_CHECKING:
    from algorithms.api import Make, Recipe, Train

GROUP = "harness.algorithms"
_VALID_NAME = re.compile(r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*")


class UnknownAlgorithmError(KeyError):
    """No package registers this name; the message has near matches and the valid list."""

    def __str__(self) -> str:
        return str(self.args[0])


class RecipeError(ValueError):
    """A registered recipe cannot be used; names the recipe and what is wrong with it."""


@dataclass(frozen=True)
class Provenance:
    """Where a recipe comes from."""

    name: str
    distribution: str  # "" when the entry point belongs to no distribution
    version: str
    module: str

    def __str__(self) -> str:
        where = f"{self.distribution} {self.version}".strip() or "unknown distribution"
        return f"{self.module} ({where})"


class Registry:
    """The algorithms that installed packages register.

    Args:
        entry_points: those of the group; by default what the installed packages declare.
    """

    def __init__(self, entry_points: Iterable[metadata.EntryPoint] | None = None) -> None:
        if entry_points is None:
            entry_points = metadata.entry_points(group=GROUP)
        self._entries: dict[str, list[metadata.EntryPoint]] = {}
        for entry in entry_points:
            found = self._entries.setdefault(entry.name, [])
            if entry not in found:
                found.append(entry)
        self._recipes: dict[str, Recipe] = {}

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted; imports no algorithm."""
        return tuple(sorted(self._entries))

    def get(self, name: str) -> Recipe:
        """The recipe registered as `name`, imported and checked.

        Raises:
            UnknownAlgorithmError: if no package registers it.
            RecipeError: if two packages register it, it cannot be imported, or is not usable.
        """
        if name not in self._recipes:
            entry = self._entry(name)
            try:
                recipe = entry.load()
            except Exception as error:
                raise RecipeError(
                    f"algorithm {name!r} of {_owner(entry)} cannot be imported from "
                    f"{entry.value}: {type(error).__name__}: {error}"
                ) from error
            check_recipe(recipe, name, f"{entry.value} of {_owner(entry)}")
            self._recipes[name] = recipe
        return self._recipes[name]

    def describe(self, recipe: Recipe | str) -> Provenance:
        """Distribution, version and module of a recipe (or of a name, without importing it)."""
        name = recipe if isinstance(recipe, str) else recipe.name
        entry = self._entry(name)
        return Provenance(
            name=name,
            distribution=entry.dist.name if entry.dist else "",
            version=entry.dist.version if entry.dist else "",
            module=entry.module,
        )

    def _entry(self, name: str) -> metadata.EntryPoint:
        entries = self._entries.get(name, [])
        if not entries:
            hint = (
                suggest(name, self._entries)
                if self._entries
                else f"No installed package registers any in {GROUP!r}; install the harness itself "
                "with `pip install -e .`"
            )
            raise UnknownAlgorithmError(f"unknown algorithm {name!r}. {hint}")
        if len(entries) > 1:
            parties = " and ".join(f"{_owner(entry)} ({entry.value})" for entry in entries)
            raise RecipeError(
                f"algorithm {name!r} is registered by {parties}. Uninstall one of them, or rename "
                "the entry point in one"
            )
        return entries[0]


def _owner(entry: metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


# ------------------------------------------------------------------------------------ the recipe


def check_recipe(recipe: Any, name: str, where: str) -> None:
    """Raises RecipeError unless `recipe` can be used under `name`."""
    from algorithms.api import Recipe

    def fail(problem: str) -> RecipeError:
        return RecipeError(f"algorithm {name!r} ({where}): {problem}")

    if not isinstance(recipe, Recipe):
        raise fail(f"expected an algorithms.api.Recipe, got {type(recipe).__name__}")
    if recipe.name != name:
        raise fail(f"its recipe is named {recipe.name!r}; the entry point must have the same name")
    if not isinstance(recipe.revision, int) or isinstance(recipe.revision, bool):
        raise fail(f"revision is {recipe.revision!r}; expected an int")
    if not dataclasses.is_dataclass(recipe.config) or not isinstance(recipe.config, type):
        raise fail(f"config is {recipe.config!r}; expected a frozen dataclass")
    if not recipe.config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise fail(f"config {recipe.config.__name__} is not frozen: use @dataclass(frozen=True)")
    for field in dataclasses.fields(recipe.config):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise fail(f"config field {field.name!r} has no default")
    try:
        annotations = field_types(recipe.config)
        default = recipe.config()
        config_to_dict(default)
    except (TypeError, ValueError) as error:
        raise fail(f"config defaults: {error}") from error
    if annotations.get("steps") is not int:
        raise fail("config has no field 'steps: int', the gradient steps of the last stage")
    try:
        stages_of(recipe, default)
    except RecipeError as error:
        raise fail(str(error)) from error


def stages_of(recipe: Recipe, config: Any) -> tuple[Train | Make, ...]:
    """The stages of `recipe` for `config`, checked: names, needs, and a policy at the end.

    Raises:
        RecipeError: naming the stage and what is wrong with it.
    """
    from algorithms.api import Make, Train

    try:
        stages = tuple(recipe.stages(config))
    except Exception as error:
        raise RecipeError(
            f"recipe {recipe.name!r}: stages({config}) raised {type(error).__name__}: {error}"
        ) from error
    if not stages:
        raise RecipeError(f"recipe {recipe.name!r} has no stage")
    seen: dict[str, Train | Make] = {}
    for stage in stages:
        if not isinstance(stage, Train | Make):
            raise RecipeError(f"recipe {recipe.name!r}: {stage!r} is neither a Train nor a Make")
        where = f"stage {stage.name!r} of recipe {recipe.name!r}"
        if not isinstance(stage.name, str) or not _VALID_NAME.fullmatch(stage.name):
            raise RecipeError(f"{where}: the name must be letters, digits, '_', '-' or '.'")
        if stage.name in seen:
            raise RecipeError(f"{where}: two stages have this name")
        for need in stage.needs:
            if need not in seen:
                raise RecipeError(
                    f"{where} needs {need!r}, which is no earlier stage. "
                    f"{suggest(need, seen, 'Earlier')}"
                )
            if seen[need].per_seed and not stage.per_seed:
                raise RecipeError(
                    f"{where} is shared by all seeds but needs {need!r}, which differs by seed"
                )
        if not dataclasses.is_dataclass(stage.config) or isinstance(stage.config, type):
            raise RecipeError(f"{where}: config is {stage.config!r}; expected a dataclass instance")
        try:
            config_to_dict(stage.config)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{where}: {error}") from error
        if isinstance(stage, Train):
            _check_train(stage, where)
        elif not callable(stage.function):
            raise RecipeError(f"{where}: function {stage.function!r} cannot be called")
        seen[stage.name] = stage
    last = stages[-1]
    if not isinstance(last, Train):
        raise RecipeError(f"recipe {recipe.name!r}: the last stage {last.name!r} is not a Train")
    if not last.per_seed:
        raise RecipeError(f"recipe {recipe.name!r}: the last stage {last.name!r} must be per seed")
    if not callable(getattr(last.learner, "act", None)):
        raise RecipeError(
            f"recipe {recipe.name!r}: the learner {last.learner.__name__} of its last stage has "
            "no act(obs, rng), so it is not a policy"
        )
    return stages


def _check_train(stage: Train, where: str) -> None:
    least = 0 if stage.needs else 1
    if not isinstance(stage.steps, int) or isinstance(stage.steps, bool) or stage.steps < least:
        raise RecipeError(
            f"{where}: steps is {stage.steps!r}; expected an int of at least 1, or 0 for a stage "
            "that only acts with what it needs"
        )
    if not isinstance(stage.learner, type):
        raise RecipeError(f"{where}: learner {stage.learner!r} is not a class")
    for method in ("sample", "update", "state_dict", "load_state_dict"):
        if not callable(getattr(stage.learner, method, None)):
            raise RecipeError(f"{where}: learner {stage.learner.__name__} has no {method}()")


# ------------------------------------------------------------------------------- hyperparameters


class Hparams(NamedTuple):
    """What a recipe's hyperparameter file says about one dataset, under one of its presets."""

    config: dict[str, Any]
    data: dict[str, Any]
    source: str  # the most specific block that applied, and where its values come from


def hparams_for(recipe: Recipe, names: Sequence[str], preset: str = "") -> Hparams:
    """The default block of the recipe's file, the first block that matches a name, the preset.

    Later wins.

    Args:
        names: what the dataset is called: as requested, its Minari id, its legacy D4RL id.
        preset: the name of one of the file's presets, or "" for none.

    Raises:
        FieldError: if the file is not valid, naming the file and the place in it, or if it has no
            such preset.
    """
    content = _load_hparams(recipe)
    chosen = [block for block in content.blocks[:1] if block.given]
    for block in content.blocks[1:]:
        if any(_matches(name, pattern) for pattern in block.match for name in names):
            chosen.append(block)
            break
    title, sources = "config defaults", []
    if chosen:
        title, sources = chosen[-1].title, [chosen[-1].source]
    if preset:
        if preset not in content.presets:
            raise FieldError(
                f"unknown preset {preset!r} of {recipe.name!r}. {suggest(preset, content.presets)}"
            )
        chosen.append(content.presets[preset])
        title, sources = f"{title} + preset {preset}", [*sources, chosen[-1].source]
    config: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for block in chosen:
        config.update(block.config)
        data.update(block.data)
    source = "; ".join(filter(None, sources))
    return Hparams(config, data, f"{title} ({source})" if source else title)


def presets_of(recipe: Recipe) -> dict[str, str]:
    """Name -> source of the presets in the recipe's file."""
    return {name: block.source for name, block in _load_hparams(recipe).presets.items()}


def check_hparams(recipe: Recipe) -> int:
    """Reads and validates the recipe's file; returns its number of blocks, presets included."""
    content = _load_hparams(recipe)
    return len(content.blocks) + len(content.presets)


@dataclass(frozen=True)
class _Block:
    place: str
    match: tuple[str, ...]
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    source: str
    given: bool = True

    @property
    def title(self) -> str:
        return self.match[0] if self.match else "default"


class _File(NamedTuple):
    blocks: list[_Block]  # the default first
    presets: dict[str, _Block]


def _matches(name: str, pattern: str) -> bool:
    return bool(name) and fnmatchcase(name.casefold(), pattern.casefold())


_CACHE: dict[tuple[Path, int, int, type], _File] = {}


def _load_hparams(recipe: Recipe) -> _File:
    if recipe.hparams is None:
        return _File([], {})
    path = Path(recipe.hparams)
    try:
        status = path.stat()
    except OSError as error:
        raise FieldError(
            f"{path}: hyperparameters of {recipe.name!r} cannot be read: {error.strerror}"
        ) from error
    key = (path, status.st_mtime_ns, status.st_size, recipe.config)
    if key not in _CACHE:
        _CACHE[key] = _parse_hparams(recipe, path)
    return _CACHE[key]


def _parse_hparams(recipe: Recipe, path: Path) -> _File:
    from harness.spec import read_yaml

    place = f"{path.name}: "
    content = expect_mapping(read_yaml(path), f"{path.name}")
    refuse_unknown(content, ("default", "datasets", "presets"), place)
    blocks = [_parse_block(recipe, content.get("default"), f"{place}default", matching=False)]
    entries = content.get("datasets") or []
    if not isinstance(entries, list):
        raise FieldError(f"{place}datasets: expected a list of blocks with `match`")
    for index, entry in enumerate(entries):
        blocks.append(_parse_block(recipe, entry, f"{place}datasets[{index}]", matching=True))
    presets = {}
    for name, entry in expect_mapping(content.get("presets"), f"{place}presets").items():
        where = at(f"{place}presets", name)
        if not _VALID_NAME.fullmatch(name):
            raise FieldError(f"{where}: the name must be letters, digits, '_', '-' or '.'")
        presets[name] = _parse_block(recipe, entry, where, matching=False)
    return _File(blocks, presets)


def _parse_block(recipe: Recipe, value: Any, place: str, matching: bool) -> _Block:
    from harness.spec import data_spec_class

    block = expect_mapping(value, place)
    refuse_unknown(block, ("config", "data", "source", *(("match",) if matching else ())), place)
    match = block.get("match", [])
    if matching:
        match = [match] if isinstance(match, str) else match
        valid = isinstance(match, list) and match and all(isinstance(m, str) and m for m in match)
        if not valid:
            raise FieldError(f"{at(place, 'match')}: expected one or more names or globs")
    source = block.get("source", "")
    if not isinstance(source, str):
        raise FieldError(f"{at(place, 'source')}: expected text, got {source!r}")
    return _Block(
        place=place,
        match=tuple(match),
        config=check_values(recipe.config, block.get("config"), at(place, "config")),
        data=check_values(data_spec_class(), block.get("data"), at(place, "data")),
        source=source,
        given=bool(block),
    )
