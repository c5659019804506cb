"""A folder that says what was run and what came out: REPRODUCTION.md, figures, the spec.

Everything is read from the database, so the report is about the runs and not about the machine
that writes it. Verdicts and the leaderboard are those of `verdicts` and `leaderboard`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import claims as claims_of
from analysis import leaderboard, plots, verdicts
from analysis.tables import markdown_table
from results.store import Store

REPORT = "REPRODUCTION.md"
SPEC = "spec.yaml"
MOST_ERRORS = 20


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        spec: the experiment as YAML, with overrides in it.
        command: what writes this report again, run in its folder.
    """

    name: str
    description: str
    spec: str
    command: str


def write(
    store: Store,
    out: Path,
    trial_ids: Iterable[str],
    request: Request,
    settings: verdicts.Settings | None = None,
    claims: Sequence[claims_of.Claim] = (),
    select: str = "last",
    margin: float = verdicts.MARGIN,
    seed: int = 0,
) -> Path:
    """The report's path; figures and the spec are beside it.

    Args:
        trial_ids: of the experiment, whether they ran or not.
        settings: where published settings come from; see `verdicts.reproduce`.
        claims: what the experiment is to show.
        select: the evaluation that counts in leaderboard and figures.
        seed: of the bootstrap.
    """
    ids = list(trial_ids)
    out.mkdir(parents=True, exist_ok=True)
    (out / SPEC).write_text(request.spec, encoding="utf-8")
    statuses = store.statuses(ids)
    parts = [f"# Reproduction: {request.name}", request.description]
    parts += ["## What ran", *_what_ran(store, ids, statuses)]
    if any(run.status == "done" for run in statuses.values()):
        report = verdicts.reproduce(store, None, "*", margin, settings, trial_ids=ids)
        if report.judgements:
            parts.append(verdicts.markdown(replace(report, notes=())))
        else:
            parts += ["## Printed numbers and ours", "No printed number is about these trials."]
        if claims:
            built = claims_of.build(store, claims, ids, select)
            parts.append(claims_of.markdown(replace(built, notes=())))
            drawn = claims_of.write(built, out / "claims")
            parts += _figures([path for path in drawn if path.suffix == ".png"], out)
        parts.append(leaderboard.build(store, ids, select, seed).render("markdown"))
        figures = plots.write_figures(store, out / "figures", ids, select=select, seed=seed)
        parts += ["## Figures", *_figures(figures, out)]
    parts += ["## Data", _data(store, ids)]
    parts += ["## Code and machines", _provenance(store, ids)]
    parts += ["## Again", *_again(request, store, ids)]
    path = out / REPORT
    path.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")
    return path


def _what_ran(store: Store, ids: list[str], statuses: Mapping[str, Any]) -> list[str]:
    """A row per method and dataset, and why what did not end well did not."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for trial in _records(store.trials(ids)):
        key = (trial["label"], trial["dataset_id"], trial["variant_id"])
        groups.setdefault(key, []).append(trial)
    rows = []
    for (label, dataset, _), trials in sorted(groups.items()):
        outcome = Counter(
            statuses[trial["trial_id"]].status if trial["trial_id"] in statuses else "never run"
            for trial in trials
        )
        seeds = ", ".join(str(seed) for seed in sorted(trial["seed"] for trial in trials))
        settings = (trials[0]["config"].get("steps", ""), trials[0]["evaluation"]["episodes"])
        ended = ", ".join(f"{n} {name}" for name, n in sorted(outcome.items()))
        rows.append([label, dataset, seeds, *map(str, settings), ended])
    header = ["method", "dataset", "seeds", "steps", "episodes per evaluation", "outcome"]
    parts = [markdown_table(header, rows)]
    bad = [(i, run) for i, run in sorted(statuses.items()) if run.status != "done"]
    for trial_id, run in bad[:MOST_ERRORS]:
        reason = (run.error or "no reason was recorded").strip().splitlines()[-1]
        parts.append(f"- `{trial_id[:12]}` {run.status}: {reason}")
    if len(bad) > MOST_ERRORS:
        parts.append(f"- and {len(bad) - MOST_ERRORS} more")
    return parts


def _figures(paths: Iterable[Path], out: Path) -> list[str]:
    found = []
    for path in paths:
        where = path.relative_to(out).as_posix()
        shown = f"![{path.stem}]({where})" if path.suffix == ".png" else f"- [{where}]({where})"
        found.append(shown)
    return found


def _data(store: Store, ids: list[str]) -> str:
    known = {(row["dataset_id"], row["digest"]): row for row in _records(store.datasets())}
    used = {(row["dataset_id"], row["dataset_digest"]) for row in _records(store.trials(ids))}
    rows = [
        [
            dataset_id,
            known[dataset_id, digest]["relation"],
            f"{known[dataset_id, digest]['num_steps']:,}",
            f"{known[dataset_id, digest]['num_episodes']:,}",
            digest,
        ]
        for dataset_id, digest in sorted(used)
    ]
    return markdown_table(["dataset", "relation", "steps", "episodes", "sha256 of content"], rows)


def _provenance(store: Store, ids: list[str]) -> str:
    """Each recorded fact once, with the number of runs where they differ."""
    facts: dict[str, Counter[str]] = {}

    def note(name: str, value: Any) -> None:
        facts.setdefault(name, Counter())[str(value)] += 1

    for trial in _records(store.trials(ids)):
        note("algorithm", f"{trial['algorithm']}, revision {trial['revision']}")
        note("simulator", trial["simulator"])
        note("precision", trial["precision"])
    for run in _records(store.runs(ids)):
        note("commit", (run["git_commit"] or "unknown") + " with local changes" * run["git_dirty"])
        note("device", run["device"])
        note("training step", "compiled" if run["compiled"] else "eager")
        note("seeds trained together", ", ".join(map(str, run["stack"])))
        for name, version in run["versions"].items():
            note(name, version)
        for name in ("cpu", "cores", "gpu"):
            if name in run["hardware"]:
                note(name, run["hardware"][name])
    rows = [
        [name, "; ".join(v if len(counts) == 1 else f"{v} ({n})" for v, n in counts.items())]
        for name, counts in facts.items()
    ]
    return markdown_table(["what", "recorded value (number of trials or runs)"], rows)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return frame.to_dict("records")  # type: ignore[return-value]


def _again(request: Request, store: Store, ids: list[str]) -> list[str]:
    commits = sorted(set(store.runs(ids)["git_commit"]) - {""})
    where = f" (at commit {', '.join(commits)})" if commits else ""
    return [
        f"In this folder, with the harness installed{where}:",
        f"```bash\n{request.command}\n```",
        f"It trains only what the database does not have. [{SPEC}]({SPEC}):",
        f"```yaml\n{request.spec.strip()}\n```",
    ]
