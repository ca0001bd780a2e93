"""A gate in words: its table and its remarks, as documents for the screen and for Markdown."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pipetune.bench.record import Machine
from pipetune.tuner.gate.values import SIDES, Case, Finding, GateResult, Reason, Verdict
from pipetune.tuner.report.document import (
    GAP,
    Bullets,
    Cell,
    Column,
    Document,
    Facts,
    Part,
    Section,
    Style,
    Table,
    Text,
    Wrap,
    left,
    rows_of,
)
from pipetune.tuner.report.wording import MISSING, bytes_text, clean, ms_text, number_text

LEGEND = "Worse by: how much more time (of a rate, time per token) or memory the candidate takes; negative is better."
TEXT_COLUMNS = frozenset({"case", "metric", "verdict"})
_METHODS = {
    "fresh_processes": "pairs of fresh processes, in randomised order",
    "running_fleet": "pairs of runs in one running fleet, in randomised order",
    "stored": "stored runs beside others, measured at different times",
}
_NAMED = 2
"""Failures named in the headline; the others are counted."""


_STYLES: dict[Verdict, Style] = {Verdict.OK: "good", Verdict.FAIL: "bad", Verdict.INCONCLUSIVE: "warning"}
_MARKS = {Verdict.OK: "✅", Verdict.FAIL: "❌", Verdict.INCONCLUSIVE: "⚠️"}
_ON_SCREEN = ("metric", "verdict", "worse by", "95 % interval", "baseline", "candidate")


def screen_of(result: GateResult) -> Document:
    """A table for each case, what is to be said of it, and the verdict last, where the eye is."""
    parts: list[Part] = []
    cases = list(dict.fromkeys(finding.case for finding in result.findings))
    for case in cases:
        parts += [Text(clean(case), "strong")] if len(cases) > 1 else []
        findings = [finding for finding in result.findings if finding.case == case]
        parts += [_table(result, findings, marked=False).only(_ON_SCREEN), GAP]
    parts += [Text(LEGEND)] if result.findings else []
    parts += [Text(clean(f"{label}: {text}")) for label, text in _facts(result)]
    headline = Text(_verdict_text(result), _STYLES[result.verdict])
    return Document(parts=(*parts, Bullets(_remarks(result)), GAP, headline))


def markdown_of(result: GateResult) -> Document:
    """For a pull request's comment and a job's summary: how it was measured is folded away."""
    table = replace(_table(result, result.findings, marked=True), legend=LEGEND)
    facts = Facts(tuple((clean(label), clean(text)) for label, text in _facts(result)))
    how = Section("How it was measured", (facts,), is_folded=True)
    return Document(
        title=f"{_MARKS[result.verdict]} pipetune gate · {_verdict_text(result)}",
        parts=(*((table,) if result.findings else ()), Bullets(_remarks(result)), how),
    )


def _table(result: GateResult, findings: Sequence[Finding], *, marked: bool) -> Table:
    """A row for each finding; all text on single lines, whatever a name or an error holds."""
    columns = _columns(result)
    rows = []
    for finding in findings:
        cells: dict[str, Cell] = {name: clean(cell(finding)) for name, cell in columns.items()}
        verdict = finding.verdict.value
        cells["verdict"] = f"{_MARKS[finding.verdict]} {verdict}" if marked else Text(verdict, _STYLES[finding.verdict])
        rows.append(tuple(cells.values()))
    wraps: Mapping[str, Wrap] = {"metric": "prose"}
    titles = (left(name, wraps.get(name, "no")) if name in TEXT_COLUMNS else Column(name) for name in columns)
    return Table(columns=tuple(titles), rows=rows_of(rows), gap=1)


def _verdict_text(result: GateResult) -> str:
    several = len({finding.case for finding in result.findings}) > 1
    return clean(f"{result.verdict.value}: {_headline(result, several)}")


def _remarks(result: GateResult) -> tuple[str, ...]:
    """Why not OK; then what the gate cannot see, and what else a reader must know."""
    blind = (f"not seen: {blind}" for blind in result.cannot_see)
    return tuple(map(clean, (*_reasons(result), *blind, *result.notes)))


def signed(share: float) -> str:
    """`+5.2 %`, `-0.3 %`, `0.0 %`."""
    return f"{_percent(share)} %"


def value_text(metric: str, value: float | None) -> str:
    """In the metric's unit, with the digits that a margin of some percent needs."""
    if value is None or not math.isfinite(value):
        return MISSING if value is None else str(value)
    for end, unit in (
        ("token_throughput", " tok/s"),
        ("output_throughput", " tok/s"),
        ("request_throughput", " req/s"),
    ):
        if metric.endswith(end):
            return number_text(value, 4) + unit
    if metric.endswith("_ms"):
        return f"{number_text(value, 4)} ms" if value < 1000 else f"{number_text(value / 1000, 4)} s"
    if metric.endswith("_s"):
        return ms_text(1000 * value)
    return bytes_text(value) if metric.endswith("_bytes") else number_text(value, 4)


