"""Curves as inline SVG, and tables: what the report draws, which needs only its style sheet.

Colours and dashes are class names there, so that light, dark and print each have their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

COLOURS = 3
CHART_W, CHART_H = 340, 200
PLOT = (56, 8, CHART_W - 14, CHART_H - 34)  # left, top, right, bottom
LEAST_SPAN = 0.05  # of a value: less change than that is not drawn as if it were much
MOST_SIGMAS = 6  # labels that find room side by side

Ticks = list[tuple[float, str]]  # place on the axis, label


@dataclass(frozen=True)
class Curve:
    """The points of a line, and the style sheet's numbers for its colour and its dashes."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    dash: int = 0


def over_steps(
    name: str, curves: Sequence[Curve], *, smooth: bool = True, level: float | None = None
) -> tuple[str, str]:
    """Every point thin and the running mean thick: the SVG, and a remark on points outside, or "".

    The axis ends at twice the 98th percentile: a few outliers must not flatten the rest.
    level: a height to mark. smooth: False where a running mean would only bend the line.
    """
    every = [y for curve in curves for y in curve.ys]
    marked = [] if level is None else [level]
    floor = min(0.0, *every)
    usual = float(np.quantile(every, 0.98, method="lower"))
    ceiling = min(max(every), floor + 2 * (usual - floor)) if usual > floor else max(every)
    ticks_y, floor, ceiling = _heights(floor, max([ceiling, *marked]))
    means = [replace(curve, ys=_running_mean(curve.ys)) for curve in curves] if smooth else curves
    plot = _Plot(*_steps_axis(curves), floor, ceiling)
    # a nested svg clips to the plot without needing an id that is unique in the page
    left, top, right, bottom = PLOT
    lines = [
        f'<svg x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" '
        f'viewBox="{left} {top} {right - left} {bottom - top}">',
        *(plot.line("raw", replace(curve, dash=0)) for curve in curves),
        *(plot.level(height) for height in marked),
        *(plot.line("smooth", curve) for curve in means),
        "</svg>",
    ]
    above = sum(value > ceiling for value in every)
    remark = f"{above} of {len(every)} points lie above." if above else ""
    return plot.drawn(name, "step", "optimizer steps", ticks_y, lines), remark


def measured_over_steps(name: str, curves: Sequence[Curve]) -> str:
    """A few exact measurements, each a dot; the axis holds their range and need not begin at 0."""
    every = [y for curve in curves for y in curve.ys]
    middle, least = (min(every) + max(every)) / 2, LEAST_SPAN * max(map(abs, every))
    floor, ceiling = min(*every, middle - least / 2), max(*every, middle + least / 2)
    ticks_y, floor, ceiling = _heights(floor, ceiling)
    plot = _Plot(*_steps_axis(curves), floor, ceiling)
    return plot.drawn(name, "step", "optimizer steps", ticks_y, _dotted(plot, curves))


