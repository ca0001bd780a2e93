"""A comparison of studies in words and cells, which the screen, Markdown, CSV and HTML draw each in their way."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence

from pipetune.tuner.report import document as doc
from pipetune.tuner.report.compare.charts import comparison_figures
from pipetune.tuner.report.compare.values import Contestant, PlanResult, SharedPlan, StudyComparison, StudyRatio
from pipetune.tuner.report.render.csv import Cell as CsvCell
from pipetune.tuner.report.wording import MISSING, bytes_text

STUDY_COLUMNS = (
    "study", "best plan", "in flight", "tok/s", "× device_map", "tok/s/device", "tok/J", "tok per price", "peak / cap",
)  # fmt: skip

_MOST_PLANS = 12
"""What a screen has room for."""
CSV_COLUMNS = (
    "plan", "study", "is_best", "tokens_per_s", "runs", "ratio", "ratio_low", "ratio_high", "in_flight", "cap_bytes",
    "peak_bytes", "tokens_per_joule", "devices", "price_per_hour",
)  # fmt: skip
_OF_INTERVALS = (
    "Intervals say how much runs of one study differ among each other, and nothing of how much nights or sessions do: "
    "an interval that leaves 1 out may be the night's. pipetune gate measures both side by side, and can tell."
)


def screen_of(comparison: StudyComparison) -> doc.Document:
    """For a terminal of 80 columns: each study at its own best, the same plans, then what is to be said."""
    # A study has more figures than a line has room for: they stand below each other. Names are long, and ratios must
    # not be torn: letters stand for them.
    letters = [_letter(place) for place in range(len(comparison.contestants))]
    names = (f"{letter}: {one.name}" for letter, one in zip(letters, comparison.contestants, strict=True))
    studies = studies_table(comparison)
    turned = zip(*(row.cells for row in studies.rows), strict=True)
    lines = [(column.title, *cells) for column, cells in zip(studies.columns, turned, strict=True)][1:]
    columns = (doc.Column("", "left", "narrow"), *(doc.Column(name, wrap="narrow") for name in names))
    parts: list[doc.Part] = [doc.Table(columns=columns, rows=doc.rows_of(lines)), doc.GAP]
    if plans := plans_table(comparison):
        shown = [_below(row.cells, len(letters)) for row in plans.rows[:_MOST_PLANS]]
        titles = (*letters, *(f"{letter} / first" for letter in letters[1:]))
        parts.append(doc.Table(columns=(doc.left("plan", "narrow"), *map(doc.Column, titles)), rows=doc.rows_of(shown)))
        if len(plans.rows) > _MOST_PLANS:
            parts.append(doc.Text(f"and {len(plans.rows) - _MOST_PLANS} plans more, in the CSV of --output-dir"))
        parts.append(doc.GAP)
    return doc.Document(parts=(*parts, doc.Bullets(remarks_of(comparison))))


def whole_of(comparison: StudyComparison) -> doc.Document:
    """All of the comparison: what `compare.md` holds."""
    first, *others = (one.name for one in comparison.contestants)
    plans = plans_table(comparison)
    same = [doc.Section("The same plans", (plans,))] if plans else []
    return doc.Document(
        title=f"{first} against {', '.join(others)}",
        parts=(studies_table(comparison), *same, doc.Bullets(remarks_of(comparison))),
    )


def page_of(comparison: StudyComparison) -> doc.Document:
    """A page of its own."""
    first, *others = comparison.contestants
    return doc.Document(
        title=f"{first.name} and {len(others)} more",
        facts=tuple((one.name, one.place) for one in comparison.contestants),
        parts=sections_of(comparison),
    )


def sections_of(comparison: StudyComparison) -> tuple[doc.Section, ...]:
    """Parts of a page, its own or that of a study's report: each at its own best, the same plans, and what changed."""
    figures = comparison_figures(comparison)

    def figure(name: str) -> doc.Figures:
        return doc.Figures((figures[name],) if name in figures else ())

    names = ", ".join(one.name for one in comparison.contestants)
    own = (doc.Bullets(remarks_of(comparison)), studies_table(comparison), figure("own_best"))
    plans = plans_table(comparison)
    same = (doc.Section("The same plans", (plans, figure("same_plans"))),) if plans else ()
    return (doc.Section(f"Compared: {names}", own), *same)


def studies_table(comparison: StudyComparison) -> doc.Table:
    """Each study at its own best, in the columns that any study has something for."""
    rows = [_study(one) for one in comparison.contestants]
    kept = [name for place, name in enumerate(STUDY_COLUMNS) if any(row[place] != MISSING for row in rows)]
    columns = tuple(doc.left(name) if name in ("study", "best plan") else doc.Column(name) for name in STUDY_COLUMNS)
    return doc.Table(columns=columns, rows=doc.rows_of(rows)).only(kept)


def plans_table(comparison: StudyComparison) -> doc.Table | None:
    """The plans that several studies ran; None where there is none."""
    if not comparison.plans:
        return None
    names = [one.name for one in comparison.contestants]
    titles = (*names, *(f"{name} / first" for name in names[1:]))
    return doc.Table(
        columns=(doc.left("plan"), *map(doc.Column, titles)),
        rows=doc.rows_of(_plan(plan, names) for plan in comparison.plans),
    )


def remarks_of(comparison: StudyComparison) -> tuple[str, ...]:
    """What changed from the first study to each later one, and what intervals do not say."""
    remarks = []
    for change in comparison.changes:
        remarks.append(change.text)
        remarks += [f"{change.name}, hardware: {line}" for line in change.hardware]
        remarks += [f"{change.name}, measured otherwise: {line}" for line in change.protocol]
        remarks += [f"{change.name}, software: {line}" for line in change.software]
    remarks += [f"{plan.text}: {note}" for plan in comparison.plans for note in plan.notes]
    if any(ratio.low is not None for plan in comparison.plans for ratio in plan.ratios.values()):
        remarks.append(_OF_INTERVALS)
    return tuple(remarks)


def entries_of(comparison: StudyComparison) -> Iterator[dict[str, CsvCell]]:
    """Rows of `compare.csv`: every plan that two studies share and every best one, a row a study."""
    shared = {plan.key: (plan.text, plan.figures, plan.ratios) for plan in comparison.plans}
    for one in comparison.contestants:
        # A best plan that no other study has run stands alone.
        if one.best is not None and one.best_key is not None:
            shared.setdefault(one.best_key, (one.best.plan.describe(), {one.name: one.best}, {}))
    for key, (text, figures, ratios) in shared.items():
        for one in comparison.contestants:
            if one.name in figures:
                cells = _csv_line(text, one, key, figures[one.name], ratios.get(one.name))
                yield dict(zip(CSV_COLUMNS, cells, strict=True))


def _csv_line(
    text: str, one: Contestant, key: str, figures: PlanResult, ratio: StudyRatio | None
) -> tuple[CsvCell, ...]:
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


def ratio_cell(ratio: StudyRatio | None) -> str:
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


def _letter(place: int) -> str:
    return string.ascii_uppercase[place] if place < len(string.ascii_uppercase) else str(place + 1)


def _below(cells: Sequence[doc.Cell], speeds: int) -> tuple[doc.Cell, ...]:
    """Ratios with their intervals in a second line: side by side, two of them fill a screen."""
    ratios = (cell.replace(" ", "\n", 1) if isinstance(cell, str) else cell for cell in cells[1 + speeds :])
    return (*cells[: 1 + speeds], *ratios)
