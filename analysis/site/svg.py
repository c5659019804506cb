"""Small drawings of the pages as inline SVG: interval bars and learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from analysis.plots import DASHES, SERIES_COLOURS, step_label

BAR = (120, 16)
CURVES = (640, 260)
MARGIN = (56, 14, 16, 40)  # left, right, top, bottom


@dataclass(frozen=True)
class Line:
    """One series of a chart.

    Attributes:
        bounds: lower and upper ends of an interval at each step.
        thin: further lines in the same colour, such as the seeds.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    bounds: tuple[Sequence[float], Sequence[float]] | None = None
    thin: Sequence[Sequence[tuple[int, float]]] = field(default=())


def interval_bar(
    value: float, low: float | None, high: float | None, span: tuple[float, float]
) -> Markup:
    """A tick at the value on a bar from low to high; the drawing's width stands for the span."""
    width, height = BAR
    start, end = span
    reach = (end - start) or 1.0

    def x(number: float) -> float:
        return 4 + (width - 8) * (number - start) / reach

    parts = [f'<line class="axis" x1="4" x2="{width - 4}" y1="{height / 2}" y2="{height / 2}"/>']
    if low is not None and high is not None:
        wide = max(x(high) - x(low), 1.0)
        parts.append(
            f'<rect class="band" x="{x(low):.1f}" y="3" width="{wide:.1f}" height="{height - 6}"/>'
        )
    at = f"{x(value):.1f}"
    parts.append(f'<line class="tick" x1="{at}" x2="{at}" y1="1" y2="{height - 1}"/>')
    # The numbers stand beside the drawing, so that a screen reader need not hear it.
    return Markup(
        f'<svg class="bar" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'aria-hidden="true">{"".join(parts)}</svg>'
    )


def curves(lines: Sequence[Line], label: str, unit: str) -> Markup:
    """Lines over gradient steps with axes and a legend; colours repeat after eight, then dashed.

    Args:
        label: what is drawn, for readers who cannot see it.
        unit: of the y-axis.
    """
    width, height = CURVES
    left, right, top, bottom = MARGIN
    values = [
        number
        for line in lines
        for part in (line.values, *(line.bounds or ()), *([v for _, v in t] for t in line.thin))
        for number in part
        if math.isfinite(number)
    ]
    last = max((step for line in lines for step in _steps(line)), default=0)
    if not values or not last:
        return Markup("")
    ticks = nice_ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    reach = (high - low) or 1.0

    def x(step: float) -> float:
        return left + (width - left - right) * step / last

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / reach

    def points(pairs: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in pairs if math.isfinite(b))

    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text x="{left - 6}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:g}</text>'
        )
    for step in nice_ticks(0, last):
        if step <= last:
            parts.append(
                f'<text x="{x(step):.1f}" y="{height - bottom + 16}" text-anchor="middle">'
                f"{step_label(step)}</text>"
            )
    middle = (left + width - right) / 2
    parts.append(
        f'<text x="{middle}" y="{height - 6}" text-anchor="middle">gradient steps</text>'
        f'<text transform="translate(12 {(top + height - bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(unit)}</text>'
    )
    for place, line in enumerate(lines):
        colour = SERIES_COLOURS[place % len(SERIES_COLOURS)]
        dash = DASHES[place // len(SERIES_COLOURS) % len(DASHES)]
        if line.bounds:
            outline = [*zip(line.steps, line.bounds[1], strict=True)]
            outline += reversed([*zip(line.steps, line.bounds[0], strict=True)])
            parts.append(f'<polygon fill="{colour}" opacity="0.2" points="{points(outline)}"/>')
        for thin in line.thin:
            parts.append(
                f'<polyline class="thin" stroke="{colour}" points="{points(list(thin))}"/>'
            )
        pairs = list(zip(line.steps, line.values, strict=True))
        style = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline class="line" stroke="{colour}"{style} points="{points(pairs)}"/>')
        if len(pairs) <= 10:
            parts += [
                f'<circle fill="{colour}" r="2.5" cx="{x(a):.1f}" cy="{y(b):.1f}"/>'
                for a, b in pairs
                if math.isfinite(b)
            ]
    return Markup(
        f'<svg class="curves" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def swatch(place: int) -> Markup:
    """The legend's sample of a chart's line."""
    colour = SERIES_COLOURS[place % len(SERIES_COLOURS)]
    dash = DASHES[place // len(SERIES_COLOURS) % len(DASHES)]
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">'
        f'<line x1="0" x2="28" y1="4" y2="4" stroke="{colour}" stroke-width="2.5"{style}/></svg>'
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover the range."""
    reach = high - low
    if reach <= 0:
        return [low]
    raw = reach / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * place, 12) for place in range(first, last + 1)]


def _steps(line: Line) -> list[int]:
    return [*line.steps, *(step for thin in line.thin for step, _ in thin)]
