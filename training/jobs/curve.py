"""The losses of a job as a picture: in a terminal, and as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import fmean

from .losses import Loss

EIGHTHS = " ▁▂▃▄▅▆▇█"
COLOURS = ("#2f81d6", "#d9730d", "#2e9e5b", "#a05fd0")
GREY = "#7a7a7a"
"""Each of these can be read on white and on black."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 70, 24, 44, 56
TICKS = 6
Points = list[tuple[int, float]]


def by_stage(losses: Sequence[Loss]) -> dict[str, Points]:
    """The (step, loss) of each stage, without losses that were no numbers."""
    stages: dict[str, Points] = {}
    for one in losses:
        if one.loss is not None:
            stages.setdefault(one.stage, []).append((one.step, one.loss))
    return stages


def plot(losses: Sequence[Loss], *, width: int = 60, height: int = 6) -> str:
    """A few lines of text for each stage: the mean loss of each column's steps, with the range on the left."""
    return "\n\n".join(_plot(stage, points, width, height) for stage, points in by_stage(losses).items())


def _plot(stage: str, points: Points, width: int, height: int) -> str:
    columns = _columns(points, width)
    low, high = min(columns), max(columns)
    reach = (high - low) or 1.0
    levels = [1 + round((value - low) / reach * (8 * height - 1)) for value in columns]
    lines = []
    for row in reversed(range(height)):
        label = {height - 1: f"{high:.3g}", 0: f"{low:.3g}"}.get(row, "")
        lines.append(f"{label:>9} │{''.join(EIGHTHS[min(8, max(0, level - 8 * row))] for level in levels)}")
    first, last = str(points[0][0]), str(points[-1][0])
    lines.append(f"{'':>9} └{'─' * len(columns)}")
    lines.append(f"{'':>11}{first}{last:>{max(len(last) + 1, len(columns) - len(first))}}")
    return "\n".join([f"loss by step, {stage}", *lines])


def _columns(points: Points, width: int) -> list[float]:
    """At most `width` means of neighbouring losses; a column without a loss has that of the one before."""
    first, last = points[0][0], points[-1][0]
    width = min(width, last - first + 1)
    heard: list[list[float]] = [[] for _ in range(width)]
    for step, loss in points:
        heard[(step - first) * width // (last - first + 1)].append(loss)
    columns: list[float] = []
    for values in heard:
        columns.append(fmean(values) if values else columns[-1])
    return columns


def svg(losses: Sequence[Loss], title: str) -> str:
    """A line for each stage, with axes; on a transparent ground, in colours that go with a light and with a dark page."""
    stages = by_stage(losses)
    steps = [step for points in stages.values() for step, _ in points] or [0, 1]
    values = [value for points in stages.values() for _, value in points] or [0.0, 1.0]
    across = _Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    up = _Scale(min(values), max(values), HEIGHT - BOTTOM, TOP)
    label = f"{escape(title)}: loss by step"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"'
        f' font-family="sans-serif" font-size="13" fill="{GREY}">',
        f"<title>{label}</title>",
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GREY}" stroke-opacity=".3"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in across.ticks():
        x = across.at(tick)
        parts.append(f'<path d="M{x:.1f} {HEIGHT - BOTTOM}v5" stroke="{GREY}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="{GREY}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">step</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 18 {middle})"'
    parts.append(f'<text x="18" y="{middle}" text-anchor="middle" {turned}>loss (nats a token)</text>')
    for number, (stage, points) in enumerate(stages.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across.at(step):.1f},{up.at(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(points) == 1:
            step, value = points[0]
            place = f'cx="{across.at(step):.1f}" cy="{up.at(value):.1f}"'
            parts.append(f'<circle {place} r="3" fill="{colour}"/>')
        y_legend = TOP + 16 * (number + 1)
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{y_legend}" text-anchor="end" fill="{colour}">{escape(stage)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    """From values between `low` and `high` to places on the picture between `start` and `end`."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        room = 0.0 if high > low else abs(high) / 2 or 1.0
        self._low, self._high = low - room, high + room
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round values in between: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self._high - self._low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self._low / step), math.floor(self._high / step)
        return [number * step for number in range(first, last + 1)]
