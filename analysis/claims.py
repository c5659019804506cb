"""Whether what an experiment set out to show does show: differences of methods, seed by seed.

An experiment file says its claims before it is run: `better` is above `than` by more than `margin`
points. What is judged are differences between runs of one seed, for such runs share more than the
seed's number (a teacher, a generator, a detector), and Student's t interval of their mean, the one
that covers at 3 to 10 seeds (docs/statistics.md):

    holds   the interval lies above the margin
    fails   the interval lies below it
    open    neither, or too few seeds; with how many seeds would settle it, if any number would.
            Also where a seed of either method has no score: what the others say is a selection

A negative margin claims "not worse by more than". Owns the verdicts, their table and figure.
"""

from __future__ import annotations

import itertools
import json as json_module
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from analysis import stats
from analysis.load import Scores, Task, load_scores
from analysis.plots import SERIES_COLOURS, figure_style, save_figure, write_caption
from analysis.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from results.store import Store

Verdict = Literal["holds", "fails", "open"]

CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 1000  # more are not counted
EVERYWHERE = "mean over tasks"
COLOURS = dict(
    zip(("holds", "fails", "open"), (SERIES_COLOURS[2], SERIES_COLOURS[3], "0.55"), strict=True)
)
HEADER = ("claim", "task", "seeds", "better", "than", "difference", "verdict", "remark")


class Claim(Protocol):
    """What an experiment file says (`harness.spec.Claim`)."""

    @property
    def text(self) -> str: ...
    @property
    def better(self) -> str: ...  # label of a method
    @property
    def than(self) -> str: ...
    @property
    def margin(self) -> float: ...  # points; returns where a task has no references
    @property
    def datasets(self) -> str: ...  # glob over dataset ids


@dataclass(frozen=True)
class Judgement:
    """A verdict on differences.

    Attributes:
        difference: mean over tasks of means over seeds, with its interval.
        remark: what the verdict rests on, where it does not speak for itself.
    """

    difference: stats.Estimate | None
    verdict: Verdict
    remark: str = ""


@dataclass(frozen=True)
class Finding:
    """One claim on one task, or on all of them.

    Attributes:
        task: its name, or `EVERYWHERE`.
        seeds: numbers of seeds of each task in `task` that have both scores.
        better, than: mean scores over these seeds; points, or returns of a task without references.
        unit: "points" or "return".
    """

    claim: Claim
    task: str
    seeds: tuple[int, ...]
    better: float | None
    than: float | None
    judgement: Judgement
    unit: str = "points"


@dataclass(frozen=True)
class Report:
    """Findings in the order of the claims."""

    findings: tuple[Finding, ...]
    select: str
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------- verdicts


def judge(
    differences: stats.ScoreLists, margin: float = 0.0, gaps: Sequence[str] = ()
) -> Judgement:
    """The verdict on "the mean difference is above the margin".

    Args:
        differences: one list for each task, a number for each seed.
        margin: in their unit.
        gaps: which scores are missing, in words. With any the verdict is open; what the seeds
            with scores say stays to be seen.
    """
    judgement = _judge_complete(differences, margin)
    if not gaps:
        return judgement
    said = judgement.remark
    if judgement.verdict != "open":
        said = f"{judgement.verdict} for the other seeds, which are a selection"
    return Judgement(judgement.difference, "open", "; ".join(filter(None, (*gaps, said))))


def _judge_complete(differences: stats.ScoreLists, margin: float) -> Judgement:
    fewest = min(map(len, differences), default=0)
    if fewest == 0:
        return Judgement(None, "open", "no seed has both scores")
    value = float(np.mean([np.mean(task) for task in differences]))
    if fewest < stats.MIN_SEEDS:
        remark = f"no interval with fewer than {stats.MIN_SEEDS} seeds"
        return Judgement(stats.Estimate(value, None, None), "open", remark)
    error, freedom = stats.mean_error(differences)
    half = error * stats.t_quantile((1 + CONFIDENCE) / 2, freedom)
    found = stats.Estimate(value, value - half, value + half)
    if value - half > margin:
        return Judgement(found, "holds")
    if value + half < margin:
        return Judgement(found, "fails")
    if error == 0:
        return Judgement(found, "open", "no seed differs from the margin")
    needed = seeds_for_power(value - margin, error, freedom, fewest)
    if needed is None:
        return Judgement(found, "open", f"more than {MOST_SEEDS} seeds would settle it")
    return Judgement(found, "open", f"about {needed} seeds would settle it")


def seeds_for_power(effect: float, error: float, freedom: float, seeds: int) -> int | None:
    """Fewest seeds at which a t test finds the effect, 80 times of 100; None above `MOST_SEEDS`.

    Args:
        effect: difference less margin, taken to be the true one.
        error, freedom: of the mean difference at `seeds` seeds; the spread is taken to stay.
    """
    for count in range(seeds + 1, MOST_SEEDS + 1):
        degrees = freedom * (count - 1) / (seeds - 1)
        if _power(effect / (error * (seeds / count) ** 0.5), degrees) >= POWER:
            return count
    return None


