"""Lines, bars and histograms by matplotlib, imported when something is drawn: inline SVG for a phone's width, PNG."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, LIGHT, RED, GREY = "#1b6ca8", "#7fb3d5", "#b9501b", "#5a6b7c"
COLORS = (
    BLUE, RED, LIGHT, "#3f8f5b", "#8a5bab", GREY, "#c79a2b", "#2b9c9c",
    "#d98cb3", "#6b4226", "#9bc53d", "#22223b", "#f4a259", "#5b5bd6", "#c1121f", "#a3b18a",
)  # fmt: skip
STYLE = {
    "font.size": 8, "legend.fontsize": 7, "legend.frameon": False, "lines.markersize": 3, "lines.linewidth": 1.2,
    "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": f"cycler(color={list(COLORS)})",
    "text.parse_math": False, "svg.fonttype": "none",
}  # fmt: skip
WIDTH = 4.0  # inches, like every height here
MARKS = 2000  # more points than this become one image within the SVG: an element each would be megabytes
NEEDED = "pictures need matplotlib: pip install 'vitq-kernels[report]'"


@dataclass(frozen=True)
class Axis:
    """label; log: base 10, of positive values only; low, high: default those of the data."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None

    def apply(self, axes: Axes, which: str, values: Sequence[float]) -> None:
        """Make ``which``, x or y, of ``axes`` this one. Raises: ValueError for values that it cannot show."""
        if not len(values) or not all(map(math.isfinite, values)):
            raise ValueError(f"values of axis {self.label!r} are {list(values)[:8]}, expected finite numbers")
        if self.log and min(values) <= 0:
            raise ValueError(
                f"values of logarithmic axis {self.label!r} go down to {min(values)}, expected positive ones"
            )
        axes.set(**{f"{which}scale": "log" if self.log else "linear", f"{which}label": self.label})
        axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
        if self.log:  # few decades need more marks than one each
            axis.get_major_locator().set_params(
                subs=(1, 2, 5) if max(values) <= 100 * min(values) else (1,), numticks=7
            )
            axis.minorticks_off()
        axis.set_major_formatter("{x:.4g}")
        axes.set(**{f"{which}lim": (self.low, self.high)})


