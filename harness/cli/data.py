"""`harness data`: list, card, verify, make, import, download."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from harness.cli.exit_codes import USAGE
from harness.cli.options import JsonOption, OverwriteOption
from harness.cli.printing import console, errors

app = typer.Typer(help="Datasets: list, inspect, check, make, import, download.")


class _Makers(TyperGroup):
    """Names what can be made where something else is asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"nothing makes {args[0]!r}. Known: {', '.join(self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


make_app = typer.Typer(cls=_Makers, help="Generate a dataset in a real environment.")
app.add_typer(make_app, name="make")


@contextmanager
def _told() -> Iterator[None]:
    """Prints an expected error as one message and exits as a usage error does."""
    from harness.datasets.errors import DatasetError

    try:
        yield
    except (DatasetError, ValueError, TypeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USAGE) from error


@contextmanager
def _progress(what: str, total: int | None, unit: str = "steps") -> Iterator[Any]:
    """A rich progress bar on stderr, so that stdout stays for data."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    amount: Any = (
        DownloadColumn() if unit == "bytes" else TextColumn("{task.completed:,.0f} " + unit)
    )
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        amount,
        TimeRemainingColumn(),
        console=errors,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield bar, task


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Glob over ids.")] = "*",
    published: Annotated[
        bool, typer.Option("--published", help="Also ids and D4RL names that can be fetched.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Shows the datasets in the local store."""
    import fnmatch

    from harness.datasets import DatasetError, catalog, local

    with _told():
        names = local.stored_ids()
        if published:
            names = sorted({*names, *catalog.published_ids()}) + catalog.legacy_ids()
        rows: list[dict[str, Any]] = []
        for name in (n for n in names if fnmatch.fnmatchcase(n, pattern)):
            entry = catalog.resolve(name)
            stored = local.metadata(entry.id) if entry.is_stored else {}
            rows.append(
                {
                    "name": name,
                    "id": entry.id,
                    "relation": entry.relation,
                    "stored": entry.is_stored,
                    "env_id": entry.env_id,
                    "episodes": _count(stored, entry.published, "episodes"),
                    "steps": _count(stored, entry.published, "steps"),
                    "ref_source": entry.ref_source,
                }
            )
        if not rows and not any(char in pattern for char in "*?["):
            raise DatasetError(
                f"no dataset is named {pattern!r}; make one with `harness data make bandit2d` or "
                "see `harness data list --published`"
            )
        if as_json:
            _print_json(rows)
            return
        _table(
            f"Datasets in {local.root()}",
            ("name", "relation", "stored", "environment", "episodes", "steps", "scores"),
            [
                (
                    row["name"] + ("" if row["id"] == row["name"] else f"\n-> {row['id']}"),
                    row["relation"],
                    "yes" if row["stored"] else "no",
                    row["env_id"],
                    _number(row["episodes"]),
                    _number(row["steps"]),
                    row["ref_source"].partition(":")[0].partition(" (")[0] or "raw only",
                )
                for row in rows
            ],
        )
        if not rows:
            typer.echo(
                f"no dataset matches {pattern!r}; make one with `harness data make bandit2d` or "
                "see `harness data list --published`",
                err=True,
            )


