"""Plots as SVG text, for pages and files alike: lines, points, bars and histograms. Needs nothing.

Drawn 400 units wide, so that at the width of a phone the text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

BLUE, LIGHT, RED, GREY = "#1b6ca8", "#7fb3d5", "#b9501b", "#5a6b7c"
COLORS = (
    BLUE, RED, LIGHT, "#3f8f5b", "#8a5bab", GREY, "#c79a2b", "#2b9c9c",
    "#d98cb3", "#6b4226", "#9bc53d", "#22223b", "#f4a259", "#5b5bd6", "#c1121f", "#a3b18a",
)  # fmt: skip
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 400.0, 46.0, 10.0, 8.0, 34.0
LINE = 15.0  # height of a row of text


@dataclass(frozen=True)
class Axis:
    """label; log: base 10, of positive values only; low, high: default those of the data."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None

    def scale(self, values: Sequence[float], start: float, end: float) -> Scale:
        """From data to the units between ``start`` and ``end``. Raises: ValueError for what the axis cannot show."""
        if not values or not all(map(math.isfinite, values)):
            raise ValueError(f"values of axis {self.label!r} are {list(values)[:8]}, expected finite numbers")
        low = min(values) if self.low is None else self.low
        high = max(values) if self.high is None else self.high
        if self.log and low <= 0:
            raise ValueError(f"values of logarithmic axis {self.label!r} go down to {low}, expected positive ones")
        if low == high:
            low, high = (low / 2, high * 2) if self.log else (low - 1, high + 1)
        return Scale(self.log, low, high, start, end)


@dataclass(frozen=True)
class Scale:
    """Where a value lies on a drawn axis."""

    log: bool
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        f = math.log10 if self.log else float
        return self.start + (self.end - self.start) * (f(value) - f(self.low)) / (f(self.high) - f(self.low))

    def ticks(self) -> list[float]:
        """A few round values within the axis."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            # Few decades need more marks than one each, many need fewer.
            steps = (1, 2, 5) if last - first <= 2 else (1,)
            decades = range(first, last + 1, max(1, (last - first) // 6))
            if round_ := [s * 10.0**e for e in decades for s in steps if self.low <= s * 10.0**e <= self.high]:
                return round_
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
        count = math.floor((self.high - math.ceil(self.low / step - 1e-9) * step) / step + 1e-9)
        return [(math.ceil(self.low / step - 1e-9) + i) * step for i in range(count + 1)]


@dataclass(frozen=True)
class Series:
    """Points (x, y) under a name: joined by a line, as dots, or both."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    dots: bool = True
    color: str | None = None


def number(value: float) -> str:
    return f"{value:.4g}"


