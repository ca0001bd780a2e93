"""A gate in words, for the screen and for Markdown: its table and its remarks; and its differences as a chart."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from pipetune.bench.metrics import HIGHER_IS_BETTER
from pipetune.tuner.gate.values import SIDES, Case, Finding, GateResult, Reason, Verdict, change_of
from pipetune.tuner.report import document as doc
from pipetune.tuner.report.chart import Bars, Chart, Colour, Dots, Line, Mark, Rule
from pipetune.tuner.report.wording import MISSING, clean, hardware_text, metric_text

_LEGEND = "Change: of the metric itself. A rate that falls is worse, as are a time and memory that grow."
_METHODS = {
    "fresh_processes": "pairs of fresh processes, in randomised order",
    "running_fleet": "pairs of runs in one running fleet, in randomised order",
    "stored": "stored runs beside others, measured at different times",
}
_NAMED = 2
"""Failures named in the headline; the others are counted."""
_STYLES: dict[Verdict, doc.Style] = {Verdict.OK: "good", Verdict.FAIL: "bad", Verdict.INCONCLUSIVE: "warning"}
_MARKS = {Verdict.OK: "✅", Verdict.FAIL: "❌", Verdict.INCONCLUSIVE: "⚠️"}
_ON_SCREEN = ("metric", "verdict", "change", "95 % interval", "baseline", "candidate")
_OF_PAIRS = ("noise floor", "pairs")
"""Columns that stored runs have nothing for."""
_COLOURS: dict[Verdict, Colour] = {Verdict.OK: "green", Verdict.FAIL: "vermilion", Verdict.INCONCLUSIVE: "orange"}
_JITTER, _HALF = 0.28, 0.42
_LONGEST = 34


def screen_of(result: GateResult) -> doc.Document:
    """A table for each case, what is to be said of it, and the verdict last, where the eye is."""
    parts: list[doc.Part] = []
    cases = list(dict.fromkeys(finding.case for finding in result.findings))
    for case in cases:
        parts += [doc.Text(clean(case), "strong")] if len(cases) > 1 else []
        findings = (finding for finding in result.findings if finding.case == case)
        parts += [_table(findings, marked=False).only(_ON_SCREEN), doc.GAP]
    parts += [doc.Text(_LEGEND)] if result.findings else []
    parts += [doc.Text(clean(f"{label}: {text}")) for label, text in _facts(result)]
    headline = doc.Text(_headline(result), _STYLES[result.verdict])
    return doc.Document(parts=(*parts, doc.Bullets(_remarks(result)), doc.GAP, headline))


def markdown_of(result: GateResult) -> doc.Document:
    """For a pull request's comment and a job's summary: how it was measured is folded away."""
    table = _table(result.findings, marked=True, legend=_LEGEND)
    if result.method == "stored":
        table = table.only(column.title for column in table.columns if column.title not in _OF_PAIRS)
    facts = doc.Facts(tuple((clean(label), clean(text)) for label, text in _facts(result)))
    how = doc.Section("How it was measured", (facts,), is_folded=True)
    return doc.Document(
        title=f"{_MARKS[result.verdict]} pipetune gate · {_headline(result)}",
        parts=(*((table,) if result.findings else ()), doc.Bullets(_remarks(result)), how),
    )


def _table(findings: Iterable[Finding], *, marked: bool, legend: str = "") -> doc.Table:
    """A row for each finding; all text on single lines, whatever a name or an error holds."""
    numbers = map(doc.Column, ("change", "95 % interval", "baseline", "candidate", "margin", *_OF_PAIRS))
    return doc.Table(
        columns=(doc.left("case"), doc.left("metric", "prose"), doc.left("verdict"), *numbers),
        rows=doc.rows_of(_cells(finding, marked=marked) for finding in findings),
        legend=legend,
        gap=1,
    )


def _cells(finding: Finding, *, marked: bool) -> tuple[doc.Cell, ...]:
    verdict, value = finding.verdict.value, partial(value_text, finding.metric)
    return (
        clean(finding.case),
        clean(finding.metric),
        f"{_MARKS[finding.verdict]} {verdict}" if marked else doc.Text(verdict, _STYLES[finding.verdict]),
        MISSING if finding.change is None else signed(finding.change),
        interval_text(finding.change_interval),
        value(finding.baseline),
        value(finding.candidate),
        margin_text(finding),
        MISSING if finding.floor is None else f"{100 * finding.floor:.1f} %",
        str(finding.pairs),
    )


def _headline(result: GateResult) -> str:
    return clean(f"{result.verdict.value}: {_judgement(result)}")


def _remarks(result: GateResult) -> tuple[str, ...]:
    """Why not OK; then what the gate cannot see, and what else a reader must know."""
    blind = (f"not seen: {blind}" for blind in result.cannot_see)
    return tuple(map(clean, (*_reasons(result), *blind, *result.notes)))


def signed(share: float) -> str:
    """`+5.2 %`, `-0.3 %`, `0.0 %`."""
    return f"{_percent(share)} %"


def margin_text(finding: Finding) -> str:
    """The change that is too much: `+5 %` of a time, `-4.8 %` of a rate."""
    return f"{100 * change_of(finding.metric, finding.margin):+.2g} %"


def value_text(metric: str, value: float | None) -> str:
    """In the metric's unit, with the digits that a margin of some percent needs."""
    return metric_text(metric, value, 4) if value is None or math.isfinite(value) else str(value)


