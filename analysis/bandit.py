"""The 2-D bandit of the Diffusion-QL paper (arXiv:2208.06193, Fig. 1 and 2), judged and drawn.

Reads what `harness actions` wrote for `experiments/bandit2d.yaml`. The paper has pictures and no
numbers, so what the pictures are said to show is put as claims with thresholds of our own. What is
judged is the distribution a policy was trained as: draws before they are moved into the bounds
(`unclamped_*`). A label that the paper does not have is measured, but not drawn.
"""

from __future__ import annotations

import hashlib
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import drawn
from analysis.plots import figure_style, save_figure, write_caption
from analysis.stats import MIN_SEEDS, Estimate, mean_interval
from analysis.tables import markdown_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# The environment has the same constants (a test compares them); analysis imports no harness.
CORNERS = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
REWARD_MEANS = np.array([3.0, 0.0, 1.5, 5.0])
REWARD_STD = 0.5
ACTION_STD = 0.05
BEST = 3  # the corner of the largest mean reward
SUPPORT_RADIUS = 0.15  # 3 standard deviations of the data; holds 98.9 % of them
BEST_RADIUS = 0.2  # a cluster may sit beside its corner, where Q extrapolates
MODE_SHARE = 0.05  # of the samples, for a corner to count as covered
FRESH_COUNT = 2000  # points of new data that samples are compared with
DISJOINT = "interval below"

REFERENCE = "Data"
PANELS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("bc_mle", "BC-MLE"),
        ("bc_cvae", "BC-CVAE"),
        ("bc_mmd", "BC-MMD"),
        ("bc_diffusion", "BC-Diffusion"),
    ),
    (
        ("q_gaussian", "TD3+BC"),
        ("bcq", "BCQ"),
        ("bear_mmd", "BEAR-MMD"),
        ("diffusion_ql_t50", "Diffusion-QL"),
    ),
    tuple((f"diffusion_ql_t{t}", f"T = {t}") for t in (2, 5, 10, 50)),
)
"""Label and title of the panels, row by row, beside the data."""

TITLES = {label: title for row in PANELS[:2] for label, title in row}
AXIS_LIMIT = 1.1
AXIS_LIMITS = {"bc_mle": 2.5}  # as in the official code: its blob leaves the box

METRICS = {
    **{f"corner_{c}": f"({x:+.1f}, {y:+.1f})" for c, (x, y) in enumerate(CORNERS)},
    "on_support": "on support",
    "off_support": "off support",
    "modes": "modes",
    "near_best": f"within {BEST_RADIUS:g} of best",
    "reward": "reward",
    "energy": "energy distance",
}
"""Measured quantity -> its heading."""


@dataclass(frozen=True)
class Claim:
    """What the figure is said to show, as an inequality over seeds."""

    text: str
    measured: str  # mean [low, high]
    threshold: str
    verdict: str  # holds, fails, undecided, too few seeds, not measured


@dataclass(frozen=True)
class Report:
    """Everything that is written about one file of actions."""

    frame: pd.DataFrame  # the actions
    numbers: pd.DataFrame  # one row per label and seed
    estimates: Mapping[str, Mapping[str, Estimate]]  # label -> metric -> mean over seeds
    claims: tuple[Claim, ...]
    file: str
    sha256: str
    seed: int  # of the bootstrap


def build(path: Path, seed: int = 0) -> Report:
    """The numbers and claims of a file of actions.

    Args:
        seed: of the bootstrap.
    Raises:
        ValueError: if the file does not hold two-dimensional actions of the bandit.
        FileNotFoundError: if there is no such file.
    """
    frame = load(path)
    numbers = measure(frame)
    estimates = {
        str(label): {name: mean_interval(part[name].tolist(), seed=seed) for name in METRICS}
        for label, part in numbers.groupby("label", sort=False)
    }
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Report(frame, numbers, estimates, check(estimates), path.name, digest, seed)