@dataclass(frozen=True)
class Series:
    """Points (x, y) under a name: joined by a line, as dots, or both."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    dots: bool = True
    color: str | None = None


@dataclass(frozen=True)
class Picture:
    """Panels below each other: (height, title, what draws it). ``label`` is for readers who do not see them."""

    label: str
    panels: tuple[tuple[float, str, Callable[[Axes], None]], ...] = field(repr=False)

    def save(self, target: Path | io.StringIO, **options: object) -> Figure:
        """Draw and write, with the arguments of ``Figure.savefig``. Raises: ImportError without matplotlib."""
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(NEEDED) from error
        heights = [height for height, _, _ in self.panels]
        with rc_context({**STYLE, "svg.hashsalt": self.label}):
            whole = Figure(figsize=(WIDTH, sum(heights)), dpi=200, layout="constrained")
            parts = whole.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
            for (_, title, draw), part in zip(self.panels, parts.flat):
                draw(part.subplots())
                part.suptitle(title)
                names = part.axes[0].get_legend_handles_labels()[1]
                if names:
                    part.legend(loc="outside lower center", ncols=_columns(names))
            whole.savefig(target, **options)
        return whole

    def png(self, path: Path) -> None:
        self.save(path, format="png")

    def svg(self) -> str:
        """An ``svg`` element, the same for the same picture; its ids start with a digest of the label."""
        buffer = io.StringIO()
        self.save(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        root = re.search(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', buffer.getvalue())
        own = "p" + hashlib.sha256(self.label.encode()).hexdigest()[:8]
        inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", buffer.getvalue()[root.end() :])
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} {root[1]} role="img" aria-label="{escape(self.label)}">{inside}'


def _columns(names: Sequence[str]) -> int:
    return 3 if max(map(len, names), default=0) < 18 else 1


def _picture(label: str, height: float, names: Sequence[str], draw: Callable[[Axes], None]) -> Picture:
    return Picture(label, ((height + 0.15 * math.ceil(len(names) / _columns(names)), "", draw),))


def stack(pictures: Sequence[Picture], title: str = "") -> Picture:
    """Pictures below each other, under a title."""
    (height, own, draw), *others = (panel for picture in pictures for panel in picture.panels)
    label = "; ".join(filter(None, [title, *(picture.label for picture in pictures)]))
    return Picture(label, ((height + 0.2 * bool(title), "\n".join(filter(None, [title, own])), draw), *others))


def plot(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    label: str,
    *,
    marks: Sequence[tuple[float, str]] = (),
    bands: Sequence[tuple[float, float, str]] = (),
    ticks: Sequence[tuple[float, str]] | None = None,
    height: float = 2.4,
) -> Picture:
    """Series over two axes.

    Args: marks: (x, name) of dashed vertical lines; bands: (from x, to x, name); ticks: (x, name) instead of numbers.
    Raises: ValueError, when drawn, without a point or for values that an axis cannot show.
    """

    def draw(axes: Axes) -> None:
        above = partial(axes.annotate, xycoords=("data", "axes fraction"), textcoords="offset points", color=GREY)
        for i, (low, high, name) in enumerate(bands):
            axes.axvspan(low, high, color=(LIGHT, RED)[i % 2], alpha=0.18, linewidth=0)
            above(name, ((low + high) / 2, 1), (0, 3), ha="center")
        for s in series:
            style, many = "-" * s.line + "o" * s.dots, len(s.points) > MARKS
            size = None if s.line else 5
            axes.plot(*zip(*s.points), style, color=s.color, label=s.name or "_", rasterized=many, markersize=size)
        for at, name in marks:
            axes.axvline(at, color=RED, linestyle="--")
            above(name, (at, 1), (2, -8))
        points = [p for s in series for p in s.points]
        x.apply(axes, "x", [*(p[0] for p in points), *(at for at, _ in marks)])
        y.apply(axes, "y", [p[1] for p in points])
        if ticks is not None:
            axes.set_xticks(*zip(*ticks))

    return _picture(label, height, [s.name for s in series if s.name], draw)


def bars(rows: dict[str, Sequence[float | None]], names: Sequence[str], label: str, unit: str = "") -> Picture:
    """Horizontal bars with their values, one group per row: {row: a value per name, or None for no bar}."""

    def draw(axes: Axes) -> None:
        thick = 0.8 / len(names)
        for i, name in enumerate(names):
            shown = {at + (i + 0.5) * thick - 0.4: row[i] for at, row in enumerate(rows.values()) if row[i] is not None}
            drawn = axes.barh(list(shown), list(shown.values()), 0.9 * thick, label=name)
            axes.bar_label(drawn, [f"{value:.4g}{unit}" for value in shown.values()], padding=2, fontsize=7)
        axes.set_yticks(range(len(rows)), [name if len(name) <= 23 else "…" + name[-22:] for name in rows])
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, None), xticks=())

    return _picture(label, 0.2 + len(rows) * (0.05 + 0.13 * len(names)), names, draw)


def histogram(
    edges: Sequence[float],
    shares: dict[str, Sequence[float]],
    x: Axis,
    label: str,
    *,
    interval: tuple[float, float],
    levels: Sequence[float],
) -> Picture:
    """Shares per bin as outlines over ``edges``; a shaded interval and the levels within the edges as ticks below."""

    def draw(axes: Axes) -> None:
        axes.axvspan(*(min(max(v, edges[0]), edges[-1]) for v in interval), color=LIGHT, alpha=0.25, linewidth=0)
        for name, values in shares.items():
            axes.stairs(values, edges, label=name)
        inside = [level for level in levels if edges[0] <= level <= edges[-1]]
        axes.plot(inside, [0.03] * len(inside), "|", color=RED, markersize=6, transform=axes.get_xaxis_transform())
        x.apply(axes, "x", edges)
        Axis("share", low=0.0).apply(axes, "y", [v for values in shares.values() for v in values])

    return _picture(label, 1.7, list(shares), draw)