def text(x: float, y: float, what: str, anchor: str = "middle", color: str = GREY, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{extra}>{escape(what)}</text>'


def segment(x1: float, y1: float, x2: float, y2: float, color: str = "#e3e9ee", dash: bool = False) -> str:
    style = ' stroke-dasharray="4 3"' if dash else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{style}/>'


def rectangle(x: float, y: float, width: float, height: float, color: str, note: str = "", opacity: float = 1) -> str:
    """``note`` is what a pointer resting on it shows."""
    inside = f"<title>{escape(note)}</title>" if note else ""
    look = f'fill="{color}"' + (f' fill-opacity="{opacity}"' if opacity < 1 else "")
    size = f'width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} {look}>{inside}</rect>'


@dataclass(frozen=True)
class Picture:
    """What is drawn on ``height`` units; ``label`` is what a reader hears who does not see it."""

    height: float
    label: str
    body: str

    def __str__(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {self.height:.0f}" role="img" '
            f'aria-label="{escape(self.label)}" font-family="system-ui, sans-serif" font-size="11">'
            f'<rect width="100%" height="100%" fill="#fff"/>{self.body}</svg>\n'
        )


def stack(pictures: Sequence[Picture], title: str = "") -> Picture:
    """Pictures below each other, under a title."""
    y = TOP + LINE if title else 0.0
    parts = [text(WIDTH / 2, LINE, title)] if title else []
    for picture in pictures:
        parts.append(f'<g transform="translate(0 {y:.0f})">{picture.body}</g>')
        y += math.ceil(picture.height)
    return Picture(y, "; ".join(filter(None, [title, *(p.label for p in pictures)])), "".join(parts))


def legend(names: Sequence[tuple[str, str]], y: float) -> tuple[list[str], float]:
    """Names with their colours in rows from ``y`` on, and the height that they take."""
    parts, x, top = [], LEFT, y
    for whole, color in names:
        name = whole if len(whole) <= 50 else f"{whole[:24]}…{whole[-25:]}"  # what fits into a row
        width = 18 + 6.2 * len(name)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, y = LEFT, y + LINE
        parts += [rectangle(x, y + 3, 9, 9, color), text(x + 13, y + 11, name, "start")]
        x += width
    return parts, y + LINE - top if names else 0.0


def _frame(x: Scale, y: Scale, x_axis: Axis, y_axis: Axis, ticks: Sequence[tuple[float, str]] | None) -> list[str]:
    parts = []
    for tick in y.ticks():
        parts += [segment(x.start, y(tick), x.end, y(tick)), text(x.start - 4, y(tick) + 4, number(tick), "end")]
    for at, name in [(t, number(t)) for t in x.ticks()] if ticks is None else ticks:
        parts += [segment(x(at), y.start, x(at), y.start + 3, GREY), text(x(at), y.start + 14, name)]
    middle = (y.start + y.end) / 2
    parts.append(text((x.start + x.end) / 2, y.start + 28, x_axis.label))
    parts.append(text(10, middle, y_axis.label, extra=f' transform="rotate(-90 10 {middle:.1f})"'))
    return parts


def plot(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    label: str,
    *,
    marks: Sequence[tuple[float, str]] = (),
    bands: Sequence[tuple[float, float, str]] = (),
    ticks: Sequence[tuple[float, str]] | None = None,
    height: float = 220.0,
) -> Picture:
    """Series over two axes.

    Args: marks: (x, name) of dashed vertical lines; bands: (from x, to x, name); ticks: (x, name) instead of numbers.
    Raises: ValueError without a point, or for values that an axis cannot show.
    """
    points = [p for s in series for p in s.points]
    colors = [s.color or COLORS[i % len(COLORS)] for i, s in enumerate(series)]
    parts, taken = legend([(s.name, c) for s, c in zip(series, colors) if s.name], TOP)
    top = TOP + taken + (LINE if bands else 6)
    across = x.scale([p[0] for p in points] + [m[0] for m in marks], LEFT, WIDTH - RIGHT)
    up = y.scale([p[1] for p in points], top + height, top)
    for i, (low, high, name) in enumerate(bands):
        parts.append(rectangle(across(low), top, across(high) - across(low), height, RED if i % 2 else LIGHT, "", 0.18))
        parts.append(text((across(low) + across(high)) / 2, top - 3, name))
    parts += _frame(across, up, x, y, ticks)
    for at, name in marks:
        parts += [segment(across(at), top, across(at), top + height, RED, dash=True)]
        parts.append(text(across(at) + 3, top + 10, name, "start", RED))
    for s, color in zip(series, colors):
        places = [(across(a), up(b)) for a, b in s.points]
        if s.line:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        if s.dots:
            # Thousands of points are megabytes: those that another one covers are left out.
            apart = {(round(a), round(b)): ((a, b), point) for (a, b), point in zip(places, s.points)}
            for (a, b), point in apart.values():
                note = f"{s.name} {number(point[0])}, {number(point[1])}".strip()
                circle = f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{color}">'
                parts.append(f"{circle}<title>{escape(note)}</title></circle>")
    return Picture(top + height + BOTTOM, label, "".join(parts))


def bars(rows: dict[str, Sequence[float | None]], names: Sequence[str], label: str, unit: str = "") -> Picture:
    """Horizontal bars with their values, one group per row: {row: a value per name, or None for no bar}."""
    parts, taken = legend([(name, COLORS[i]) for i, name in enumerate(names)], TOP)
    y = TOP + taken
    left = min(150.0, 8 + 6.2 * max(map(len, rows), default=0))
    values = [v for row in rows.values() for v in row if v is not None]
    scale = Axis(label, low=0.0).scale([*values, 0.0], left, WIDTH - 52)
    for name, row in rows.items():
        thick = 11.0 if len(row) == 1 else 8.0
        shown = name if len(name) <= 23 else "…" + name[-22:]
        parts.append(text(left - 4, y + thick * len(row) / 2 + 4, shown, "end"))
        for i, value in enumerate(row):
            if value is not None:
                written = number(value) + unit
                width = scale(value) - left
                parts.append(rectangle(left, y + i * thick, width, thick - 1, COLORS[i], f"{name}: {written}"))
                parts.append(text(left + width + 3, y + i * thick + 8.5, written, "start", extra=' font-size="9"'))
        y += thick * len(row) + 5
    return Picture(y + 4, label, "".join(parts))


def histogram(
    edges: Sequence[float],
    shares: dict[str, Sequence[float]],
    x: Axis,
    label: str,
    *,
    interval: tuple[float, float] | None = None,
    levels: Sequence[float] = (),
    height: float = 110.0,
) -> Picture:
    """Shares per bin as outlines over ``edges``; a shaded interval and the levels within it as ticks below."""
    parts, taken = legend([(name, COLORS[i]) for i, name in enumerate(shares)], TOP)
    top = TOP + taken + 6
    across = x.scale(edges, LEFT, WIDTH - RIGHT)
    up = Axis("share", low=0.0).scale([v for s in shares.values() for v in s], top + height, top)
    clip = lambda v: across(min(max(v, across.low), across.high))  # noqa: E731
    if interval is not None:
        low, high = map(clip, interval)
        parts.append(rectangle(low, top, high - low, height, LIGHT, f"{interval[0]:.4g} to {interval[1]:.4g}", 0.25))
    parts += _frame(across, up, x, Axis("share"), None)
    for i, values in enumerate(shares.values()):
        outline = [(edges[0], 0.0)]
        for a, b, v in zip(edges, edges[1:], values):
            outline += [(a, v), (b, v)]
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in [*outline, (edges[-1], 0.0)])
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[i]}" stroke-width="1.3"/>')
    parts += [segment(clip(v), top + height - 7, clip(v), top + height, RED) for v in levels if v >= across.low]
    return Picture(top + height + BOTTOM, label, "".join(parts))
