"""VDD's 2-D ring of eight Gaussians (arXiv:2406.12538), judged and drawn: teacher and students.

Reads what `harness actions` wrote for `experiments/vdd_ring.yaml`. Judged are draws before they are
moved into the bounds. Where the file has the policy's own log density, the reverse KL divergence to
the ring is their mean difference over the policy's draws.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Mapping
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
ANGLES = np.arange(8) * np.pi / 4
CENTRES = 2.0 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
STD = 0.5
AXIS_LIMIT = 4.0
COLUMNS = 4

METRICS = {
    "reverse_kl": "reverse KL [nats]",
    "modes": "modes covered",
    "mode_entropy": "entropy over modes",
    "on_support": "within 2 std of a mode",
}
"""Measured quantity -> its heading."""


@dataclass(frozen=True)
class Report:
    """Everything that is written about one file of actions."""

    frame: pd.DataFrame
    numbers: pd.DataFrame  # one row per label and seed
    estimates: Mapping[str, Mapping[str, Estimate | None]]  # label -> metric -> mean over seeds
    file: str
    sha256: str
    seed: int  # of the bootstrap


def log_density(point: np.ndarray) -> np.ndarray:
    """log p of the ring at points [N, 2]."""
    squared = ((point[:, None] - CENTRES) ** 2).sum(axis=-1) / STD**2
    return np.logaddexp.reduce(-0.5 * squared, axis=1) - np.log(len(CENTRES) * 2 * np.pi * STD**2)


def shares(point: np.ndarray) -> dict[str, float]:
    """How points [N, 2] lie on the modes.

    A mode is covered if at least half of its share, 1 / 16 of the points, lie within two standard
    deviations of it. The entropy is of the nearest mode, 1 where all are equally likely.
    """
    distance = np.linalg.norm(point[:, None] - CENTRES, axis=-1)  # [N, 8]
    near = distance <= 2 * STD
    part = np.bincount(distance.argmin(axis=1), minlength=len(CENTRES)) / len(point)
    present = part[part > 0]
    entropy = abs(float(-(present * np.log(present)).sum() / np.log(len(CENTRES))))
    return {
        "modes": float((near.mean(axis=0) >= 0.5 / len(CENTRES)).sum()),
        "mode_entropy": entropy,
        "on_support": float(near.any(axis=1).mean()),
    }


def build(path: Path, seed: int = 0) -> Report:
    """The numbers of a file of actions.

    Args:
        seed: of the bootstrap.
    Raises:
        ValueError: if the file does not hold actions of the ring.
        FileNotFoundError: if there is no such file.
    """
    import pandas as pd

    needed = ("label", "dataset_id", "seed", "draw", "unclamped_0", "unclamped_1")
    frame = drawn.read(path, needed)
    others = sorted(set(frame.dataset_id[~frame.dataset_id.str.contains("ring2d")]))
    if others:
        raise ValueError(f"{path} has dataset {others[0]!r}; expected the 2-D ring alone")
    rows = []
    for (label, of), part in frame.groupby(["label", "seed"], sort=False):
        point = part[["unclamped_0", "unclamped_1"]].to_numpy(np.float64)
        row: dict[str, Any] = {"label": label, "seed": of, "samples": len(part), **shares(point)}
        own = part.log_density.to_numpy() if "log_density" in part else np.full(len(part), np.nan)
        row["reverse_kl"] = float((own - log_density(point)).mean())
        rows.append(row)
    numbers = pd.DataFrame(rows)
    estimates = {
        str(label): {
            name: None if part[name].isna().any() else mean_interval(part[name].tolist(), seed=seed)
            for name in METRICS
        }
        for label, part in numbers.groupby("label", sort=False)
    }
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Report(frame, numbers, estimates, path.name, digest, seed)


def _shown(estimate: Estimate | None) -> str:
    return "no density" if estimate is None else estimate.text()


def rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: means over seeds, and the worst seed."""
    body = []
    for label, row in report.estimates.items():
        own = report.numbers[report.numbers.label == label]
        worst = [f"{own.reverse_kl.max():.3f}" if row["reverse_kl"] else "no density"]
        worst.append(f"{own.modes.min():.0f}")
        body.append([label, str(len(own)), *map(_shown, row.values()), *worst])
    return ["policy", "seeds", *METRICS.values(), "largest KL", "fewest modes"], body


