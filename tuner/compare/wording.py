"""A comparison of studies in words and cells, which the screen, Markdown, CSV and HTML draw each in their way."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from tuner.compare.values import Contestant, RatioText, SharedPlan, StudyComparison
from tuner.report.markdown import escaped
from tuner.report.wording import bytes_text, clean

STUDY_COLUMNS = (
    "study", "best plan", "in flight", "tok/s", "× device_map", "tok/s/device", "tok/J", "tok per price", "peak / cap",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What is told of a comparison."""

    studies: tuple[tuple[str, ...], ...]
    """Cells along `STUDY_COLUMNS`."""
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
        remarks += [f"{change.name}, software: {line}" for line in change.software]
    remarks += [f"{plan.text}: {note}" for plan in comparison.plans for note in plan.notes]
    return Story(
        studies=tuple(_study(one) for one in comparison.contestants),
        plan_columns=("plan", *names, *(f"{name} / first" for name in names[1:])),
        plans=tuple(_plan(plan, names) for plan in comparison.plans),
        remarks=tuple(remarks),
    )


def render_markdown(comparison: StudyComparison) -> str:
    """GitHub-flavoured Markdown, last newline included."""
    story = story_of(comparison)
    first, *others = (one.name for one in comparison.contestants)
    out = [f"# {escaped(first)} against {escaped(', '.join(others))}", ""]
    out += _table(STUDY_COLUMNS, story.studies)
    if story.plans:
        out += ["", "## The same plans", "", *_table(story.plan_columns, story.plans)]
    out += ["", *(f"- {escaped(remark)}" for remark in story.remarks)]
    return "\n".join([*out, ""])


def render_csv(comparison: StudyComparison) -> str:
    """Every plan that two studies share, a line a study, in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ("plan", "study", "is_best", "tokens_per_s", "runs", "ratio", "ratio_low", "ratio_high", "in_flight",
         "cap_bytes", "peak_bytes", "devices", "price_per_hour")  # fmt: skip
    )
    for plan in comparison.plans:
        for one in comparison.contestants:
            figures = plan.figures.get(one.name)
            if figures is None:
                continue
            ratio = plan.ratios.get(one.name)
            writer.writerow(
                (
                    clean(plan.text),
                    clean(one.name),
                    one.best_key == plan.key,
                    repr(figures.throughput),
                    len(figures.throughputs),
                    *((ratio.value, ratio.low, ratio.high) if ratio else (None, None, None)),
                    figures.in_flight,
                    " ".join(map(str, figures.cap_bytes)),
                    " ".join(map(str, figures.peak_bytes)),
                    " ".join(one.devices),
                    one.price_per_hour,
                )
            )
    return out.getvalue()


def ratio_cell(ratio: RatioText | None) -> str:
    """`0.92 (0.89–0.95)`."""
    if ratio is None:
        return "–"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f}"
    return f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"


def _study(one: Contestant) -> tuple[str, ...]:
    best = one.best
    if best is None:
        return (one.name, "none has a rank", *["–"] * (len(STUDY_COLUMNS) - 2))
    fullest = max(zip(best.peak_bytes, best.cap_bytes, strict=True), key=lambda pair: pair[0] / pair[1], default=None)
    return (
        one.name,
        best.plan.describe(),
        str(best.in_flight),
        f"{best.throughput:.1f}",
        f"{best.throughput / one.baseline:.2f}" if one.baseline else "–",
        _number(one.tokens_per_device, 1),
        _number(one.tokens_per_joule, 2),
        _number(one.tokens_per_price, 0),
        f"{bytes_text(fullest[0])} / {bytes_text(fullest[1])}" if fullest else "–",
    )


def _plan(plan: SharedPlan, names: list[str]) -> tuple[str, ...]:
    speeds = [f"{plan.figures[name].throughput:.1f}" if name in plan.figures else "–" for name in names]
    return (plan.text, *speeds, *(ratio_cell(plan.ratios.get(name)) for name in names[1:]))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(columns: tuple[str, ...], lines: tuple[tuple[str, ...], ...]) -> list[str]:
    return [
        "| " + " | ".join(map(escaped, columns)) + " |",
        "|" + "|".join(" :--- " if name in ("study", "plan", "best plan") else " ---: " for name in columns) + "|",
        *("| " + " | ".join(map(escaped, line)) + " |" for line in lines),
    ]
