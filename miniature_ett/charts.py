"""Charts of the report, drawn by matplotlib, as SVG inside the page and in its colours."""

import io
import math
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

MINUS = "\N{MINUS SIGN}"
SIZE = (2.9, 1.35)
"""Width and height of a curve in inches."""
BAND_WIDTH, BAND_HEIGHT, BAND_AXIS = 3.6, 0.45, 0.45
"""Inches of the rows of means and intervals."""
COLOURS = {name: f"#0e77{number:02x}" for number, name in enumerate(("muted", "line", "accent", "frozen"))}
"""Colours that stand for CSS variables of the page, which has a light and a dark set of them."""
ROLES = {"frozen": "frozen", "tuned": "accent"}


def format_number(value: float) -> str:
    """Three significant digits, without an exponent between 0.001 and a million."""
    if value == 0:
        return "0"
    sign, size = MINUS if value < 0 else "", abs(value)
    if not 1e-3 <= size < 1e6:
        return sign + f"{size:.0e}".replace("e-0", f"e{MINUS}").replace("e+0", "e")
    text = f"{size:,.{max(0, 2 - math.floor(math.log10(size)))}f}"
    return sign + (text.rstrip("0").rstrip(".") if "." in text else text)


def line_chart(points: list[tuple[float, float]], label: str) -> Markup:
    """One curve: the values as recorded, faint, and above them their running mean.

    Args:
        points: (step, value) in order of steps; values that are not finite are left out.
        label: What a screen reader says that the chart shows.
    """
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if not points:
        return Markup("")
    steps, values = [step for step, _ in points], [value for _, value in points]
    means = _running_mean(values)
    figure, axis = _axis(*SIZE)
    axis.plot(steps, values, color=COLOURS["accent"], linewidth=0.8, alpha=0.3)
    axis.plot(steps, means, color=COLOURS["accent"], linewidth=1.6)
    axis.plot(steps[-1], means[-1], "o", color=COLOURS["accent"], markersize=3.5, clip_on=False)
    axis.set_ylim(*_clipped_range(values))
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.grid(axis="y", color=COLOURS["line"])
    return _svg(figure, "chart", label)


def interval_chart(rows: list[dict[str, Any]], names: tuple[str, ...], unit: str) -> Markup:
    """Means and intervals of several measures of one unit on one axis, which need not begin at 0.

    Args:
        rows: Each with `name`, and for each of `names` a `mean`, a `low` and a `high`. Without an interval (`low` and
            `high` are None) the mean stands alone.
        names: What is compared, from top to bottom, of `ROLES`.
        unit: `%` (values in 0..1), or any other unit for values as they are.
    """
    scale = 100 if unit == "%" else 1
    shown = [row for row in rows if any(math.isfinite(row[name]["mean"]) for name in names)]
    if not shown:
        return Markup("")
    figure, axis = _axis(BAND_WIDTH, BAND_HEIGHT * len(shown) + BAND_AXIS)
    for number, row in enumerate(shown):
        for line, name in enumerate(names):
            mean, low, high = (row[name][key] for key in ("mean", "low", "high"))
            if not math.isfinite(mean):
                continue
            spread = None if low is None or high is None else [[scale * (mean - low)], [scale * (high - mean)]]
            place = number + 0.3 * (line - (len(names) - 1) / 2)
            colour = COLOURS[ROLES[name]]
            axis.errorbar(scale * mean, place, xerr=spread, fmt="o", color=colour, markersize=4.5, capsize=2.5)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_yticks(range(len(shown)), labels=[row["name"] for row in shown])
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value) + "%" * (unit == "%")))
    axis.grid(axis="x", color=COLOURS["line"])
    label = f"Means and 95% intervals in {unit} of {', '.join(row['name'] for row in shown)}: {' and '.join(names)}"
    return _svg(figure, "intervals", label)


def _axis(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=7, labelcolor=COLOURS["muted"])
    return figure, axis


def _svg(figure: Figure, css_class: str, label: str) -> Markup:
    # Text stays text; the salt keeps names inside of one chart apart from those of another.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = file.getvalue().partition("<svg ")[2]
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(f'<svg class="{css_class}" role="img" aria-label="{Markup.escape(label)}" {svg}')


def _clipped_range(values: list[float]) -> tuple[float, float]:
    """The values' range, where a curve's first steep tenth does not flatten the rest."""
    later = values[len(values) // 10 :]
    low, high = min(later), max(later)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    bottom, top = max(min(values), low - spread), min(max(values), high + spread)
    return (bottom, top) if top > bottom else (bottom - spread, top + spread)


def _running_mean(values: list[float]) -> list[float]:
    """Each value's mean with its neighbours, a twentieth of the curve on either side."""
    reach = len(values) // 20
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


__all__ = ["MINUS", "format_number", "interval_chart", "line_chart"]