def markdown(report: Report) -> str:
    """The numbers as a page."""
    note = (
        f"Mean over seeds with its 95 % bootstrap interval over seeds (none below {MIN_SEEDS} "
        f"seeds), {report.numbers.samples.min()} draws each. Reverse KL: the policy's log density "
        "minus the ring's, over the policy's draws. A mode is covered if it has half of its share "
        "of the draws within two standard deviations; the ring itself has 0.14 of its mass farther "
        "than that from the centre it was drawn at."
    )
    parts = [
        "# The ring of eight modes",
        textwrap.fill(note, 100),
        markdown_table(*rows(report)),
        f"From `{report.file}` (sha256 {report.sha256[:16]}...), bootstrap seed {report.seed}.",
    ]
    return "\n\n".join(parts) + "\n"


def figure(report: Report) -> Figure:
    """Draws of one seed of each policy beside the ring's own."""
    figure_style()
    import matplotlib.pyplot as plt

    labels = list(report.estimates)
    height = -(-(len(labels) + 1) // COLUMNS)
    grid, axes = plt.subplots(
        height, COLUMNS, figsize=(2.4 * COLUMNS, 2.7 * height + 0.4), layout="constrained"
    )
    panels = axes.flatten()
    rng = np.random.default_rng(report.seed)
    count = int(report.numbers.samples.min())
    own = CENTRES[rng.integers(len(CENTRES), size=count)]
    _draw(panels[0], own + STD * rng.standard_normal((count, 2)), "the ring", "0.35")
    for axis, label in zip(panels[1:], labels, strict=False):
        part = report.frame[report.frame.label == label]
        part = part[part.seed == part.seed.min()]
        found = report.estimates[label]
        divergence = f", KL {found['reverse_kl'].value:.3f}" if found["reverse_kl"] else ""
        assert found["modes"] is not None
        title = f"{label}\n{found['modes'].value:.1f} modes{divergence}"
        _draw(axis, part[["unclamped_0", "unclamped_1"]].to_numpy(), title, "#c44e52")
    for axis in panels[1 + len(labels) :]:
        axis.axis("off")
    note = (
        "Draws of the first seed of each policy, with circles of one and two standard deviations "
        "around the modes. Titles: means over seeds of covered modes and of the reverse KL "
        "divergence to the ring, where the policy has a density."
    )
    write_caption(grid, textwrap.fill(note, 30 * COLUMNS))
    return grid


def _draw(axis: Any, points: np.ndarray, title: str, colour: str) -> None:
    from matplotlib.patches import Circle

    for centre in CENTRES:
        for radius in (STD, 2 * STD):
            place = (float(centre[0]), float(centre[1]))
            axis.add_patch(Circle(place, radius, fill=False, lw=0.5, color="0.3", zorder=3))
    axis.scatter(*points.T, s=2, alpha=0.35, linewidths=0, color=colour, zorder=2)
    axis.set(xlim=(-AXIS_LIMIT, AXIS_LIMIT), ylim=(-AXIS_LIMIT, AXIS_LIMIT), aspect="equal")
    axis.set_title(title, fontsize="small")
    axis.tick_params(labelsize="x-small", length=2)


def write(report: Report, out: Path) -> list[Path]:
    """Paths of the page, the numbers of each seed, and the figure with its source beside it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "ring.md").write_text(markdown(report), encoding="utf-8")
    report.numbers.to_csv(out / "ring.csv", index=False, lineterminator="\n")
    source = {
        "query": f"actions in {report.file}, sha256 {report.sha256}",
        "interval": f"none drawn; the page has bootstrap intervals, seed {report.seed}",
        "seeds": {
            str(label): sorted(int(s) for s in part.seed)
            for label, part in report.numbers.groupby("label", sort=False)
        },
    }
    return [out / "ring.md", out / "ring.csv", *save_figure(figure(report), out / "ring", source)]
