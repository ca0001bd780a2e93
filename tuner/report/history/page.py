"""A history as a page: a section for each question, a plot for each metric."""

from __future__ import annotations

from pipetune.tuner.report.canvas import DARK
from pipetune.tuner.report.history.plots import render_plots
from pipetune.tuner.report.history.values import History, Question
from pipetune.tuner.report.history.wording import COLUMNS, events_of, lines_of, trust_text
from pipetune.tuner.report.page import Grid, Section, picture, render_page


def render_html(history: History) -> str:
    """The page."""
    nights = sum(len(question.nights) for question in history.questions)
    changes = sum(len(events_of(question)) for question in history.questions)
    facts = [("nights", str(nights)), ("changes of level", f"from {changes} nights on" if changes else "none")]
    facts += [("not read", text) for text in history.skipped]
    return render_page("History", facts, [_section(question) for question in history.questions])


def _section(question: Question) -> Section:
    light, dark = render_plots(question), render_plots(question, DARK)
    return Section(
        heading=question.title,
        remarks=(
            f"{len(question.nights)} nights on {question.machine}.",
            *([event.text for event in events_of(question)] or ["No level has changed."]),
            trust_text(question),
        ),
        grids=(Grid(columns=COLUMNS, lines=tuple(lines_of(question)), text_columns=frozenset({"subject", "metric"})),),
        pictures=tuple(picture(f"{metric}, night by night", png, dark[metric]) for metric, png in light.items()),
    )