def _columns(result: GateResult) -> dict[str, Callable[[Finding], str]]:
    columns: dict[str, Callable[[Finding], str]] = {
        "case": lambda finding: finding.case,
        "metric": lambda finding: finding.metric,
        "verdict": lambda finding: finding.verdict.value,
        "worse by": lambda finding: MISSING if finding.estimate is None else signed(finding.estimate),
        "95 % interval": lambda finding: interval_text(finding.interval),
        "baseline": lambda finding: value_text(finding.metric, finding.baseline),
        "candidate": lambda finding: value_text(finding.metric, finding.candidate),
        "margin": lambda finding: f"{100 * finding.margin:g} %",
        "noise floor": lambda finding: MISSING if finding.floor is None else f"{100 * finding.floor:.1f} %",
        "pairs": lambda finding: str(finding.pairs),
    }
    absent = {"noise floor", "pairs"} if result.method == "stored" else set()
    return {name: cell for name, cell in columns.items() if name not in absent}


def interval_text(interval: tuple[float, float] | None) -> str:
    """`-0.5 … +0.5 %`."""
    return MISSING if interval is None else f"{_percent(interval[0])} … {_percent(interval[1])} %"


def _percent(share: float) -> str:
    # Not `-0.0`: a sign says which side is better.
    return f"{tenths:+.1f}" if (tenths := round(100 * share, 1)) else "0.0"


def _headline(result: GateResult, several: bool) -> str:
    of = len(result.findings)
    if not of:
        return "nothing was compared"
    if result.verdict is Verdict.OK:
        margins = {finding.margin for finding in result.findings}
        within = f"less than {100 * margins.pop():g} % worse" if len(margins) == 1 else "within its margin"
        what = "comparison" if several else "metric"
        return (
            f"each of {of} {what}s is surely {within}" if of > 1 else f"{result.findings[0].metric} is surely {within}"
        )
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
    if finding.reason is Reason.WORSE and finding.estimate is not None:
        return f"{_name(finding, several)} is {100 * finding.estimate:.1f} % worse"
    return f"the candidate did not run{f' in {finding.case}' if several else ''}"


def _name(finding: Finding, several: bool) -> str:
    return f"{finding.case} · {finding.metric}" if several else finding.metric


def _facts(result: GateResult) -> list[tuple[str, str]]:
    counts = sorted({finding.pairs for finding in result.findings if finding.pairs})
    pairs = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) + " " if counts else ""
    facts = [("how", f"{pairs}{_METHODS[result.method]}; {_took(result.took_s)}")]
    sides = {case.name: _sides(case) for case in result.cases}
    if len(set(map(tuple, sides.values()))) == 1:
        facts += next(iter(sides.values()))
    else:
        facts += [(f"{name}, {label}", text) for name, of in sides.items() for label, text in of]
    # Pairs are of one machine, which is shown once; stored runs of another one are told apart in the findings.
    facts += [("machine", _machine(machine)) for machine in list(result.machines.values())[-1:] if machine is not None]
    if result.order_seed is not None:
        facts.append(("order seed", str(result.order_seed)))
    return facts


def _sides(case: Case) -> list[tuple[str, str]]:
    texts = {name: case.side(name).describe() for name in SIDES}
    if len(set(texts.values())) == 1:
        return [("both sides", texts["baseline"])]
    return list(texts.items())


def _machine(machine: Machine) -> str:
    hardware = machine.hardware
    gpus = list(dict.fromkeys(gpu.name for gpu in hardware.gpus))
    parts = [f"{sum(gpu.name == name for gpu in hardware.gpus)} × {name}" for name in gpus]
    return " · ".join((machine.hostname, *parts, f"{hardware.cpu_model}, {hardware.cpu_cores} cores"))


def _took(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