def over_sigma(name: str, curves: Sequence[Curve]) -> str:
    """Values at the sigmas that occur, side by side: most of them crowd just below 1."""
    sigmas = sorted({x for curve in curves for x in curve.xs})
    place = {sigma: index for index, sigma in enumerate(sigmas)}
    placed = [replace(curve, xs=[place[x] for x in curve.xs]) for curve in curves]
    apart = -(-len(sigmas) // MOST_SIGMAS)
    ticks_x = [(place[sigma], f"{sigma:.3f}") for sigma in sigmas[::apart]]
    every = [y for curve in curves for y in curve.ys]
    ticks_y, floor, ceiling = _heights(min(0.0, *every), max(every))
    plot = _Plot(ticks_x, -0.5, len(sigmas) - 0.5, floor, ceiling)
    return plot.drawn(name, "sigma, evenly spaced", "sigma", ticks_y, _dotted(plot, placed))


def scatter(name: str, x_name: str, curves: Sequence[Curve]) -> str:
    """Points of two numbers of one kind, both axes from 0."""
    xs, ys = ([v for c in curves for v in getattr(c, axis)] for axis in ("xs", "ys"))
    ticks_y, floor, ceiling = _heights(0.0, max(ys))
    ticks, first, last = _heights(0.0, max(xs))
    plot = _Plot(list(zip(ticks, tick_labels(ticks))), first, last, floor, ceiling)
    return plot.drawn(name, x_name, x_name, ticks_y, [plot.dots(curve) for curve in curves])


def figure(title: str, body: str, *sentences: str, key: Sequence[str] = ()) -> str:
    """A card of the page. body: HTML; key: what the dashes 0, 1, 2 of a chart stand for."""
    shown = "".join(
        f'<span><svg viewBox="0 0 30 6"><line class="dash-{dash}" x2="30" y1="3" y2="3"/></svg>'
        f"{escape(label)}</span>"
        for dash, label in enumerate(key)
    )
    legend = f'<p class="legend key">{shown}</p>' if key else ""
    said = " ".join(sentence for sentence in sentences if sentence)
    caption = f"<figcaption>{escape(said)}</figcaption>" if said else ""
    return f'<figure class="card chart"><h3>{escape(title)}</h3>{legend}{body}{caption}</figure>'


def note(text: str) -> str:
    """A remark of the page."""
    return f'<p class="note">{escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, first_number: int) -> str:
    """A table of ready HTML cells; columns from first_number on are right-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ("" if i < first_number else ' class="number"' for i in range(len(cells)))
        inner = (f"<{tag}{k}>{cell}</{tag}>" for k, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f'<div class="card scroll"><table><thead>{line(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


@dataclass(frozen=True)
class _Plot:
    """Maps values to the page's units, and draws with them."""

    ticks_x: Ticks
    first: float
    last: float
    floor: float
    ceiling: float

    def x(self, value: float) -> str:
        left, _, right, _ = PLOT
        return f"{left + (right - left) * (value - self.first) / (self.last - self.first):.1f}"

    def y(self, value: float, below: int = 0) -> str:
        _, top, _, bottom = PLOT
        share = (value - self.floor) / (self.ceiling - self.floor)
        return f"{bottom - (bottom - top) * share + below:.1f}"

    def line(self, kind: str, curve: Curve) -> str:
        points = " ".join(
            f"{self.x(x)},{self.y(y)}" for x, y in zip(curve.xs, curve.ys, strict=True)
        )
        return f'<polyline class="{kind} {_style(curve)}" points="{points}"/>'

    def dots(self, curve: Curve) -> str:
        points = zip(curve.xs, curve.ys, strict=True)
        path = "".join(f"M{self.x(x)} {self.y(y)}h0" for x, y in points)
        return f'<path class="dots line-{curve.colour % COLOURS}" d="{path}"/>'

    def level(self, value: float) -> str:
        left, _, right, _ = PLOT
        y = self.y(value)
        return f'<line class="level" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'

    def drawn(
        self, name: str, x_name: str, over: str, ticks_y: Sequence[float], lines: Sequence[str]
    ) -> str:
        """The chart. over: what the values are drawn over, for those who do not see it."""
        left, top, right, bottom = PLOT
        parts = []
        for tick, label in zip(ticks_y, tick_labels(ticks_y), strict=True):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
            y = self.y(tick, below=4)
            parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end">{label}</text>')
        for tick, label in self.ticks_x:
            x = self.x(tick)
            parts.append(f'<text x="{x}" y="{bottom + 15}" text-anchor="middle">{label}</text>')
        middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
        parts.append(f'<text x="{middle_x}" y="{CHART_H - 3}" text-anchor="middle">{x_name}</text>')
        parts.append(
            f'<text transform="translate(11 {middle_y}) rotate(-90)" text-anchor="middle">'
            f"{escape(name)}</text>"
        )
        return (
            f'<svg viewBox="0 0 {CHART_W} {CHART_H}" role="img" '
            f'aria-label="{escape(name)} over {over}">{"".join(parts)}{"".join(lines)}</svg>'
        )


def _dotted(plot: _Plot, curves: Sequence[Curve]) -> list[str]:
    lines = [plot.line("smooth", curve) for curve in curves]
    return lines + [plot.dots(curve) for curve in curves]


def _style(curve: Curve) -> str:
    return f"line-{curve.colour % COLOURS}" + (f" dash-{curve.dash}" if curve.dash else "")


def _steps_axis(curves: Sequence[Curve]) -> tuple[Ticks, float, float]:
    last = max(step for curve in curves for step in curve.xs)
    ticks = [(tick, f"{tick:.0f}") for tick in _ticks(0, last, whole=True)]
    return ticks, 0, max(last, 1)


def _heights(floor: float, ceiling: float) -> tuple[list[float], float, float]:
    """Ticks that cover floor to ceiling, and where the axis begins and ends with them."""
    ticks = _ticks(floor, ceiling)
    return ticks, min(floor, ticks[0]), max(ceiling, ticks[-1])


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a tenth of the run, with shorter windows at both ends."""
    reach = len(values) // 20
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return ((total[high] - total[low]) / (high - low)).tolist()


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers that cover low to high (whole: inside it, integers)."""
    if high <= low:
        high = low + 1
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    if whole:
        step = max(1, round(step))
    first = math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if whole else math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """All in one form, and none so long that it would meet the name of the axis."""
    if 0.01 <= max(map(abs, ticks)) < 1e5:
        return [number(tick) for tick in ticks]
    parts = (f"{tick:.2e}".split("e") for tick in ticks)
    return [
        f"{float(mantissa):g}e{int(power)}" if float(mantissa) else "0" for mantissa, power in parts
    ]


def number(value: float | None) -> str:
    """Four digits of it."""
    return "none" if value is None else f"{value:.4g}"