def load(path: Path) -> pd.DataFrame:
    """The table that `harness actions` wrote, in the order of the panels."""
    needed = ["trial_id", "label", "dataset_id", "seed", "draw", "unclamped_0", "unclamped_1"]
    frame = drawn.read(path, needed)
    others = sorted(set(frame.dataset_id[~frame.dataset_id.str.contains("bandit2d")]))
    if others or "unclamped_2" in frame:
        what = f"dataset {others[0]!r}" if others else "more than two action dimensions"
        raise ValueError(f"{path} has {what}; expected the 2-D bandit alone")
    if not np.isfinite(frame[["unclamped_0", "unclamped_1"]].to_numpy()).all():
        raise ValueError(f"{path} has actions that are not finite")
    trials = frame.groupby(["label", "seed"]).trial_id.nunique()
    if (trials > 1).any():
        label, seed = trials[trials > 1].index[0]
        raise ValueError(f"{path} has two trials of {label} seed {seed}; draw them apart")
    known = list(dict.fromkeys(label for row in PANELS for label, _ in row))
    if not frame.label.isin(known).any():
        raise ValueError(
            f"{path} has none of the figure's labels {', '.join(known)}, which "
            f"experiments/bandit2d.yaml gives; it has {', '.join(sorted(set(frame.label)))}"
        )
    rank = frame.label.map(lambda label: known.index(label) if label in known else len(known))
    order = frame.assign(_rank=rank).sort_values(["_rank", "label", "seed", "draw"], kind="stable")
    return order.drop(columns="_rank").reset_index(drop=True)


# ------------------------------------------------------------------------------------ numbers


