"""What the layout promises: who may import whom, no algorithm known to the harness, light start.

Everything is read from the source with `ast`, imports inside functions included, so that a lazy
import cannot hide a wrong arrow.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pyarrow import parquet

from harness.registry import Registry
from results import archive

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("algorithms", "analysis", "harness", "results")
MAY_IMPORT = {
    "algorithms": {"algorithms"},
    "results": {"results"},
    "harness": {"harness", "results", "algorithms"},
    "analysis": {"analysis", "results"},
}
COMPOSITION_ROOT = "harness/cli/"
HEAVY = ("torch", "ray", "pandas", "minari", "seaborn", "matplotlib", "sqlalchemy", "mujoco")
RETIRED = {"d4rl", "mujoco_py"}


@cache
def python_files(package: str) -> tuple[Path, ...]:
    return tuple(sorted((REPOSITORY / package).rglob("*.py")))


def shown(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(source: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, also in functions and under TYPE_CHECKING."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def imports_of(package: str) -> Iterator[tuple[str, str]]:
    """`file:line` and the imported name, for each import in a package."""
    for path in python_files(package):
        for line, name in imported_modules(syntax(path)):
            yield f"{shown(path)}:{line}", name


def top(name: str) -> str:
    return name.partition(".")[0]


# ------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_our_packages_go_one_way(package):
    wrong = [
        f"{place} imports {name}"
        for place, name in imports_of(package)
        if top(name) in PACKAGES
        and top(name) not in MAY_IMPORT[package]
        and not place.startswith(COMPOSITION_ROOT)
    ]
    assert not wrong, wrong


def test_relative_imports_do_not_hide_where_a_name_comes_from():
    wrong = [
        f"{place} imports {name}"
        for package in PACKAGES
        for place, name in imports_of(package)
        if name.startswith(".")
    ]
    assert not wrong, wrong


def test_the_reader_of_imports_sees_lazy_and_dynamic_ones():
    source = """
        from __future__ import annotations
        if TYPE_CHECKING:
            import results.store
        def f():
            from harness import tune
            importlib.import_module("analysis.plots")
    """
    names = {name for _, name in imported_modules(ast.parse(inspect.cleandoc(source)))}
    assert {"results.store", "harness.tune", "analysis.plots"} <= names


def test_ray_is_imported_in_one_file_only():
    found = {
        place.partition(":")[0]
        for package in PACKAGES
        for place, name in imports_of(package)
        if top(name) == "ray"
    }
    assert found == {"harness/tune.py"}


def test_algorithms_know_no_scheduler_database_dataset_store_or_simulator():
    forbidden = {"ray", "sqlite3", "sqlalchemy", "minari", "gymnasium", "mujoco", "pandas"}
    wrong = [
        f"{p} imports {name}" for p, name in imports_of("algorithms") if top(name) in forbidden
    ]
    assert not wrong, wrong


def test_retired_simulator_packages_are_imported_nowhere():
    files = [p for folder in (*PACKAGES, "tests", "benchmarks", "scripts") for p in
             python_files(folder)]  # fmt: skip
    wrong = [
        f"{shown(path)}:{line}"
        for path in files
        for line, name in imported_modules(syntax(path))
        if top(name) in RETIRED
    ]
    assert files
    assert not wrong, wrong


# ------------------------------------------------------------------ harness and algorithms


def registered_names() -> tuple[str, ...]:
    names = Registry().names()
    assert names, "no algorithm is registered; install the project (make install)"
    return names


def words_of_code(source: ast.Module) -> Iterator[tuple[int, str]]:
    """Identifiers and string literals, without docstrings (an example there decides nothing)."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(source)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(source):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            yield line, str(node.value)


def names_in(source: ast.Module, names: tuple[str, ...]) -> list[tuple[int, str]]:
    """Lines where one of `names` is a whole word; `iql_antmaze` does not contain `iql`."""
    pattern = re.compile(rf"(?<![A-Za-z0-9_])({'|'.join(map(re.escape, names))})(?![A-Za-z0-9_])")
    return [(line, found[1]) for line, word in words_of_code(source)
            if (found := pattern.search(word))]  # fmt: skip


def test_harness_names_no_algorithm():
    names = registered_names()
    wrong = [
        f"{shown(path)}:{line} names {name}"
        for path in python_files("harness")
        for line, name in names_in(syntax(path), names)
    ]
    assert not wrong, wrong


def test_the_search_for_names_finds_branches_and_spares_reward_transforms_and_docstrings():
    source = ast.parse('"""quiet_ql is an example."""\nif name == "quiet_ql": pass\n'
                       'reward = "quiet_ql_antmaze"\nquiet_ql.recipe\n')  # fmt: skip
    assert names_in(source, ("quiet_ql",)) == [(2, "quiet_ql"), (4, "quiet_ql")]


@pytest.mark.parametrize("name", registered_names())
def test_every_config_field_is_explained_where_it_is_declared(name):
    config = Registry().get(name).config
    lines = inspect.getsource(config).splitlines()
    for field in dataclasses.fields(config):
        declared = [i for i, text in enumerate(lines) if re.match(rf"\s+{field.name}\s*:", text)]
        assert declared, f"{config.__module__}.Config: {field.name} is inherited; declare it here"
        comment = re.search(r"#\s*\w", lines[declared[0]])
        assert comment, f"{config.__module__}.Config: {field.name} has no comment on its line"


# ------------------------------------------------------------------------------------ the start


def test_help_starts_without_heavy_packages():
    program = """
import json, sys
from harness.cli import app
try:
    app(args=["--help"], standalone_mode=True)
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "typer" in loaded  # the list is of the right process
    assert not loaded & set(HEAVY)


# ------------------------------------------------------------------------------- the tracked text


def tracked_text() -> Iterator[tuple[str, int, str]]:
    """File, line number and line of every tracked text file that still exists."""
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others",
         "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout: which files are tracked is not known")
    for name in filter(None, listed.stdout.split("\0")):
        path = REPOSITORY / name
        if not path.is_file() or path.suffix in (".png", ".pdf", ".safetensors", ".npz", ".gz"):
            continue
        for number, line in enumerate(_lines(path), 1):
            yield name, number, line


def _lines(path: Path) -> list[str]:
    """Lines of a text file, the records of an archive of results, the rows of another table."""
    if path.name == "rows.parquet":
        return [repr(record) for record in archive.read(path)]
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
        return [repr(table.schema.metadata), *map(repr, table.to_pylist())]
    return path.read_text(encoding="utf-8").splitlines()


def test_no_file_holds_a_path_of_somebodys_machine():
    folders = ("work", "root", "Users")  # joined below so that this file passes itself
    absolute = re.compile(rf"(?<![\w>}}./$*-])/(?:{'|'.join(folders)})/[\w.-]+")
    here = str(REPOSITORY)
    wrong = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name, number, line in tracked_text()
        if absolute.search(line) or here in line
    ]
    assert not wrong, wrong


def test_what_is_left_to_do_carries_an_issue_number():
    marks = re.compile(rf"\b({'|'.join(('TO' + 'DO', 'FIX' + 'ME', 'X' * 3))})\b(?!\(#\d+\))")
    wrong = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name, number, line in tracked_text()
        if marks.search(line)
    ]
    assert not wrong, wrong
