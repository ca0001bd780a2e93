"""A plot of the paired differences: a row for every hypothesis, a dot for every pair, the margin as a line."""

from __future__ import annotations

from matplotlib.figure import Figure

from tuner.gate.outputs.wording import signed
from tuner.gate.values import Finding, GateResult, Verdict
from tuner.report.canvas import GREEN, GREY, LIGHT, ORANGE, VERMILION, Theme, new_figure, to_png

_COLOURS = {Verdict.OK: GREEN, Verdict.FAIL: VERMILION, Verdict.INCONCLUSIVE: ORANGE}
_SPREAD = 0.28


def render_plot(result: GateResult, theme: Theme = LIGHT) -> bytes | None:
    """A PNG; None where nothing was compared."""
    shown = [finding for finding in result.findings if finding.differences]
    return to_png(draw(shown, result.verdict, theme)) if shown else None


def draw(findings: list[Finding], verdict: Verdict, theme: Theme) -> Figure:
    """Pairs from top to bottom in the order measured; those that the verdict did not look at are hollow."""
    figure, axes = new_figure(f"pipetune gate: {verdict.value}", theme, size=(8.0, 1.4 + 0.75 * len(findings)))
    axes.axvline(0.0, color=GREY, linewidth=1.2, zorder=1)
    for row, finding in enumerate(findings):
        colour = _COLOURS[finding.verdict]
        count = len(finding.differences)
        heights = [row + _SPREAD * (2 * index / max(count - 1, 1) - 1) for index in range(count)]
        shares = [100 * one for one in finding.differences]
        axes.scatter(shares[: finding.pairs], heights[: finding.pairs], s=18, color=colour, alpha=0.75, zorder=3)
        if finding.pairs < count:
            axes.scatter(
                shares[finding.pairs :], heights[finding.pairs :], s=18, facecolors="none", edgecolors=colour, zorder=3
            )
        if finding.interval is not None:
            axes.hlines(row, 100 * finding.interval[0], 100 * finding.interval[1], color=theme.ink, linewidth=2, zorder=4)
        if finding.estimate is not None:
            axes.plot([100 * finding.estimate], [row], "D", color=theme.ink, markersize=6, zorder=5)
        margin = 100 * finding.margin
        axes.vlines(margin, row - 0.42, row + 0.42, color=VERMILION, linewidth=1.4, linestyle="--", zorder=2)
    labels = [
        f"{finding.case}\n{finding.metric}\n{finding.verdict.value} {'' if finding.estimate is None else signed(finding.estimate)}"
        for finding in findings
    ]
    axes.set_yticks(range(len(findings)), labels, fontsize=8, parse_math=False)
    axes.set_ylim(len(findings) - 0.45, -0.55)
    axes.set_xlabel("candidate worse by, % (each pair's logarithm; diamond and bar: shift and its 95 % interval)")
    axes.grid(visible=False, axis="y")
    return figure