def fresh_data(count: int = FRESH_COUNT, seed: int = 0) -> np.ndarray:
    """New actions of the data's distribution, corner by corner, [count, 2]."""
    corner = CORNERS[np.arange(count) * len(CORNERS) // count]
    noise = np.random.default_rng(seed).standard_normal((count, 2))
    return np.clip(corner + ACTION_STD * noise, -1.0, 1.0)


def measure(frame: pd.DataFrame) -> pd.DataFrame:
    """`METRICS` of every label and seed."""
    import pandas as pd

    fresh = fresh_data()
    fresh_spread = _mean_distance(fresh)
    rows = []
    for (label, seed), part in frame.groupby(["label", "seed"], sort=False):
        action = part[["unclamped_0", "unclamped_1"]].to_numpy(np.float64)
        rows.append({"label": label, "seed": seed, "samples": len(action), **shares(action)})
        rows[-1]["energy"] = energy_distance(action, fresh, fresh_spread)
    return pd.DataFrame(rows)


def shares(action: np.ndarray) -> dict[str, float]:
    """Where samples [N, 2] lie; the reward is the mean of the nearest corner."""
    distance = np.linalg.norm(action[:, None] - CORNERS, axis=-1)  # [N, 4]
    corner = (distance <= SUPPORT_RADIUS).mean(axis=0)
    return {
        **{f"corner_{c}": float(share) for c, share in enumerate(corner)},
        "on_support": float(corner.sum()),
        "off_support": float(1.0 - corner.sum()),
        "modes": float((corner >= MODE_SHARE).sum()),
        "near_best": float((distance[:, BEST] <= BEST_RADIUS).mean()),
        "reward": float(REWARD_MEANS[distance.argmin(axis=1)].mean()),
    }


def energy_distance(x: np.ndarray, y: np.ndarray, spread_y: float | None = None) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples [N, 2] and [M, 2], without bias.

    0 in expectation where both have one distribution, so that it may come out below 0.

    Args:
        spread_y: E|y - y'|, if known.
    """
    spread_y = _mean_distance(y) if spread_y is None else spread_y
    return 2.0 * float(_distances(x, y).mean()) - _mean_distance(x) - spread_y


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # As complex numbers the pairs need no third axis.
    return np.abs((x[:, 0] + 1j * x[:, 1])[:, None] - (y[:, 0] + 1j * y[:, 1]))


def _mean_distance(x: np.ndarray) -> float:
    """Between two different ones of the points."""
    return float(_distances(x, x).sum() / (len(x) * (len(x) - 1))) if len(x) > 1 else 0.0


# ------------------------------------------------------------------------------------- claims


def check(estimates: Mapping[str, Mapping[str, Estimate]]) -> tuple[Claim, ...]:
    """The claims of the figure. A bound holds if the whole interval is on its side."""
    claims = [_bound(estimates, "bc_diffusion", "on_support", 0.9)]
    claims += [_bound(estimates, "bc_diffusion", f"corner_{c}", 0.15, 0.35) for c in range(4)]
    for label in ("bc_mle", "bc_cvae", "bc_mmd"):
        claims.append(_lower(estimates, label, "bc_diffusion", "on_support"))
    claims.append(_bound(estimates, "diffusion_ql_t50", f"corner_{BEST}", 0.9))
    claims.append(_bound(estimates, "diffusion_ql_t50", "near_best", 0.9))
    claims.append(_bound(estimates, "diffusion_ql_t50", "reward", 4.5))
    for label in ("q_gaussian", "bcq", "bear_mmd"):
        claims.append(_lower(estimates, label, "diffusion_ql_t50", "near_best"))
    return tuple(claims)


def _name(label: str) -> str:
    return TITLES.get(label, label)


def _what(metric: str) -> str:
    if metric.startswith("corner_"):
        return f"share within {SUPPORT_RADIUS:g} of {METRICS[metric]}"
    share = {"on_support": f"share within {SUPPORT_RADIUS:g} of a corner"}
    return share.get(metric, METRICS[metric])


def _bound(
    estimates: Mapping[str, Mapping[str, Estimate]],
    label: str,
    metric: str,
    least: float,
    most: float = math.inf,
) -> Claim:
    threshold = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
    text = f"{_name(label)}: {_what(metric)}"
    if label not in estimates:
        return Claim(text, "", threshold, "not measured")
    found = estimates[label][metric]
    if found.low is None or found.high is None:
        verdict = "too few seeds"
    elif least <= found.low and found.high <= most:
        verdict = "holds"
    elif found.high < least or found.low > most:
        verdict = "fails"
    else:
        verdict = "undecided"
    return Claim(text, found.text(), threshold, verdict)


def _lower(
    estimates: Mapping[str, Mapping[str, Estimate]], label: str, than: str, metric: str
) -> Claim:
    text = f"{_name(label)} is below {_name(than)}: {_what(metric)}"
    if label not in estimates or than not in estimates:
        return Claim(text, "", DISJOINT, "not measured")
    low, high = estimates[label][metric], estimates[than][metric]
    measured = f"{low.text()} against {high.text()}"
    if low.low is None or low.high is None or high.low is None or high.high is None:
        return Claim(text, measured, DISJOINT, "too few seeds")
    if low.high < high.low:
        return Claim(text, measured, DISJOINT, "holds")
    return Claim(text, measured, DISJOINT, "fails" if low.low > high.high else "undecided")


def markdown(report: Report) -> str:
    """Numbers and claims as a page."""
    samples = sorted(set(report.numbers.samples))
    seeds = sorted(report.numbers.groupby("label").seed.nunique().unique())
    header = ["policy", "seeds", *METRICS.values()]
    rows = [
        [
            _name(label) if label in TITLES else label,
            str(int((report.numbers.label == label).sum())),
            *(row[metric].text() for metric in METRICS),
        ]
        for label, row in report.estimates.items()
    ]
    claims = [[c.text, c.measured, c.threshold, c.verdict] for c in report.claims]
    text = (
        f"Mean over seeds ({_range(seeds)} of them, {_range(samples)} samples each) with its 95 % "
        f"bootstrap interval over seeds (none below {MIN_SEEDS} seeds). Corners: share of samples "
        f"within {SUPPORT_RADIUS:g}; off support: outside of all four. Modes: corners with at "
        f"least {100 * MODE_SHARE:g} % of the samples. Reward: mean of the nearest corner, also "
        "off support; the data's is 2.375. Energy distance: to fresh data, 0 for the data. The "
        "data themselves are 0.247 at each corner and 0.989 on support. Samples are taken before "
        "they are moved into the bounds. The BCQ panel shows plain samples of its VAE, as the "
        "paper's code does."
    )
    parts = [
        "# The 2-D bandit of Diffusion-QL",
        textwrap.fill(text, 100),
        markdown_table(header, rows),
        "## Claims",
        "Thresholds are ours: the paper shows pictures. A claim holds if the whole interval does.",
        markdown_table(["claim", "measured", "threshold", "verdict"], claims),
        f"From `{report.file}` (sha256 {report.sha256[:16]}...), bootstrap seed {report.seed}.",
    ]
    return "\n\n".join(parts) + "\n"


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


# ------------------------------------------------------------------------------------- figure


def figure(report: Report) -> Figure:
    """The paper's two rows of panels, and Diffusion-QL by denoising steps below them."""
    figure_style()
    import matplotlib.pyplot as plt

    columns = 1 + max(len(row) for row in PANELS)
    grid, axes = plt.subplots(
        len(PANELS),
        columns,
        figsize=(2.3 * columns, 2.65 * len(PANELS) + 0.5),
        layout="constrained",
    )
    _draw_data(axes[0, 0], REFERENCE, rewards=False)
    _draw_data(axes[1, 0], f"{REFERENCE} and reward", rewards=True)
    axes[2, 0].axis("off")
    axes[2, 0].text(0.5, 0.5, "Diffusion-QL\nby denoising steps", ha="center", va="center")
    for row, panels in zip(axes, PANELS, strict=True):
        for axis, (label, title) in zip(row[1:], panels, strict=True):
            _draw_panel(axis, report, label, title)
    note = (
        f"One seed per panel (the first), with circles of {SUPPORT_RADIUS:g} around the corners; "
        "dashed: the bounds of actions. Below titles, means over seeds: share of samples on "
        f"support (within {SUPPORT_RADIUS:g} of a corner) and within {BEST_RADIUS:g} of the best "
        "one. BC-MLE has wider axes."
    )
    write_caption(grid, textwrap.fill(note, 30 * columns))
    return grid


def _axes(axis: Any, title: str, limit: float) -> None:
    from matplotlib.patches import Circle, Rectangle

    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axis.set_title(title, fontsize="small")
    axis.add_patch(Rectangle((-1, -1), 2, 2, fill=False, ls="--", lw=0.6, color="0.6", zorder=1))
    for corner in CORNERS:
        style = {"fill": False, "lw": 0.8, "color": "0.25", "zorder": 3}
        axis.add_patch(Circle(tuple(corner), SUPPORT_RADIUS, **style))
    ticks = [-1, 0, 1] if limit < 2 else [-2, -1, 0, 1, 2]
    axis.set(xticks=ticks, yticks=ticks)
    axis.tick_params(labelsize="x-small", length=2)


def _draw_data(axis: Any, title: str, rewards: bool) -> None:
    import seaborn as sns

    _axes(axis, title + "\n", AXIS_LIMIT)
    points = fresh_data(1000).reshape(len(CORNERS), -1, 2)
    colours = sns.color_palette("colorblind", len(CORNERS))
    for cloud, corner, mean, colour in zip(points, CORNERS, REWARD_MEANS, colours, strict=True):
        shown = colour if rewards else "0.35"
        axis.scatter(*cloud.T, s=3, alpha=0.4, linewidths=0, color=shown, zorder=2)
        if rewards:
            place = (0.5 * corner[0], corner[1] - math.copysign(0.32, corner[1]))
            text = f"N({mean:g}, {REWARD_STD:g}²)"
            axis.annotate(text, place, ha="center", va="center", fontsize="xx-small", color=colour)


def _draw_panel(axis: Any, report: Report, label: str, title: str) -> None:
    limit = AXIS_LIMITS.get(label, AXIS_LIMIT)
    if label not in report.estimates:
        _axes(axis, f"{title}\n", limit)
        axis.text(0, 0, "not in the file", ha="center", va="center", fontsize="x-small")
        return
    means = report.estimates[label]
    below = f"{means['on_support'].value:.2f} on support, {means['near_best'].value:.2f} best"
    _axes(axis, f"{title}\n", limit)
    axis.text(0.5, 1.02, below, transform=axis.transAxes, ha="center", fontsize="xx-small")
    points = _first_seed(report.frame, label)[["unclamped_0", "unclamped_1"]].to_numpy()
    axis.scatter(*points.T, s=3, alpha=0.4, linewidths=0, color="#c44e52", zorder=2)
    outside = int((np.abs(points) > limit).any(axis=1).sum())
    if outside:
        text = f"{outside} of {len(points)} outside of these axes"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        place = {"transform": axis.transAxes, "ha": "center", "zorder": 4, "bbox": box}
        axis.text(0.5, 0.03, text, fontsize="xx-small", **place)


def _first_seed(frame: pd.DataFrame, label: str) -> pd.DataFrame:
    part = frame[frame.label == label]
    return part[part.seed == part.seed.min()]


def _source(report: Report) -> dict[str, Any]:
    shown = [label for label in report.estimates if any(label in dict(row) for row in PANELS)]
    return {
        "query": f"actions in {report.file}, sha256 {report.sha256}",
        "interval": f"none drawn; the report has bootstrap intervals, seed {report.seed}",
        "panels": [
            {
                "label": label,
                "seed": int(_first_seed(report.frame, label).seed.iloc[0]),
                "trial_id": str(_first_seed(report.frame, label).trial_id.iloc[0]),
                "seeds": sorted(
                    int(s) for s in set(report.frame[report.frame.label == label].seed)
                ),
            }
            for label in shown
        ],
        "not_drawn": [label for label in report.estimates if label not in shown],
        "missing": sorted({label for row in PANELS for label, _ in row} - set(report.estimates)),
    }


def write(report: Report, out: Path) -> list[Path]:
    """Paths of the page, the numbers of each seed, and the figure with its source beside it."""
    out.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path], Any]] = {
        "bandit.md": lambda path: path.write_text(markdown(report), encoding="utf-8"),
        "bandit.csv": lambda path: report.numbers.to_csv(path, index=False, lineterminator="\n"),
    }
    for name, writer in writers.items():
        writer(out / name)
    return [
        *(out / name for name in writers),
        *save_figure(figure(report), out / "bandit", _source(report)),
    ]
