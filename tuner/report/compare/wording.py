"""A comparison of studies in words and cells, which the screen, Markdown, CSV and HTML draw each in their way."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from pipetune.tuner.report.compare.values import Contestant, Figures, RatioText, SharedPlan, StudyComparison
from pipetune.tuner.report.markdown import escaped
from pipetune.tuner.report.spreadsheet import Cell, safe_cell
from pipetune.tuner.report.wording import MISSING, bytes_text

STUDY_COLUMNS = (
    "study", "best plan", "in flight", "tok/s", "× device_map", "tok/s/device", "tok/J", "tok per price", "peak / cap",
)  # fmt: skip

_CSV_COLUMNS = (
    "plan", "study", "is_best", "tokens_per_s", "runs", "ratio", "ratio_low", "ratio_high", "in_flight", "cap_bytes",
    "peak_bytes", "tokens_per_joule", "devices", "price_per_hour",
)  # fmt: skip
_OF_INTERVALS = (
    "Intervals say how much runs of one study differ among each other, and nothing of how much nights or sessions do: "
    "an interval that leaves 1 out may be the night's. pipetune gate measures both side by side, and can tell."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What is told of a comparison."""

    study_columns: tuple[str, ...]
    """Those of `STUDY_COLUMNS` that any study has something for."""
    studies: tuple[tuple[str, ...], ...]
    plan_columns: tuple[str, ...]
    plans: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...]


def story_of(comparison: StudyComparison) -> Story:
    """The tables and what is to be said of them."""
    names = [one.name for one in comparison.contestants]
    remarks = []
    for change in comparison.changes:
        remarks.append(change.text)
        remarks += [f"{change.name}, hardware: {line}" for line in change.hardware]
        remarks += [f"{change.name}, measured otherwise: {line}" for line in change.protocol]
        remarks += [f"{change.name}, software: {line}" for line in change.software]
    remarks += [f"{plan.text}: {note}" for plan in comparison.plans for note in plan.notes]
    if any(ratio.low is not None for plan in comparison.plans for ratio in plan.ratios.values()):
        remarks.append(_OF_INTERVALS)
    lines = [_study(one) for one in comparison.contestants]
    kept = [index for index in range(len(STUDY_COLUMNS)) if any(line[index] != MISSING for line in lines)]
    return Story(
        study_columns=tuple(STUDY_COLUMNS[index] for index in kept),
        studies=tuple(tuple(line[index] for index in kept) for line in lines),
        plan_columns=("plan", *names, *(f"{name} / first" for name in names[1:])),
        plans=tuple(_plan(plan, names) for plan in comparison.plans),
        remarks=tuple(remarks),
    )


def render_markdown(comparison: StudyComparison) -> str:
    """GitHub-flavoured Markdown, last newline included."""
    story = story_of(comparison)
    first, *others = (one.name for one in comparison.contestants)
    out = [f"# {escaped(first)} against {escaped(', '.join(others))}", ""]
    out += _table(story.study_columns, story.studies)
    if story.plans:
        out += ["", "## The same plans", "", *_table(story.plan_columns, story.plans)]
    out += ["", *(f"- {escaped(remark)}" for remark in story.remarks)]
    return "\n".join([*out, ""])


def render_csv(comparison: StudyComparison) -> str:
    """Every plan that two studies share and every best one, a line a study, in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    shared = {plan.key: (plan.text, plan.figures, plan.ratios) for plan in comparison.plans}
    for one in comparison.contestants:
        # A best plan that no other study has run stands alone.
        if one.best is not None and one.best_key is not None:
            shared.setdefault(one.best_key, (one.best.plan.describe(), {one.name: one.best}, {}))
    for key, (text, figures, ratios) in shared.items():
        for one in comparison.contestants:
            if one.name in figures:
                cells = _csv_line(text, one, key, figures[one.name], ratios.get(one.name))
                writer.writerow([safe_cell(cell) for cell in cells])
    return out.getvalue()


def _csv_line(text: str, one: Contestant, key: str, figures: Figures, ratio: RatioText | None) -> tuple[Cell, ...]:
    return (
        text,
        one.name,
        one.best_key == key,
        figures.throughput,
        len(figures.throughputs),
        *((ratio.value, ratio.low, ratio.high) if ratio else (None, None, None)),
        figures.in_flight,
        " ".join(map(str, figures.cap_bytes)),
        " ".join(map(str, figures.peak_bytes)),
        figures.tokens_per_joule,
        " ".join(one.devices),
        one.price_per_hour,
    )


def ratio_cell(ratio: RatioText | None) -> str:
    """`0.92 (0.89–0.95)`."""
    if ratio is None:
        return MISSING
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f}"
    return f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"


def _study(one: Contestant) -> tuple[str, ...]:
    best = one.best
    if best is None:
        return (one.name, "none has a rank", *[MISSING] * (len(STUDY_COLUMNS) - 2))
    fullest = max(zip(best.peak_bytes, best.cap_bytes, strict=True), key=lambda pair: pair[0] / pair[1], default=None)
    return (
        one.name,
        best.plan.describe(),
        str(best.in_flight),
        f"{best.throughput:.1f}",
        f"{best.throughput / one.baseline:.2f}" if one.baseline else MISSING,
        _number(one.tokens_per_device, 1),
        _number(one.tokens_per_joule, 2),
        _number(one.tokens_per_price, 0),
        f"{bytes_text(fullest[0])} / {bytes_text(fullest[1])}" if fullest else MISSING,
    )


def _plan(plan: SharedPlan, names: list[str]) -> tuple[str, ...]:
    speeds = [f"{plan.figures[name].throughput:.1f}" if name in plan.figures else MISSING for name in names]
    return (plan.text, *speeds, *(ratio_cell(plan.ratios.get(name)) for name in names[1:]))


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _table(columns: tuple[str, ...], lines: tuple[tuple[str, ...], ...]) -> list[str]:
    return [
        "| " + " | ".join(map(escaped, columns)) + " |",
        "|" + "|".join(" :--- " if name in ("study", "plan", "best plan") else " ---: " for name in columns) + "|",
        *("| " + " | ".join(map(escaped, line)) + " |" for line in lines),
    ]
