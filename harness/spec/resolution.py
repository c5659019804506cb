"""From a document to trials: every setting from the source that says it last.

In this order: config defaults, hyperparameter file (default, the dataset's block, the preset that
the algorithm block names), the experiment's `steps`, `config`, `data`, its algorithm block, its
cases, the command line.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.spec.document import Case, Document, Layer, layer_of, names_in
from harness.spec.reading import COMMAND_LINE, parse_seeds
from harness.spec.types import (
    Claim,
    EvaluationSpec,
    Experiment,
    Origin,
    Precision,
    RunOptions,
    SpecError,
    TrialSpec,
    data_spec_class,
    data_to_dict,
)
from harness.typed import (
    FieldError,
    at,
    check_values,
    config_from_dict,
    config_to_dict,
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
        return _Resolver(Document(Path(path), overrides), registry, datasets).experiment()
    except SpecError:
        raise
    except FieldError as error:
        raise SpecError(str(error)) from error


def dataset_names(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[str]:
    """The datasets that an experiment names, globs as they are; none needs to be stored.

    Raises:
        SpecError: if the file cannot be read or names no dataset.
    """
    names = names_in(Document(Path(path), overrides).required("datasets"))
    return [name for name in names if isinstance(name, str)]


def claims_of(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[Claim, ...]:
    """What an experiment claims; no dataset needs to be stored.

    Raises:
        SpecError: if the file cannot be read, or a claim is not valid.
    """
    try:
        return Document(Path(path), overrides).claims()
    except SpecError:
        raise
    except FieldError as error:
        raise SpecError(str(error)) from error


class _Resolver:
    """Turns a document into trials."""

    def __init__(self, document: Document, registry: Registry, catalog: Catalog | None) -> None:
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
        patterns = names_in(self.document.required("datasets"))
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

    def _check_fields(self, recipes: Mapping[str, Recipe], cases: Sequence[Case]) -> None:
        """Every config key must be a field of an algorithm it is meant for, with its type."""
        document = self.document
        shared = [
            (layer_of(document.last, COMMAND_LINE, COMMAND_LINE), recipes),
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
        cases: Sequence[Case],
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
        self, label: str, recipe: Recipe, dataset: _Dataset, cases: Sequence[Case], seed: int
    ) -> tuple[TrialSpec, Origin]:
        """One seed's trial of `label` on `dataset`."""
        from harness.registry import hparams_for

        document = self.document
        hparams = hparams_for(recipe, dataset.names, self.presets[label])
        layers = [Layer(document.file, hparams.config, hparams.data)]
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
        self, recipe: Recipe, layers: Sequence[Layer], dataset: _Dataset, place: str
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
    layers: Sequence[Layer], before: Mapping[str, Any], after: Mapping[str, Any]
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


def _is_for(case: Case, label: str, recipe: Recipe) -> bool:
    return fnmatchcase(label, case.algorithm) or fnmatchcase(recipe.name, case.algorithm)


def _is_about(case: Case, dataset: _Dataset) -> bool:
    return any(fnmatchcase(name, case.dataset) for name in dataset.names)