def _power(shift: float, freedom: float) -> float:
    """Chance that a t statistic of this mean lies beyond the two-sided quantile, on its side."""
    from scipy.special import nctdtr

    return 1.0 - float(nctdtr(freedom, abs(shift), stats.t_quantile((1 + CONFIDENCE) / 2, freedom)))


# --------------------------------------------------------------------------------------- report


def build(
    store: Store,
    claims: Iterable[Claim],
    trial_ids: Iterable[str] | None = None,
    select: str = "last",
) -> Report:
    """Every claim on every task that it is about; over all of them together where there are more.

    Args:
        trial_ids: of the experiment; None for all of the database, such as an archive.
        select: see `load.load_scores`.
    Raises:
        ValueError: if there is no claim, or the rule is unknown.
    """
    claims = list(claims)
    if not claims:
        raise ValueError(
            "the experiment claims nothing; add a block `claims:` with better, than and text"
        )
    scores = load_scores(store, trial_ids, select)
    findings: list[Finding] = []
    for claim in claims:
        findings += _findings(claim, scores)
    return Report(tuple(findings), select, scores.notes)


def _findings(claim: Claim, scores: Scores) -> list[Finding]:
    tasks = [task for task in scores.tasks if fnmatchcase(task.dataset_id, claim.datasets)]
    parts = {task.name: _pairs(claim, task, scores) for task in tasks}
    gaps = {task.name: _gaps(claim, task, scores) for task in tasks}
    found = [_finding(claim, task, *parts[task.name], gaps[task.name]) for task in tasks]
    common = [task.name for task in tasks if task.normalized]
    if len(common) > 1 and all(len(parts[name][0]) for name in common):
        better, than = ([float(np.mean(parts[name][side])) for name in common] for side in (0, 1))
        differences = [np.subtract(*parts[name]).tolist() for name in common]
        some = ["some seeds are missing, see above"] if any(gaps[name] for name in common) else []
        found.append(
            Finding(
                claim,
                EVERYWHERE,
                tuple(len(parts[name][0]) for name in common),
                float(np.mean(better)),
                float(np.mean(than)),
                judge(differences, claim.margin, some),
            )
        )
    return found


def _gaps(claim: Claim, task: Task, scores: Scores) -> list[str]:
    """What either method lacks on a task, in words."""
    return [
        f"{label}: {gap.removeprefix(f'{task.name}: ')}"
        for label in (claim.better, claim.than)
        for gap in scores.gaps(label, [task])
    ]