def interval_text(interval: tuple[float, float] | None) -> str:
    """`-0.5 … +0.5 %`."""
    return MISSING if interval is None else f"{_percent(interval[0])} … {_percent(interval[1])} %"


def _percent(share: float) -> str:
    # Not `-0.0`: a sign says which side is better.
    return f"{tenths:+.1f}" if (tenths := round(100 * share, 1)) else "0.0"


def _judgement(result: GateResult) -> str:
    of, several = len(result.findings), len({finding.case for finding in result.findings}) > 1
    if not of:
        return "nothing was compared"
    if result.verdict is Verdict.OK:
        margins = {finding.margin for finding in result.findings}
        within = f"less than {100 * margins.pop():g} % worse" if len(margins) == 1 else "within its margin"
        what = "comparison" if several else "metric"
        which = f"each of {of} {what}s" if of > 1 else result.findings[0].metric
        return f"{which} is surely {within}"
    told = [finding for finding in result.findings if finding.verdict is result.verdict]
    if result.verdict is Verdict.INCONCLUSIVE:
        return f"{len(told)} of {of} comparison{'s' if of > 1 else ''} cannot be told, and nothing failed"
    # A candidate that did not run fails in all metrics of its case at once: that is one thing to say.
    said = list(dict.fromkeys(_failed(finding, several) for finding in told))
    more = len(said) - _NAMED
    return "; ".join(said[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _reasons(result: GateResult) -> list[str]:
    """Why not OK; what several comparisons share is told once."""
    shared: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    every: dict[str, list[str]] = defaultdict(list)
    for finding in result.findings:
        every[finding.case].append(finding.metric)
        if finding.verdict is not Verdict.OK:
            shared[f"{finding.verdict.value}, {finding.text}"][finding.case].append(finding.metric)
    return [f"{_names(of, every)}: {text}" for text, of in shared.items()]


def _names(of: Mapping[str, list[str]], every: Mapping[str, list[str]]) -> str:
    if len(every) == 1:
        return ", ".join(*of.values())
    # A case alone stands for all of its metrics.
    return "; ".join(
        case if len(some) == len(every[case]) > 1 else f"{case} · {', '.join(some)}" for case, some in of.items()
    )


def _failed(finding: Finding, several: bool) -> str:
    if finding.reason is Reason.WORSE and finding.change is not None:
        name = f"{finding.case} · {finding.metric}" if several else finding.metric
        return f"{name} is {100 * abs(finding.change):.1f} % worse"
    return f"the candidate did not run{f' in {finding.case}' if several else ''}"


def _facts(result: GateResult) -> list[tuple[str, str]]:
    counts = sorted({finding.pairs for finding in result.findings if finding.pairs})
    pairs = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) + " " if counts else ""
    took = f"{result.took_s:.0f} s" if result.took_s < 120 else f"{result.took_s / 60:.0f} min"
    facts = [("how", f"{pairs}{_METHODS[result.method]}; {took}")]
    sides = {case.name: _sides(case) for case in result.cases}
    if len(set(map(tuple, sides.values()))) == 1:
        facts += next(iter(sides.values()))
    else:
        facts += [(f"{name}, {label}", text) for name, of in sides.items() for label, text in of]
    # Pairs are of one machine, which is shown once; stored runs of another one are told apart in the findings.
    for machine in filter(None, list(result.machines.values())[-1:]):
        facts.append(("machine", f"{machine.hostname} · {hardware_text(machine.hardware)}"))
    if result.order_seed is not None:
        facts.append(("order seed", str(result.order_seed)))
    return facts


def _sides(case: Case) -> list[tuple[str, str]]:
    baseline, candidate = (case.side(name).describe() for name in SIDES)
    if baseline == candidate:
        return [("both sides", baseline)]
    return [("baseline", baseline), ("candidate", candidate)]


def differences_chart(result: GateResult) -> Chart | None:
    """Pairs from top to bottom in the order measured, hollow where the verdict did not look at them. None where nothing
    was compared."""
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
