"""Figures of the study's report."""

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .study_results import ALPHAS, ATTRIBUTES, FROZEN, MEASURES, TITLES, TUNED, Results, Statistic

COLOURS = {FROZEN: "#a9733a", TUNED: "#2456c7"}
# Weights of 0.25 and more lie close together: their labels go to different sides.
LABEL_SIDES = {"alpha-0.25": ((-6, 4), "right"), "alpha-0.5": ((-6, -11), "right"), "alpha-1": ((6, -11), "left")}
GROUND_STYLES = {"textured": ("#2456c7", "o"), "flat": ("#1c7c4a", "s")}


def draw_trade_off(results: Results, path: Path):
    """General questions and caption loss against PSNR, for every weight of L_vq and for the frozen tokenizer."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, measure in zip(axes, ("questions.general", "captions.semantic.loss"), strict=True):
        for ground in results.grounds():
            colour, marker = GROUND_STYLES.get(ground, ("#6a6e78", "^"))
            points = []
            for arm in (*ALPHAS, FROZEN):
                x, y = (results.statistic(ground, arm, name) for name in ("tokenizer.psnr", measure))
                if x is None or y is None:
                    continue
                _draw_point(axis, x, y, MEASURES[measure].scale, colour, marker, hollow=arm == FROZEN)
                text = "frozen" if arm == FROZEN else f"\N{GREEK SMALL LETTER ALPHA} = {arm.removeprefix('alpha-')}"
                offset, side = LABEL_SIDES.get(arm, ((6, 4), "left"))
                point = (x.mean, MEASURES[measure].scale * y.mean)
                axis.annotate(text, point, offset, textcoords="offset points", fontsize=8, ha=side)
                if arm != FROZEN:
                    points.append(point)
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=f"{ground} ground", zorder=1)
        axis.set_xlabel("PSNR, dB")
        axis.set_ylabel(MEASURES[measure].title)
        _tidy(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _draw_point(axis: Axes, x: Statistic, y: Statistic, scale: float, colour: str, marker: str, hollow: bool):
    axis.errorbar(
        x.mean,
        scale * y.mean,
        xerr=x.half,
        yerr=None if y.half is None else scale * y.half,
        fmt=marker,
        color=colour,
        markerfacecolor="white" if hollow else colour,
        ecolor=colour,
        elinewidth=0.8,
        capsize=2,
        markersize=5,
        zorder=2,
    )


def draw_attributes(results: Results, path: Path):
    """What captions after stage 2 get right, attribute by attribute, frozen and tuned."""
    grounds = results.grounds()
    figure = Figure(figsize=(4.2 * max(1, len(grounds)), 2.9), layout="constrained")
    for axis, ground in zip(figure.subplots(1, max(1, len(grounds)), squeeze=False)[0], grounds, strict=False):
        for arm, offset in ((FROZEN, -0.12), (TUNED, 0.12)):
            shown = [
                (row + offset, statistic)
                for row, name in enumerate(ATTRIBUTES)
                if (statistic := results.statistic(ground, arm, f"captions.semantic.{name}"))
            ]
            if shown:
                rows, values = zip(*shown, strict=True)
                axis.errorbar(
                    [100 * value.mean for value in values],
                    rows,
                    xerr=[100 * (value.half or 0.0) for value in values],
                    fmt="o",
                    color=COLOURS[arm],
                    elinewidth=1,
                    capsize=2,
                    markersize=5,
                    label=TITLES[arm],
                )
        axis.set_yticks(range(len(ATTRIBUTES)), ATTRIBUTES)
        axis.set(xlim=(-2, 102), ylim=(len(ATTRIBUTES) - 0.5, -0.5), xlabel="right, %", title=f"{ground} ground")
        axis.title.set_fontsize(10)
        _tidy(axis)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    _save(figure, path)


def _tidy(axis: Axes):
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e4e2dd", linewidth=0.6)
    axis.set_axisbelow(True)


def _save(figure: Figure, path: Path):
    partial = path.with_name(f".{path.name}.partial.png")
    figure.savefig(partial, dpi=130, metadata={"Software": None})
    os.replace(partial, path)


__all__ = ["draw_attributes", "draw_trade_off"]
