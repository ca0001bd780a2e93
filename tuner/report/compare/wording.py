"""A comparison of studies in words, cells and charts: documents of the screen, Markdown and the page, and its CSV."""

import string
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipetune.tuner.report import document as doc
from pipetune.tuner.report.chart import SERIES, Bars, Chart, Dots, Line, Mark, Rule, Words
from pipetune.tuner.report.compare.values import Contestant, StudyComparison
from pipetune.tuner.report.render.csv import Cell as CsvCell
from pipetune.tuner.report.wording import MISSING, bytes_text, percent_text, ratio_text
from pipetune.tuner.stats.ratios import Ratio

_NUMBERS = ("in flight", "tok/s", "× device_map", "tok/s/device", "tok/J", "tok per price", "peak memory", "of its cap")
_STUDY_COLUMNS = (doc.left("study"), doc.left("best plan"), *map(doc.Column, _NUMBERS))
_MOST_PLANS = 12
"""What a screen, or a chart, has room for."""
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
    places = range(len(comparison.contestants))
    letters = [string.ascii_uppercase[place] if place < 26 else str(place + 1) for place in places]
    names = (f"{letter}: {one.name}" for letter, one in zip(letters, comparison.contestants, strict=True))
    studies = _studies(comparison)
    turned = zip(*(row.cells for row in studies.rows), strict=True)
    lines = [(column.title, *cells) for column, cells in zip(studies.columns, turned, strict=True)][1:]
    columns = (doc.Column("", "left", "narrow"), *(doc.Column(name, wrap="narrow") for name in names))
    parts: list[doc.Part] = [doc.Table(columns=columns, rows=doc.rows_of(lines)), doc.GAP]
    if plans := _plans(comparison):
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
    plans = _plans(comparison)
    same = [doc.Section("The same plans", (plans,))] if plans else []
    return doc.Document(
        title=f"{first} against {', '.join(others)}",
        parts=(_studies(comparison), *same, doc.Bullets(remarks_of(comparison))),
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
    own = (doc.Bullets(remarks_of(comparison)), _studies(comparison), figure("own_best"))
    plans = _plans(comparison)
    same = (doc.Section("The same plans", (plans, figure("same_plans"))),) if plans else ()
    return (doc.Section(f"Compared: {names}", own), *same)


def _studies(comparison: StudyComparison) -> doc.Table:
    """Each study at its own best, in the columns that any study has something for."""
    rows = [_study(one) for one in comparison.contestants]
    columns = _STUDY_COLUMNS
    if any(one.best is not None and one.best.plan.engine is not None for one in comparison.contestants):
        columns = tuple(replace(one, title=one.title.replace("device_map", "un-pipelined")) for one in columns)
    cells = zip(columns, zip(*rows, strict=True), strict=True)
    kept = [column.title for column, of in cells if any(cell != MISSING for cell in of)]
    return doc.Table(columns=columns, rows=doc.rows_of(rows)).only(kept)


def _plans(comparison: StudyComparison) -> doc.Table | None:
    """The plans that several studies ran; None where there is none."""
    if not comparison.plans:
        return None
    names = [one.name for one in comparison.contestants]
    titles = (*names, *(f"{name} / first" for name in names[1:]))
    rows = []
    for plan in comparison.plans:
        speeds = (f"{plan.figures[name].throughput:.1f}" if name in plan.figures else MISSING for name in names)
        rows.append((plan.text, *speeds, *(_ratio(plan.ratios.get(name)) for name in names[1:])))
    return doc.Table(columns=(doc.left("plan"), *map(doc.Column, titles)), rows=doc.rows_of(rows))


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
        for one in (each for each in comparison.contestants if each.name in figures):
            own, ratio = figures[one.name], ratios.get(one.name)
            yield {
                "plan": text,
                "study": one.name,
                "is_best": one.best_key == key,
                "tokens_per_s": own.throughput,
                "runs": len(own.throughputs),
                **({"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high} if ratio else {}),
                "in_flight": own.in_flight,
                "cap_bytes": " ".join(map(str, own.cap_bytes)),
                "peak_bytes": " ".join(map(str, own.peak_bytes)),
                "tokens_per_joule": own.tokens_per_joule,
                "devices": " ".join(one.devices),
                "price_per_hour": one.price_per_hour,
            }


def _ratio(ratio: Ratio | None) -> str:
    """`0.92 (0.89–0.95)`."""
    if ratio is None:
        return MISSING
    interval = "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.3f}–{ratio.high:.3f})"
    return f"{ratio.value:.3f}{interval}"


def _study(one: Contestant) -> tuple[str, ...]:
    if (best := one.best) is None:
        return (one.name, "none has a rank", *[MISSING] * (len(_STUDY_COLUMNS) - 2))
    return (
        one.name,
        best.plan.describe(),
        str(best.in_flight),
        f"{best.throughput:.1f}",
        ratio_text(one.over_baseline),
        _number(one.tokens_per_device, 1),
        _number(best.tokens_per_joule, 2),
        _number(one.tokens_per_price, 0),
        bytes_text(best.metrics.get("peak_memory_bytes")),
        percent_text(best.metrics.get("peak_memory_fraction")),
    )


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _below(cells: Sequence[doc.Cell], speeds: int) -> tuple[doc.Cell, ...]:
    """Ratios with their intervals in a second line: side by side, two of them fill a screen."""
    ratios = (doc.Text(cell.replace(" ", "\n", 1)) if isinstance(cell, str) else cell for cell in cells[1 + speeds :])
    return (*cells[: 1 + speeds], *ratios)


def comparison_figures(comparison: StudyComparison) -> dict[str, doc.Figure]:
    """Figures by file name without ending; what there is no data for is left out."""
    figures = {}
    if any(one.best for one in comparison.contestants):
        figures["own_best"] = doc.Figure("Each study at its own best", _best_chart(comparison), wide=True)
    if any(plan.ratios for plan in comparison.plans):
        alt = "The same plans, as ratios over the first study"
        figures["same_plans"] = doc.Figure(alt, _ratios_chart(comparison), wide=True)
    return figures


def _best_chart(comparison: StudyComparison) -> Chart:
    """Tokens per second of each study's best plan."""
    shown = [(one.name, one.best) for one in comparison.contestants if one.best is not None]
    bars = [
        Bars(spans=((row + 0.14, 0.0, best.throughput, ""),), colour=SERIES[row % len(SERIES)], height=0.36)
        for row, (_, best) in enumerate(shown)
    ]
    # Above its bar, where a long plan has room whatever the bar's length and colour.
    words = Words(
        xs=(0.0,) * len(shown),
        ys=tuple(row - 0.1 for row in range(len(shown))),
        texts=tuple(f"{best.throughput:.1f} · {best.plan.describe()}" for _, best in shown),
    )
    return Chart(
        title="Each study at its own best",
        x_label="tokens / s",
        marks=(*bars, words),
        rows=tuple(_folded(name) for name, _ in shown),
        size=(8.4, 1.2 + 0.7 * len(shown)),
        x_range=(0.0, 1.06 * max(best.throughput for _, best in shown)),
    )


def _ratios_chart(comparison: StudyComparison) -> Chart:
    """The fastest shared plans, each later study's throughput over the first one's."""
    plans = [plan for plan in comparison.plans if plan.ratios][:_MOST_PLANS]
    later = [one.name for one in comparison.contestants[1:]]
    marks: list[Mark] = [Rule(at=1.0, is_upright=True)]
    for index, name in enumerate(later):
        colour = SERIES[(index + 1) % len(SERIES)]
        shift = 0.22 * (index - (len(later) - 1) / 2)
        found = [(row + shift, plan.ratios[name]) for row, plan in enumerate(plans) if name in plan.ratios]
        for row, ratio in found:
            if ratio.low is not None and ratio.high is not None:
                marks.append(Line(xs=(ratio.low, ratio.high), ys=(row, row), colour=colour))
        if found:
            xs, ys = tuple(ratio.value for _, ratio in found), tuple(row for row, _ in found)
            marks.append(Dots(xs=xs, ys=ys, colour=colour, label=name))
    return Chart(
        title=f"The same plans, over {comparison.contestants[0].name}",
        x_label="throughput ratio, with 95 % intervals by runs",
        marks=tuple(marks),
        rows=tuple(_folded(plan.text, 40) for plan in plans),
        size=(8.4, 1.6 + 0.42 * len(plans) * max(1, len(later))),
    )


def _folded(text: str, width: int = 24) -> str:
    return "\n".join(textwrap.wrap(text, width))
