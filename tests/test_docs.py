"""The documents against the code: commands parse, files exist, examples run."""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from harness import cli

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
PACKAGES = ("algorithms", "analysis", "harness", "results")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text_of(document)) if name == language]


def spans(document: str) -> list[str]:
    """Inline code of a document."""
    prose = FENCE.sub("", text_of(document))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def shell_lines(document: str) -> Iterator[str]:
    """Commands in bash blocks, joined where a backslash continues them, comments stripped."""
    for body in blocks(document, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*$", "", line).strip()
            if command:
                yield command


# ---------------------------------------------------------------------------------- the commands


class WrongCommandError(Exception):
    """A command that the command line would refuse."""


def parse_harness(arguments: list[str], complete: bool) -> None:
    """Parses a command without running it.

    Args:
        complete: whether required arguments must be there (a code block), or may be left out (a
            name in a sentence).

    Raises:
        WrongCommandError: unless the subcommand exists and takes these arguments.
    """
    command = typer.main.get_command(cli.app)
    depth = 0
    while hasattr(command, "commands"):  # typer brings a copy of click or uses click, by version
        if depth and not arguments and not complete:
            return  # `harness data` names a group
        name = arguments.pop(0) if arguments else ""
        if name not in command.commands:
            raise WrongCommandError(f"no such command: {name!r}")
        command, depth = command.commands[name], depth + 1
    if arguments or complete:
        try:
            command.make_context(command.name, arguments)
        except Exception as error:
            if any(cls.__name__ == "UsageError" for cls in type(error).__mro__):
                raise WrongCommandError(str(error)) from error
            raise


def harness_commands() -> list[tuple[str, str, bool]]:
    """Document, command and whether it stands in a code block."""
    found = []
    for document in DOCUMENTS:
        lines = [line for line in shell_lines(document) if line.startswith("harness ")]
        found += [(document, line, True) for line in lines]
        named = [span for span in spans(document) if re.match(r"harness [a-z]", span)]
        found += [(document, span, False) for span in dict.fromkeys(named)]
    return found


@pytest.mark.parametrize(
    ("document", "command", "complete"),
    harness_commands(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_command_of_the_documents_parses(document, command, complete):
    parse_harness(shlex.split(command)[1:], complete)


@pytest.mark.parametrize(
    "command", ["sweeep my.yaml", "sweep --dry my.yaml", "sweep", "data card", "data list a b"]
)
def test_a_wrong_command_would_be_found(command):
    with pytest.raises(WrongCommandError):
        parse_harness(shlex.split(command), complete=True)


def test_the_readme_shows_every_command_but_the_rarest():
    known = set(typer.main.get_command(cli.app).commands)
    shown = {command.split()[1] for _, command, _ in harness_commands()} | {"quickstart"}
    assert not known - shown


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", text_of("Makefile"), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_and_variables_exist(document):
    code = [*shell_lines(document), *spans(document)]
    used = [m for line in code for m in re.findall(r"(?:^|&& )make ([a-z][a-z-]*)", line)]
    assert set(used) <= make_targets()
    variables = {m for line in code if "make " in line for m in re.findall(r"([A-Z_]{3,})=", line)}
    assert all(re.search(rf"^{name} \?=", text_of("Makefile"), re.M) for name in variables)
    assert document == "docs/architecture.md" or used


def test_environment_variables_of_the_documents_are_read_somewhere():
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in (*PACKAGES, "scripts", "tests")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".sh") and path != Path(__file__)
    )
    named = {m for d in DOCUMENTS for m in re.findall(r"\bHARNESS_[A-Z_]+\b", text_of(d))}
    assert {"HARNESS_HOME", "HARNESS_DB"} <= named
    assert {name for name in named if name not in source} == set()


def test_exit_codes_of_the_readme_are_those_of_the_command_line():
    sentence = re.search(r"\*\*Exit codes:\*\*(.*?)\.", text_of("README.md"), re.DOTALL)
    assert sentence
    assert {int(n) for n in re.findall(r"\b\d+\b", sentence[1])} == {
        cli.OK,
        cli.SOME_FAILED,
        cli.USAGE,
        cli.ENVIRONMENT,
        cli.INTERRUPTED,
    }


# ------------------------------------------------------------------------------------- the files


def paths_in(document: str) -> set[str]:
    """Files and folders of the repository that a document names in code or links to."""
    texts = [*shell_lines(document), *spans(document)]
    text = text_of(document)
    links = [m for m in re.findall(r"\]\(([^)#\s]+)\)", FENCE.sub("", text)) if "://" not in m]
    folder = Path(document).parent
    found = {(folder / link).as_posix() for link in links}
    tops = "|".join((*PACKAGES, "docs", "experiments", "scripts", "tests", "benchmarks"))
    for code in texts:
        found |= set(re.findall(rf"(?<![\w./-])(?:{tops})/[\w./*<>-]*", code))
    return {path.rstrip(".") for path in found if "<" not in path and "*" not in path}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document):
    found = paths_in(document)
    assert found
    missing = sorted(path for path in found if not (REPOSITORY / path).exists())
    assert not missing, missing


