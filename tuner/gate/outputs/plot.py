"""A chart of the paired differences: a row for every hypothesis, a dot for every pair, the margin as a line."""

import math
from collections.abc import Iterator

from pipetune.bench.metrics import HIGHER_IS_BETTER
from pipetune.tuner.gate.outputs.wording import signed
from pipetune.tuner.gate.values import Finding, GateResult, Verdict, change_of
from pipetune.tuner.report.chart import Bars, Chart, Colour, Dots, Line, Mark, Rule

_COLOURS: dict[Verdict, Colour] = {Verdict.OK: "green", Verdict.FAIL: "vermilion", Verdict.INCONCLUSIVE: "orange"}
_JITTER, _HALF = 0.28, 0.42
_LONGEST = 34


def differences_chart(result: GateResult) -> Chart | None:
    """Pairs from top to bottom in the order measured, hollow where the verdict did not look at them.

    None where nothing was compared.
    """
    if not (shown := [finding for finding in result.findings if finding.differences]):
        return None
    several = len({finding.case for finding in result.findings}) > 1
    unit = "run" if result.method == "stored" else "pair"
    marks = [mark for row, finding in enumerate(shown) for mark in _row(row, finding, unit)]
    return Chart(
        title=f"pipetune gate: {result.verdict.value}",
        x_label="candidate worse by, % of the metric  (left of 0 it is better)",
        marks=(Rule(at=0.0, is_upright=True), *marks),
        rows=tuple(_label(finding, several=several) for finding in shown),
        size=(8.0, 1.8 + (0.62 if several else 0.55) * len(shown)),
    )


def _row(row: int, finding: Finding, unit: str) -> Iterator[Mark]:
    colour = _COLOURS[finding.verdict]
    count = len(finding.differences)
    looked = finding.pairs or count
    heights = tuple(row + _JITTER * (2 * index / max(count - 1, 1) - 1) for index in range(count))
    shares = tuple(_worse(finding, math.expm1(one)) for one in finding.differences)
    if finding.floor is not None:
        span = (row, -100 * finding.floor, 100 * finding.floor, "")
        yield Bars(spans=(span,), colour="faint", height=2 * _HALF, label="noise floor")
    yield Dots(xs=shares[:looked], ys=heights[:looked], colour=colour, size=4, label=f"a {unit}, by verdict")
    if looked < count:
        xs, ys = shares[looked:], heights[looked:]
        yield Dots(xs=xs, ys=ys, colour=colour, size=4, is_hollow=True, label="after the verdict")
    if finding.interval is not None:
        ends = tuple(_worse(finding, end) for end in finding.interval)
        yield Line(xs=ends, ys=(row, row), colour="ink", width=2)
    if finding.estimate is not None:
        at = (_worse(finding, finding.estimate),)
        yield Dots(xs=at, ys=(row,), colour="ink", marker="D", label="shift, 95 % interval")
    margin = (_worse(finding, finding.margin),) * 2
    yield Line(xs=margin, ys=(row - _HALF, row + _HALF), colour="vermilion", width=1.4, is_dashed=True, label="margin")


def _worse(finding: Finding, cost: float) -> float:
    """By how many percent of itself a metric is worse whose cost grows by a share."""
    change = 100 * change_of(finding.metric, cost)
    return -change if finding.metric in HIGHER_IS_BETTER else change


def _label(finding: Finding, *, several: bool) -> str:
    """The case by the two ends of a long name: what tells configs apart may stand at either."""
    name, half = finding.case, _LONGEST // 2
    lines = [name if len(name) <= _LONGEST else f"{name[:half]}…{name[1 - half :]}"] if several else []
    estimate = "" if finding.change is None else f" {signed(finding.change)}"
    return "\n".join([*lines, finding.metric, f"{finding.verdict.value}{estimate}"])
