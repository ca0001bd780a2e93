"""Draws the figures of a study as PNG, on light paper or on dark."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from pipetune.tuner.report.canvas import GREEN, GREY, ORANGE, VERMILION, Theme, add_legend, new_figure, picture
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.document import Picture
from pipetune.tuner.report.figures import (
    Bar,
    Forecast,
    History,
    Scatter,
    Timeline,
    forecast_of,
    history_of,
    scatter_of,
    timeline_of,
)


def draw_study(report: Report) -> dict[str, Picture]:
    """All figures that the study has data for, by file name without ending."""
    bubble = scatter_of(report, "bubble_ratio", "bubble ratio, % of stage time without compute", 100.0)
    memory = scatter_of(report, "peak_memory_bytes", "peak memory of the fullest stage, MiB", 2.0**-20)
    history, forecast, timeline = history_of(report), forecast_of(report), timeline_of(report)
    is_wide = forecast is None
    pictures = {
        "throughput_vs_bubble": bubble and picture("Throughput against bubble ratio", partial(draw_scatter, bubble)),
        "throughput_vs_memory": memory and picture("Throughput against peak memory", partial(draw_scatter, memory)),
        "history": history
        and picture("Best so far, trial by trial", partial(draw_history, history, wide=is_wide), wide=is_wide),
        "predicted_vs_measured": forecast and picture("Predicted against measured", partial(draw_forecast, forecast)),
        "timeline": timeline and picture("Timeline of the stages", partial(draw_timeline, timeline), wide=True),
    }
    return {name: drawn for name, drawn in pictures.items() if drawn}


def draw_scatter(data: Scatter, theme: Theme) -> Figure:
    """Plans as dots, confirmed ones filled; the best a star, our single stage a diamond, the baseline a line."""
    figure, axes = new_figure(data.title, theme, size=(6.4, 4.6))
    plain = [point for point in data.points if not point.is_best and not point.is_single_stage]
    for is_confirmed, face, label in ((True, theme.plan, "confirmed plan"), (False, theme.paper, "plan of the search")):
        chosen = [point for point in plain if point.is_confirmed is is_confirmed]
        if chosen:
            axes.scatter(
                [point.x for point in chosen],
                [point.y for point in chosen],
                s=42,
                facecolors=face,
                edgecolors=theme.plan,
                linewidths=1.6,
                label=label,
                zorder=3,
            )
    for point in data.points:
        if point.is_single_stage and not point.is_best:
            axes.scatter([point.x], [point.y], s=60, marker="D", color=GREEN, label="single stage", zorder=4)
        if point.is_best:
            axes.scatter(
                [point.x], [point.y], s=230, marker="*", color=ORANGE, edgecolors=theme.ink, linewidths=0.7,
                label="best plan", zorder=5,
            )  # fmt: skip
            axes.annotate(
                point.label, (point.x, point.y), xytext=(0, 11), textcoords="offset points", ha="center", fontsize=9,
                fontweight="bold", color=theme.ink, parse_math=False,
            )  # fmt: skip
    if data.baseline_y is not None:
        if data.baseline_x is not None:
            axes.scatter([data.baseline_x], [data.baseline_y], s=52, marker="s", color=VERMILION, zorder=4)
        axes.axhline(data.baseline_y, color=VERMILION, linestyle="--", linewidth=1.3, label="device_map", zorder=2)
    axes.set_xlabel(data.x_label)
    axes.set_ylabel(data.y_label)
    axes.margins(x=0.08, y=0.14)
    add_legend(figure, theme, 3)
    return figure


def draw_history(data: History, theme: Theme, *, wide: bool = True) -> Figure:
    """Trials as dots, the best so far as a staircase, failures as crosses at the foot."""
    figure, axes = new_figure(data.title, theme, size=(10.0, 3.6) if wide else (6.4, 4.6))
    trials, reached = zip(*data.trials, strict=True)
    axes.scatter(trials, reached, s=34, color=theme.plan, label="trial", zorder=3)
    if data.best_so_far:
        numbers, values = zip(*data.best_so_far, strict=True)
        last = max([*trials, *data.failed])
        axes.step(
            [*numbers, last],
            [*values, values[-1]],
            where="post",
            color=ORANGE,
            linewidth=2,
            label="best so far",
            zorder=2,
        )
    if data.baseline_y is not None:
        axes.axhline(data.baseline_y, color=VERMILION, linestyle="--", linewidth=1.3, label="device_map", zorder=1)
    if data.failed:
        axes.plot(
            data.failed, [0.03] * len(data.failed), "x", transform=axes.get_xaxis_transform(), color=VERMILION,
            markersize=8, markeredgewidth=2, label="no measurement", clip_on=False, zorder=4,
        )  # fmt: skip
    axes.set_xlabel("trial")
    axes.set_ylabel(data.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.04, y=0.14)
    add_legend(figure, theme, 4 if wide else 2)
    return figure


def draw_forecast(data: Forecast, theme: Theme) -> Figure:
    """Trials by number against the diagonal on which predictions come true, with the spread that was expected."""
    figure, axes = new_figure(data.title, theme, size=(6.4, 4.6))
    spans = [value - sd for value, sd in zip(data.predicted, data.sd, strict=True)]
    spans += [value + sd for value, sd in zip(data.predicted, data.sd, strict=True)]
    low, high = min(*spans, *data.measured), max(*spans, *data.measured)
    pad = 0.06 * (high - low or high)
    ends = (low - pad, high + pad)
    axes.plot(ends, ends, color=GREY, linewidth=1.3, linestyle="--", label="as predicted", zorder=1)
    axes.fill_between(ends, [0.95 * end for end in ends], [1.05 * end for end in ends], color=theme.faint, alpha=0.35,
                      linewidth=0, label="within 5 %", zorder=0)  # fmt: skip
    axes.errorbar(
        data.predicted, data.measured, xerr=data.sd, fmt="o", markersize=6, color=theme.plan, elinewidth=1.1,
        label="trial, ± predicted SD", zorder=3,
    )  # fmt: skip
    for number, x, y in zip(data.numbers, data.predicted, data.measured, strict=True):
        axes.annotate(
            str(number), (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8, color=theme.ink,
            parse_math=False,
        )  # fmt: skip
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_xlabel(data.x_label)
    axes.set_ylabel(data.y_label)
    add_legend(figure, theme, 2)
    return figure


def draw_timeline(data: Timeline, theme: Theme) -> Figure:
    """A row per stage, time to the right; labels only where they fit."""
    height = 1.5 + 0.62 * len(data.stages)
    figure, axes = new_figure(data.title, theme, size=(10.0, height))
    prefill, decode = ORANGE, theme.plan
    for is_prefill, color, label in ((True, prefill, "prefill"), (False, decode, "decode")):
        chosen = [bar for bar in data.bars if bar.is_prefill is is_prefill]
        patches = [Rectangle((bar.start_s, bar.stage - 0.36), bar.width_s, 0.72) for bar in chosen]
        axes.add_collection(
            PatchCollection(patches, facecolor=color, edgecolor=theme.paper, linewidth=0.5, label=label)
        )
    axes.set_xlim(0, data.end_s * 1.005)
    axes.set_ylim(len(data.stages) - 0.45, -0.55)
    axes.set_yticks(range(len(data.stages)), data.stages, fontsize=8)
    axes.set_xlabel("seconds since the prompts were given")
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    _label_bars(figure, axes, data.bars, data.end_s)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (prefill, decode)]
    axes.legend(
        handles, ["prefill", "decode"], loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False,
        fontsize=9, labelcolor=theme.ink,
    )  # fmt: skip
    return figure


def _label_bars(figure: Figure, axes: Axes, bars: Sequence[Bar], end_s: float) -> None:
    inches_per_s = figure.get_size_inches()[0] * 0.85 / end_s
    for bar in bars:
        if bar.width_s * inches_per_s > 0.085 * len(bar.label):
            axes.text(
                bar.start_s + bar.width_s / 2, bar.stage, bar.label, ha="center", va="center", fontsize=7,
                color="#000000" if bar.is_prefill else "#ffffff", parse_math=False,
            )  # fmt: skip
