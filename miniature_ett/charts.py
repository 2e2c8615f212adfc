"""Charts for the report as inline SVG: no library, no script; their colours are the page's (CSS classes)."""

import math
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 280, 130
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 20
BAND_WIDTH, BAND_MARGIN, BAND_HEIGHT, BAND_AXIS = 340, 18, 52, 20
MINUS = "\N{MINUS SIGN}"


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
    ticks = _ticks(*_clipped_range(values))
    low, high = ticks[0], ticks[-1]
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def place(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - min(max(value, low), high)) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick in ticks:
        y = place(first, tick).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="0.32em" text-anchor="end">{format_number(tick)}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">{first:,}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{last:,} steps</text>')
    means = _running_mean(values)
    for name, line in (("raw", values), ("mean", means)):
        path = " ".join(place(step, value) for step, value in zip(steps, line, strict=True))
        parts.append(f'<polyline class="{name}" points="{path}"/>')
    end_x, end_y = place(steps[-1], means[-1]).split(",")
    parts.append(f'<circle class="end" cx="{end_x}" cy="{end_y}" r="2.6"/>')
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{Markup.escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def interval_chart(rows: list[dict[str, Any]], names: tuple[str, ...], unit: str) -> Markup:
    """Means and intervals of several measures of one unit on one axis, which need not begin at 0.

    Args:
        rows: Each with `name`, and for each of `names` a `mean`, a `low` and a `high`. Without an interval (`low` and
            `high` are None) the mean stands alone.
        names: What is compared, from top to bottom; the names are the CSS classes of the marks.
        unit: `%` (values in 0..1), or any other unit for values as they are.
    """
    values = [
        value
        for row in rows
        for name in names
        for value in (row[name]["low"], row[name]["mean"], row[name]["high"])
        if value is not None and math.isfinite(value)
    ]
    if not values:
        return Markup("")
    scale = 100 if unit == "%" else 1
    ticks = _ticks(scale * min(values), scale * max(values))
    span = ticks[-1] - ticks[0]

    def place(value: float) -> float:
        return BAND_MARGIN + (BAND_WIDTH - 2 * BAND_MARGIN) * (scale * value - ticks[0]) / span

    bottom = BAND_HEIGHT * len(rows)
    parts = []
    for tick in ticks:
        x = place(tick / scale)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        text = f"{format_number(tick)}{'%' if unit == '%' else ''}"
        parts.append(f'<text x="{x:.1f}" y="{bottom + BAND_AXIS - 5}" text-anchor="middle">{text}</text>')
    for number, row in enumerate(rows):
        top = BAND_HEIGHT * number
        parts.append(f'<text class="name" x="{BAND_MARGIN}" y="{top + 15}">{Markup.escape(row["name"])}</text>')
        for line, name in enumerate(names):
            y, estimate = top + 26 + 13 * line, row[name]
            if not math.isfinite(estimate["mean"]):
                continue
            if estimate["low"] is not None and estimate["high"] is not None:
                low, high = place(estimate["low"]), place(estimate["high"])
                for x1, x2, half in ((low, high, 0), (low, low, 4), (high, high, 4)):
                    parts.append(f'<line class="{name}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y - half}" y2="{y + half}"/>')
            parts.append(f'<circle class="{name}" cx="{place(estimate["mean"]):.1f}" cy="{y}" r="4"/>')
    label = f"Means and 95% intervals in {unit} of {', '.join(row['name'] for row in rows)}: {' and '.join(names)}"
    return Markup(
        f'<svg class="intervals" viewBox="0 0 {BAND_WIDTH} {bottom + BAND_AXIS}" role="img" '
        f'aria-label="{Markup.escape(label)}">{"".join(parts)}</svg>'
    )


def _clipped_range(values: list[float]) -> tuple[float, float]:
    """The values' range, where a curve's first steep tenth does not flatten the rest."""
    later = values[len(values) // 10 :]
    low, high = min(later), max(later)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    return max(min(values), low - spread), min(max(values), high + spread)


def _ticks(low: float, high: float) -> list[float]:
    """Three to five round numbers from below `low` to above `high`."""
    if high <= low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    rough = (high - low) / 3
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def _running_mean(values: list[float]) -> list[float]:
    """Each value's mean with its neighbours, a twentieth of the curve on either side."""
    reach = len(values) // 20
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


__all__ = ["MINUS", "format_number", "interval_chart", "line_chart"]