def tree_entries() -> Iterator[str]:
    """Paths of the tree drawn in docs/architecture.md."""
    tree = next(body for body in blocks("docs/architecture.md", "") if "algorithms/" in body)
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        names = re.split(r"\s{2,}", line.strip())[0]
        for name in names.split(", "):
            path = "".join(name for _, name in folders) + name
            yield path
            if name.endswith("/"):
                folders.append((indent, name))


def test_the_tree_of_the_architecture_is_the_tree_there_is():
    drawn = set(tree_entries())
    missing = sorted(path for path in drawn if not (REPOSITORY / path).exists())
    assert not missing, f"drawn but absent: {missing}"
    modules = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
        if path.name != "__init__.py" and "migrations" not in path.parts
    }
    assert not sorted(modules - drawn), "present but not drawn"


def test_the_container_gets_every_package():
    allowed = re.findall(r"^!(\S+)$", text_of(".dockerignore"), re.MULTILINE)
    locks = ("constraints.txt", "docker/constraints-cuda.txt")
    assert {*PACKAGES, "experiments", "pyproject.toml", *locks} <= set(allowed)
    assert all((REPOSITORY / name).exists() for name in allowed if name != "wheels")


# ---------------------------------------------------------------------------------- the examples


def test_the_experiment_of_the_readme_resolves_with_every_override_shown(bandit, tmp_path):
    from harness.spec import load_experiment

    (example,) = blocks("README.md", "yaml")
    spec = tmp_path / "my.yaml"
    spec.write_text(example)
    lines = [shlex.split(line) for line in shell_lines("README.md") if " my.yaml" in line]
    assert len(lines) >= 4
    for line in lines:
        overrides = [word for word in line[3:] if not word.startswith("-")]
        experiment = load_experiment(spec, overrides)
        labels = {trial.label for trial in experiment.trials}
        assert labels == {"bc", "dql_short"}
        assert {trial.dataset_id for trial in experiment.trials} == {bandit}
    more = load_experiment(spec, ["seeds=0-4"])
    base = load_experiment(spec, [])
    ids = {trial.id for trial in base.trials}
    # "only these are trained": what was there keeps its identity.
    assert ids < {trial.id for trial in more.trials}
    assert len(more.trials) - len(base.trials) == 2 * 2


def example_algorithm() -> Any:
    """The module in CONTRIBUTING.md."""
    (source,) = blocks("CONTRIBUTING.md", "python")
    module = types.ModuleType("contributing_example")
    sys.modules[module.__name__] = module
    exec(compile(source, "CONTRIBUTING.md", "exec"), module.__dict__)
    module.__source__ = source
    return module


def test_the_algorithm_of_the_contributing_guide_passes_the_contract():
    from algorithms.testing import check_recipe as check_contract
    from harness.registry import check_recipe as check_registered

    module = example_algorithm()
    check_registered(module.recipe, module.recipe.name, "CONTRIBUTING.md")
    check_contract(module.recipe, module.Config(hidden_dim=16, batch_size=16))


def test_the_algorithm_of_the_contributing_guide_finds_the_weighted_mean():
    import torch
    from bandit import bandit_dataset, train

    module = example_algorithm()
    dataset = bandit_dataset(per_corner=200)
    reward = (dataset.reward - dataset.reward.mean()) / dataset.reward.std(correction=0)
    for inv_temperature in (0.0, 1.0, 3.0):
        config = module.Config(
            hidden_dim=32, batch_size=256, lr=3e-3, inv_temperature=inv_temperature
        )
        learner, _ = train(
            module.RewardWeighted(config, dataset.spec, [0, 1]), dataset, [0, 1], 200
        )
        found = learner.act(torch.zeros(2, 1, 2), None)[:, 0]  # [K, A]; one observation
        # Closed form: squared error with weights is least at the weighted mean of the actions.
        weight = (inv_temperature * reward).exp().clamp(max=config.max_weight)
        expected = (weight[:, None] * dataset.action).sum(dim=0) / weight.sum()
        assert ((found - expected).abs() < 0.1).all(), (inv_temperature, found, expected)


def test_the_example_follows_the_rules_it_teaches():
    module = example_algorithm()
    name = module.recipe.name
    for field in fields(module.Config):
        assert re.search(rf"^    {field.name}: .*# \w", module.__source__, re.MULTILINE), field.name
    (entry,) = blocks("CONTRIBUTING.md", "toml")
    assert f'{name} = "algorithms.{name}:recipe"' in entry
    assert entry.splitlines()[0] in text_of("pyproject.toml")
