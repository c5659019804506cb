"""`harness slurm` and `harness cluster`: sweeps on several nodes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.options import DatabaseOption, HomeOption, OverridesArgument, SpecArgument
from harness.cli.printing import console, errors

cluster_app = typer.Typer(no_args_is_help=True)


def slurm(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[int, typer.Option(help="Nodes of the Ray cluster.")] = 1,
    array: Annotated[
        int, typer.Option(help="Instead of a Ray cluster: so many independent jobs.")
    ] = 0,
    time: Annotated[str, typer.Option(help="Time limit, in Slurm's format.")] = "24:00:00",
    cpus: Annotated[int, typer.Option(help="CPUs per node.")] = 8,
    gpus: Annotated[int, typer.Option(help="GPUs per node.")] = 0,
    mem: Annotated[str, typer.Option(help="Memory per node, such as 64G.")] = "",
    partition: Annotated[str, typer.Option(help="Slurm partition.")] = "",
    account: Annotated[str, typer.Option(help="Slurm account.")] = "",
    out: Annotated[Path | None, typer.Option(help="Script to write [<name>.sbatch].")] = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """Write a batch script for Slurm: a Ray cluster in one job, or an array without Ray."""
    from harness.home import Home
    from harness.slurm import Resources, array_script, ray_script
    from harness.spec import load_experiment

    experiment = load_experiment(spec, overrides or [])
    resources = Resources(nodes, time, cpus, gpus, mem, partition, account)
    found = Home.find(home)
    program = str(Path(sys.executable).parent / "harness")
    where = ["--home", str(found.root), *(["--db", db] if db else [])]
    rest = [str(spec.resolve()), *(overrides or []), *where]
    name = experiment.name
    if array:
        script = array_script(name, [program, "work", *rest], array, resources, found.root)
    else:
        script = ray_script(name, [program, "sweep", *rest], resources, found.root)
    path = out or Path(f"{name}.sbatch")
    path.write_text(script, encoding="utf-8")
    console.print(f"{path}: submit with `sbatch {path}`", highlight=False, soft_wrap=True)
    if array:
        then = shlex.join(["harness", "sweep", str(spec), *(overrides or []), *where])
        console.print(
            f"when it has ended, take the rows into the database and finish what is left: {then}",
            highlight=False,
            soft_wrap=True,
        )


@cluster_app.command("up")
def cluster_up(
    nodes: Annotated[int, typer.Option(help="Nodes, with the head.")] = 2,
    cpus: Annotated[int, typer.Option(help="CPUs of each; 0: the machine's, shared.")] = 0,
    home: HomeOption = None,
) -> None:
    """Start a local cluster and print what to export; sweeps then run on it."""
    from harness import cluster
    from harness.home import Home

    started = cluster.up(Home.find(home).root, nodes, cpus)
    errors.print(f"{nodes} nodes run; `harness cluster down` ends them", highlight=False)
    print("export " + shlex.join(f"{k}={v}" for k, v in started.environment.items()))


@cluster_app.command("down")
def cluster_down(home: HomeOption = None) -> None:
    """End exactly the processes that `harness cluster up` started."""
    from harness import cluster
    from harness.home import Home

    console.print(f"{cluster.down(Home.find(home).root)} nodes ended", highlight=False)
