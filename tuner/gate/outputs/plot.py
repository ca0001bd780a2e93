"""A plot of the paired differences: a row for every hypothesis, a dot for every pair, the margin as a line."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pipetune.tuner.gate.outputs.wording import signed
from pipetune.tuner.gate.values import Finding, GateResult, Verdict
from pipetune.tuner.report.render.canvas import GREEN, GREY, LIGHT, ORANGE, VERMILION, Theme, new_figure, to_png

_COLOURS = {Verdict.OK: GREEN, Verdict.FAIL: VERMILION, Verdict.INCONCLUSIVE: ORANGE}
_SPREAD, _HALF = 0.28, 0.42
_LONGEST = 34


def render_plot(result: GateResult, theme: Theme = LIGHT) -> bytes | None:
    """A PNG; None where nothing was compared."""
    return to_png(draw(result, theme)) if any(finding.differences for finding in result.findings) else None


def draw(result: GateResult, theme: Theme) -> Figure:
    """Pairs from top to bottom in the order measured; those that the verdict did not look at are hollow."""
    shown = [finding for finding in result.findings if finding.differences]
    several = len({finding.case for finding in result.findings}) > 1
    figure, axes = new_figure(
        f"pipetune gate: {result.verdict.value}", theme, size=(8.0, 1.8 + (0.62 if several else 0.55) * len(shown))
    )
    axes.axvline(0.0, color=GREY, linewidth=1.2, zorder=1)
    for row, finding in enumerate(shown):
        colour = _COLOURS[finding.verdict]
        count = len(finding.differences)
        looked = finding.pairs or count
        heights = [row + _SPREAD * (2 * index / max(count - 1, 1) - 1) for index in range(count)]
        shares = [100 * math.expm1(one) for one in finding.differences]
        axes.scatter(shares[:looked], heights[:looked], s=18, color=colour, alpha=0.75, zorder=3)
        axes.scatter(shares[looked:], heights[looked:], s=18, facecolors="none", edgecolors=colour, zorder=3)
        if finding.floor is not None:
            ends = (-100 * finding.floor, 100 * finding.floor)
            axes.fill_betweenx((row - _HALF, row + _HALF), *ends, color=theme.faint, alpha=0.5, linewidth=0, zorder=0)
        if finding.interval is not None:
            low, high = finding.interval
            axes.hlines(row, 100 * low, 100 * high, color=theme.ink, linewidth=2, zorder=4)
        if finding.estimate is not None:
            axes.plot([100 * finding.estimate], [row], "D", color=theme.ink, markersize=6, zorder=5)
        margin = 100 * finding.margin
        axes.vlines(margin, row - _HALF, row + _HALF, color=VERMILION, linewidth=1.4, linestyle="--", zorder=2)
    labels = [_label(finding, several) for finding in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=8, parse_math=False)
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.set_xlabel("candidate worse by, %  (left of 0 it is better)")
    axes.grid(visible=False, axis="y")
    hollow = any(0 < finding.pairs < len(finding.differences) for finding in shown)
    figure.legend(
        handles=_handles(theme, "run" if result.method == "stored" else "pair", hollow=hollow),
        loc="outside lower center", ncols=5, fontsize=8, labelcolor=theme.ink, frameon=False,
        handletextpad=0.4, columnspacing=1.2,
    )  # fmt: skip
    return figure


def _label(finding: Finding, several: bool) -> str:
    lines = [_shortened(finding.case)] if several else []
    estimate = "" if finding.estimate is None else f" {signed(finding.estimate)}"
    return "\n".join([*lines, finding.metric, f"{finding.verdict.value}{estimate}"])


def _shortened(name: str) -> str:
    """A long name by its two ends: what tells configs apart may stand at either."""
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[:half]}…{name[1 - half :]}"


def _handles(theme: Theme, unit: str, *, hollow: bool) -> list[Line2D | Patch]:
    def dot(label: str, face: str) -> Line2D:
        return Line2D([], [], marker="o", linestyle="", color=GREY, markerfacecolor=face, markersize=5, label=label)

    handles: list[Line2D | Patch] = [dot(f"a {unit}", GREY)]
    handles += [dot("after the verdict", "none")] if hollow else []
    handles.append(Line2D([], [], marker="D", color=theme.ink, markersize=5, label="shift, 95 % interval"))
    handles.append(Line2D([], [], color=VERMILION, linestyle="--", label="margin"))
    handles.append(Patch(facecolor=theme.faint, alpha=0.5, label="noise floor"))
    return handles