@app.command("card")
def card_(
    dataset_id: Annotated[str, typer.Argument(help="A Minari id or a D4RL name.")],
    reference: Annotated[
        str | None, typer.Option(help="Dataset that coverage (SACo) is relative to.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Shows counts, returns, coverage, references, digest and known defects."""
    from harness.datasets import card

    with _told():
        content = card(dataset_id, reference)
    if as_json:
        _print_json(content)
        return
    rows = [(key, _shown(value)) for key, value in content.items() if value not in ("", [], None)]
    _table(str(content["id"]), ("", ""), rows)


@app.command("verify")
def verify_(
    dataset_ids: Annotated[
        list[str] | None, typer.Argument(help="Ids, names or globs; none: every stored dataset.")
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Take the present content as right.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Reads every byte again and compares it with what was recorded."""
    from harness.datasets import DatasetError, digest, local, match, verify

    with _told():
        names = [n for p in dataset_ids or () for n in match(p)] or local.stored_ids()
    rows = []
    for name in dict.fromkeys(names):
        try:
            verify(name, accept=accept)
            rows.append({"id": name, "ok": True, "digest": digest(name), "error": None})
        except DatasetError as error:
            rows.append({"id": name, "ok": False, "digest": None, "error": str(error)})
    if as_json:
        _print_json(rows)
    else:
        for row in rows:
            typer.echo(f"{'ok     ' if row['ok'] else 'DAMAGED'} {row['id']} {row['digest'] or ''}")
            if row["error"]:
                typer.echo(f"error: {row['error']}", err=True)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


@make_app.command("pointmaze")
def make_pointmaze_(
    maze: Annotated[str, typer.Argument(help="open, umaze, medium or large.")] = "umaze",
    steps: Annotated[int, typer.Option(help="Environment steps.", min=1)] = 100_000,
    seed: Annotated[int, typer.Option(help="Same seed, same data.", min=0)] = 0,
    dense: Annotated[bool, typer.Option("--dense", help="Dense reward.")] = False,
    noise: Annotated[float, typer.Option(help="Action noise; D4RL's is 0.5.", min=0.0)] = 0.5,
    dataset_id: Annotated[str | None, typer.Option("--id", help="Dataset id.")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rolls out a waypoint controller in Gymnasium-Robotics' PointMaze."""
    from harness.datasets.pointmaze import make_pointmaze

    with _told(), _progress(f"pointmaze/{maze}", steps) as (bar, task):
        raw = make_pointmaze(
            maze,
            steps=steps,
            seed=seed,
            dense=dense,
            noise=noise,
            dataset_id=dataset_id,
            overwrite=overwrite,
            progress=lambda done: bar.advance(task, done),
        )
    _made(raw, as_json)


for _maze in ("open", "umaze", "medium", "large"):
    # `harness data make pointmaze/umaze` names the dataset as its id does.
    def _make_named(
        steps: Annotated[int, typer.Option(help="Environment steps.", min=1)] = 100_000,
        seed: Annotated[int, typer.Option(help="Same seed, same data.", min=0)] = 0,
        dense: Annotated[bool, typer.Option("--dense", help="Dense reward.")] = False,
        noise: Annotated[float, typer.Option(help="Action noise; D4RL's is 0.5.", min=0.0)] = 0.5,
        dataset_id: Annotated[str | None, typer.Option("--id", help="Dataset id.")] = None,
        overwrite: OverwriteOption = False,
        as_json: JsonOption = False,
        maze: Annotated[str, typer.Option(hidden=True)] = _maze,
    ) -> None:
        make_pointmaze_(maze, steps, seed, dense, noise, dataset_id, overwrite, as_json)

    make_app.command(f"pointmaze/{_maze}", help=f"PointMaze {_maze}: waypoint controller.")(
        _make_named
    )


@make_app.command("pointmaze/routes")
def make_routes_(
    seed: Annotated[int, typer.Option(help="Same seed, same data.", min=0)] = 0,
    episodes: Annotated[int, typer.Option(help="A quarter along each route.", min=4)] = 500,
    noise: Annotated[float, typer.Option(help="Action noise; D4RL's is 0.5.", min=0.0)] = 0.5,
    dataset_id: Annotated[str, typer.Option("--id", help="Dataset id.")] = (
        "generated/pointmaze/routes-v0"
    ),
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Writes demonstrations of four routes through one maze, all equally often."""
    from harness.datasets.routes import make_routes

    with _told(), _progress("pointmaze/routes", episodes, "episodes") as (bar, task):
        advance = lambda done: bar.advance(task, done)  # noqa: E731
        raw = make_routes(seed, episodes, noise, dataset_id, overwrite, advance)
    _made(raw, as_json)


@make_app.command("bandit2d")
def make_bandit2d_(
    seed: Annotated[int, typer.Option(help="Same seed, same data.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="One-step episodes.", min=4)] = 10_000,
    dataset_id: Annotated[str, typer.Option("--id", help="Dataset id.")] = (
        "generated/bandit2d-v0"
    ),
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Writes the 2-D bandit of the Diffusion-QL paper."""
    from harness.datasets.bandit2d import make_bandit2d

    with _told():
        raw = make_bandit2d(seed, steps, dataset_id, overwrite)
    _made(raw, as_json)


@make_app.command("navigation1d")
def make_navigation1d_(
    kind: Annotated[str, typer.Argument(help="expert or medium: little or much noise.")],
    seed: Annotated[int, typer.Option(help="Same seed, same data.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="In episodes of 20.", min=20)] = 10_000,
    dataset_id: Annotated[
        str | None, typer.Option("--id", help="Dataset id; none: generated/navigation1d/<kind>-v0.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Writes the 1-D navigation toy of the DOSER paper."""
    from harness.datasets.navigation1d import make_navigation1d

    with _told():
        raw = make_navigation1d(kind, seed, steps, dataset_id, overwrite)
    _made(raw, as_json)


@make_app.command("ring2d")
def make_ring2d_(
    seed: Annotated[int, typer.Option(help="Same seed, same data.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="One-step episodes.", min=8)] = 8_000,
    dataset_id: Annotated[str, typer.Option("--id", help="Dataset id.")] = "generated/ring2d-v0",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Writes the 2-D ring of eight modes of the VDD paper."""
    from harness.datasets.bandit2d import make_ring2d

    with _told():
        raw = make_ring2d(seed, steps, dataset_id, overwrite)
    _made(raw, as_json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="An original D4RL HDF5 file.")],
    dataset_id: Annotated[
        str, typer.Option("--id", help="D4RL name (stored as d4rl-original/<name>) or Minari id.")
    ],
    env_id: Annotated[str | None, typer.Option("--env", help="Environment of the data.")] = None,
    max_episode_steps: Annotated[
        int | None, typer.Option(help="Time limit, for files without timeouts.", min=1)
    ] = None,
    clip_actions: Annotated[
        bool, typer.Option("--clip-actions", help="Clip actions beyond [-1, 1].")
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Converts an original D4RL file into a Minari dataset."""
    from harness.datasets.d4rl import import_d4rl

    with _told(), _progress(file.name, None, "rows") as (bar, task):
        raw = import_d4rl(
            file,
            dataset_id,
            env_id=env_id,
            max_episode_steps=max_episode_steps,
            clip_actions=clip_actions,
            overwrite=overwrite,
            progress=lambda done: bar.advance(task, done),
        )
    _made(raw, as_json)


@app.command("download")
def download_(
    dataset_ids: Annotated[list[str], typer.Argument(help="Minari ids or D4RL names.")],
    remote: Annotated[
        str | None, typer.Option(help="hf://owner, gcp://bucket or file:///mirror.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetches published datasets; what is already here is left alone."""
    from harness.datasets import digest, download

    rows = []
    with _told():
        for name in dataset_ids:
            with _progress(name, None, "bytes") as (bar, task):

                def show(done: int, total: int | None, bar: Any = bar, task: Any = task) -> None:
                    bar.update(task, completed=done, total=total)

                folder = download(name, remote, show)
            stored_id = json.loads((folder / "data" / "metadata.json").read_text())["dataset_id"]
            rows.append({"id": stored_id, "folder": str(folder), "digest": digest(stored_id)})
    if as_json:
        _print_json(rows)
    else:
        for row in rows:
            typer.echo(f"{row['id']} {row['digest']} {row['folder']}")


def _made(raw: Any, as_json: bool) -> None:
    content = {
        "id": raw.id,
        "digest": raw.digest,
        "episodes": raw.num_episodes,
        "steps": raw.num_steps,
    }
    if as_json:
        _print_json(content)
    else:
        typer.echo(
            f"{raw.id}: {raw.num_episodes:,} episodes, {raw.num_steps:,} steps, digest {raw.digest}"
        )


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(title=title, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _count(stored: Any, published: Any, key: str) -> int | None:
    value = stored.get(f"total_{key}") or published.get(key)
    return int(value) if value else None


def _number(value: int | None) -> str:
    return f"{value:,}" if value is not None else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict) and any(isinstance(v, dict | list) for v in value.values()):
        return json.dumps(value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items() if v not in ("", None))
    if isinstance(value, list):
        separator = "\n" if any(isinstance(v, str) and len(v) > 40 for v in value) else ", "
        return separator.join(_shown(v) for v in value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