def _pairs(claim: Claim, task: Task, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Scores of both methods at the seeds that both have, in points if normalised: [n] each."""
    cells = [scores.cells.get((label, task.name)) for label in (claim.better, claim.than)]
    if None in cells:
        return np.zeros(0), np.zeros(0)
    better, than = (cell.scores for cell in cells if cell is not None)
    seeds = sorted(set(better) & set(than))
    scale = 100.0 if task.normalized else 1.0
    return (
        scale * np.array([better[seed] for seed in seeds]),
        scale * np.array([than[seed] for seed in seeds]),
    )


def _finding(
    claim: Claim, task: Task, better: np.ndarray, than: np.ndarray, gaps: Sequence[str]
) -> Finding:
    return Finding(
        claim,
        task.name,
        (len(better),),
        float(better.mean()) if len(better) else None,
        float(than.mean()) if len(than) else None,
        judge([(better - than).tolist()], claim.margin, gaps),
        "points" if task.normalized else "return",
    )


# ---------------------------------------------------------------------------------------- forms


def by_claim(findings: Iterable[Finding]) -> list[tuple[Claim, list[Finding]]]:
    """Each claim with its findings, which follow one another."""
    groups = (list(group) for _, group in itertools.groupby(findings, lambda f: id(f.claim)))
    return [(group[0].claim, group) for group in groups]


def tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    """Each claim in words, and its findings as rows of text under `HEADER[1:]`."""
    found = []
    for claim, findings in by_claim(report.findings):
        margin = f" by more than {claim.margin:g}" if claim.margin else ""
        text = f"{claim.text} ({claim.better} above {claim.than}{margin})"
        found.append((text, [_row(finding) for finding in findings]))
    return found


def _row(finding: Finding) -> list[str]:
    judged = finding.judgement
    return [
        finding.task + " (raw return)" * (finding.unit == "return"),
        "–".join(map(str, sorted({min(finding.seeds), max(finding.seeds)}))),
        _number(finding.better),
        _number(finding.than),
        "–" if judged.difference is None else judged.difference.text(1, sign="+"),
        judged.verdict,
        judged.remark,
    ]


def rows(report: Report) -> list[list[str]]:
    """A row of text for each finding, under `HEADER`; a claim is told once."""
    return [
        ["" if place else text, *row]
        for text, body in tables(report)
        for place, row in enumerate(body)
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def caption(report: Report) -> str:
    """How to read the table, in sentences."""
    count = sum(finding.judgement.difference is not None for finding in report.findings)
    return (
        f"Normalised scores x 100 ({report.select}). Differences are means over training seeds, "
        f"seed by seed, with {100 * CONFIDENCE:.0f} % t intervals. A claim holds where the "
        "interval lies above the margin (0 unless given), fails where it lies below; without a "
        "score for every seed it is open. The intervals are not corrected for their number "
        f"({count}): where nothing differs, one in forty holds by chance. Seeds to settle an open "
        f"one: a paired t test at {100 * POWER:.0f} % power if the difference is as large as it "
        "looks."
    )


def markdown(report: Report) -> str:
    """The table, the caption and the notes."""
    parts = ["## Claims", markdown_table(list(HEADER), rows(report)), caption(report)]
    parts.append("\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(filter(None, parts)) + "\n"


def records(report: Report) -> list[dict[str, Any]]:
    """Every finding as JSON values."""
    return [
        {
            "text": finding.claim.text,
            "better": finding.claim.better,
            "than": finding.claim.than,
            "margin": finding.claim.margin,
            "task": finding.task,
            "seeds": list(finding.seeds),
            "better_mean": finding.better,
            "than_mean": finding.than,
            "unit": finding.unit,
            "verdict": finding.judgement.verdict,
            "remark": finding.judgement.remark,
            "difference": None
            if finding.judgement.difference is None
            else vars(finding.judgement.difference),
        }
        for finding in report.findings
    ]


def json(report: Report) -> str:
    """Everything, with sorted keys."""
    content = {
        "select": report.select,
        "confidence": CONFIDENCE,
        "power": POWER,
        "caption": caption(report),
        "notes": list(report.notes),
        "findings": records(report),
    }
    return json_module.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def figure(report: Report) -> Figure | None:
    """A line for each finding in points: its interval beside zero and its margin; None without."""
    drawn = [
        finding
        for finding in report.findings
        if finding.unit == "points" and finding.judgement.difference is not None
    ]
    if not drawn:
        return None
    figure_style()
    import matplotlib.pyplot as plt

    groups = by_claim(drawn)
    lines = len(drawn) + len(groups)
    made, axis = plt.subplots(figsize=(6.4, 0.21 * lines + 1.1), layout="constrained")
    places: list[float] = []
    names: list[str] = []
    place = 0.0
    for claim, group in groups:
        place -= 1
        text = f"{claim.better} over {claim.than}"
        axis.text(0.01, place, text, transform=axis.get_yaxis_transform(), fontsize="x-small",
                  weight="bold", va="center")  # fmt: skip
        for finding in group:
            place -= 1
            _draw(axis, place, finding)
            places.append(place)
            names.append(finding.task)
        place -= 0.4
    axis.axvline(0.0, color="0.2", linewidth=0.8, zorder=1)
    axis.set_yticks(places, names, fontsize="x-small")
    axis.set_ylim(place, 0)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("difference of normalised scores x 100")
    handles = [
        plt.Line2D([], [], color=colour, marker="o", markersize=4, label=verdict)
        for verdict, colour in COLOURS.items()
        if verdict in {finding.judgement.verdict for finding in drawn}
    ]
    made.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    note = f"Means over seeds, seed by seed, with {100 * CONFIDENCE:.0f} % t intervals. "
    if any(finding.claim.margin for finding in drawn):
        note += "Dotted: a claim's margin, where it is not zero. "
    write_caption(made, textwrap.fill(note.strip(), 90))
    return made


def _draw(axis: Any, place: float, finding: Finding) -> None:
    found = finding.judgement.difference
    assert found is not None
    colour = COLOURS[finding.judgement.verdict]
    if found.low is not None and found.high is not None:
        axis.plot([found.low, found.high], [place, place], color=colour, linewidth=1.6, zorder=2)
    marker = "D" if finding.task == EVERYWHERE else "o"
    axis.plot([found.value], [place], marker=marker, markersize=4, color=colour, zorder=3)
    if finding.claim.margin:
        ends = [place - 0.4, place + 0.4]
        axis.plot([finding.claim.margin] * 2, ends, color="0.2", linestyle=":", linewidth=0.9)


def write(report: Report, out: Path) -> list[Path]:
    """Paths of the page, the numbers, and the figure with its source beside it."""
    out.mkdir(parents=True, exist_ok=True)
    texts: Mapping[str, str] = {"claims.md": markdown(report), "claims.json": json(report)}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    paths = [out / name for name in texts]
    source = {
        "query": f"claims of the experiment, selection {report.select}",
        "interval": "paired Student t over seeds",
        "findings": records(report),
    }
    made = figure(report)
    if made is None:
        return paths  # raw returns only: the table has them
    return [*paths, *save_figure(made, out / "claims_figure", source)]
