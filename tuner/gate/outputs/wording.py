"""A gate in words: one table and its remarks, which the screen and Markdown draw each in their way."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.gate.values import SIDES, Finding, GateResult, Verdict

COLUMNS = ("case", "metric", "baseline", "candidate", "worse by", "95 % interval", "margin", "pairs", "verdict")
METHODS = {
    "fresh_processes": "pairs of fresh processes, their order drawn by lot",
    "running_fleet": "pairs of runs in one running fleet, their order drawn by lot",
    "stored": "stored runs beside new ones, measured at different times",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One hypothesis."""

    cells: tuple[str, ...]
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """A gate for people."""

    headline: str
    facts: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]


def story_of(result: GateResult) -> Story:
    """What is told of a gate."""
    counts = {verdict: sum(one.verdict is verdict for one in result.findings) for verdict in Verdict}
    of = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)
    facts = [("how", f"{METHODS[result.method]}; {_took(result.took_s)}")]
    for case in result.cases:
        prefix = f"{case.name}, " if len(result.cases) > 1 else ""
        facts += [(f"{prefix}{name}", case.side(name).describe()) for name in SIDES]
    if result.order_seed is not None:
        facts.append(("order seed", str(result.order_seed)))
    remarks = [f"{finding.case} · {finding.metric}: {finding.text}" for finding in result.findings if finding.text]
    remarks += [f"not seen: {blind}" for blind in result.cannot_see]
    return Story(
        headline=f"{result.verdict.value} ({of or 'nothing was compared'})",
        facts=tuple(facts),
        lines=tuple(Line(cells=_cells(finding), verdict=finding.verdict) for finding in result.findings),
        remarks=(*remarks, *result.notes),
    )


def signed(share: float) -> str:
    """`+5.2 %`, `-0.3 %`."""
    return f"{100 * share:+.1f} %"


def value_text(metric: str, value: float | None) -> str:
    """In the metric's unit, as people read it."""
    if value is None:
        return "–"
    if metric.endswith("_throughput"):
        return f"{value:.1f}/s"
    if metric.endswith("_ms"):
        return f"{value:.1f} ms"
    if metric.endswith("_bytes"):
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.4g}"


def _cells(finding: Finding) -> tuple[str, ...]:
    interval = finding.interval
    return (
        finding.case,
        finding.metric,
        value_text(finding.metric, finding.baseline),
        value_text(finding.metric, finding.candidate),
        "–" if finding.estimate is None else signed(finding.estimate),
        "–" if interval is None else f"{signed(interval[0])} … {signed(interval[1])}",
        f"{100 * finding.margin:g} %",
        str(finding.pairs),
        finding.verdict.value,
    )


def _took(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
