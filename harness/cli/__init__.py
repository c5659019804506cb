"""The command line: the composition root, which alone may know all four packages.

A module holds the commands of one theme and what only they use; what they share is in `options`,
`printing` and `exit_codes`. Heavy packages are imported inside the commands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

import typer

from harness.cli import about, clusters, data, policies, reading, reproducing, running, studies
from harness.cli.exit_codes import (
    BUGS,
    ENVIRONMENT,
    INTERRUPTED,
    OK,
    SOME_FAILED,
    USAGE,
    exit_code,
)
from harness.cli.printing import errors, styled

__all__ = [
    "ENVIRONMENT",
    "INTERRUPTED",
    "OK",
    "SOME_FAILED",
    "USAGE",
    "app",
    "exit_code",
    "main",
]

# In the order of `harness --help`.
COMMANDS: dict[str, Callable[..., None]] = {
    "sweep": running.sweep,
    "work": running.work,
    "slurm": clusters.slurm,
    "status": running.status,
    "actions": policies.actions,
    "synthetic": policies.synthetic,
    "ood": studies.ood,
    "latency": policies.latency,
    "export": policies.export,
    "leaderboard": reading.leaderboard,
    "reproduce": reproducing.reproduce,
    "import": reading.import_runs,
    "archive": reading.archive,
    "merge": reading.merge,
    "figures": reading.figures,
    "table": reading.table,
    "claims": reading.claims,
    "bandit": studies.bandit,
    "guidance": studies.guidance,
    "ring": studies.ring,
    "likelihood": studies.likelihood,
    "modes": studies.modes,
    "quickstart": reproducing.quickstart,
    "algorithms": about.algorithms,
    "doctor": about.doctor,
}

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Offline RL benchmarks you can trust: sweeps of stacked seeds, a results database, "
    "leaderboards with intervals.",
)
app.add_typer(data.app, name="data", help="Datasets: list, card, verify, make, import, download.")
app.add_typer(
    clusters.cluster_app, name="cluster", help="A Ray cluster of several nodes on this machine."
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main(arguments: Iterable[str] | None = None) -> None:
    """Runs the command line; prints one error line instead of a traceback."""
    try:
        app(args=None if arguments is None else list(arguments), standalone_mode=True)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get("HARNESS_DEBUG"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        errors.print(styled("error", "red", f" {text}"), highlight=False, soft_wrap=True)
        if isinstance(error, BUGS):
            what = type(error).__name__
            errors.print(f"{what}: this is a bug; HARNESS_DEBUG=1 shows where", highlight=False)
        sys.exit(exit_code(error))
