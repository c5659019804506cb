"""`harness algorithms` and `doctor`: what there is to use, and whether it works here."""

from __future__ import annotations

import json
from typing import Annotated, Any, get_args

import typer
from rich.table import Table

from harness.cli.exit_codes import ENVIRONMENT
from harness.cli.options import DatabaseOption, HomeOption, JsonOption
from harness.cli.printing import console, print_checks, styled


def algorithms(
    name: Annotated[str | None, typer.Argument(help="Show one algorithm's config.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Registered algorithms, or one algorithm's config fields, their defaults and its presets."""
    import dataclasses

    from harness.registry import Registry, presets_of

    registry = Registry()
    if name is not None:
        recipe = registry.get(name)
        defaults = dataclasses.asdict(recipe.config())
        presets = presets_of(recipe)
        if as_json:
            shown = {"name": name, "revision": recipe.revision, "config": defaults}
            print(json.dumps({**shown, "presets": presets}))
            return
        console.print(styled(name, "bold", f" revision {recipe.revision}: {recipe.summary}"))
        table = Table("field", "default", "type")
        for item in dataclasses.fields(recipe.config):
            table.add_row(item.name, repr(defaults[item.name]), type_name(item.type))
        console.print(table)
        for preset, source in presets.items():
            console.print(styled(f"preset {preset}", "bold", f": {source}"))
        return
    rows = [(recipe.name, recipe) for recipe in map(registry.get, registry.names())]
    if as_json:
        print(json.dumps([{"name": n, "revision": r.revision, "paper": r.paper} for n, r in rows]))
        return
    table = Table("name", "revision", "summary", "paper")
    for label, recipe in rows:
        table.add_row(label, str(recipe.revision), recipe.summary, recipe.paper)
    console.print(table)


def type_name(annotation: Any) -> str:
    """An annotation as it was written: text where annotations are not evaluated, else a class."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation)


def doctor(home: HomeOption = None, db: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Check the environment: versions, compiler, simulator, database, Ray, disk."""
    from harness.doctor import check

    checks = list(check(home, db))
    if as_json:
        print(json.dumps([vars(item) for item in checks]))
    else:
        print_checks(checks)
    if any(item.state == "bad" for item in checks):
        raise typer.Exit(ENVIRONMENT)
