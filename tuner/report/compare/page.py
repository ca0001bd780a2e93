"""A comparison as sections of a page: its own, or that of a study's report."""

from __future__ import annotations

from pipetune.tuner.report.canvas import DARK
from pipetune.tuner.report.compare.plot import render_plots
from pipetune.tuner.report.compare.values import StudyComparison
from pipetune.tuner.report.compare.wording import story_of
from pipetune.tuner.report.page import Grid, Section, picture, render_page

_TEXT_COLUMNS = frozenset({"study", "best plan", "plan"})
_ALTS = {"own_best": "Each study at its own best", "same_plans": "The same plans, as ratios over the first study"}


def sections_of(comparison: StudyComparison) -> tuple[Section, ...]:
    """Each at its own best, the same plans, and what changed."""
    story = story_of(comparison)
    plots, dark = render_plots(comparison), render_plots(comparison, DARK)
    pictures = {name: picture(_ALTS[name], png, dark[name]) for name, png in plots.items()}
    names = [one.name for one in comparison.contestants]
    found = [
        Section(
            heading=f"Compared: {', '.join(names)}",
            remarks=story.remarks,
            grids=(Grid(columns=story.study_columns, lines=story.studies, text_columns=_TEXT_COLUMNS),),
            pictures=tuple(pictures[name] for name in ("own_best",) if name in pictures),
        )
    ]
    if story.plans:
        found.append(
            Section(
                heading="The same plans",
                grids=(Grid(columns=story.plan_columns, lines=story.plans, text_columns=_TEXT_COLUMNS),),
                pictures=tuple(pictures[name] for name in ("same_plans",) if name in pictures),
            )
        )
    return tuple(found)


def render_html(comparison: StudyComparison) -> str:
    """A page of its own."""
    first = comparison.contestants[0]
    facts = [(one.name, one.place) for one in comparison.contestants]
    return render_page(f"{first.name} and {len(comparison.contestants) - 1} more", facts, sections_of(comparison))
