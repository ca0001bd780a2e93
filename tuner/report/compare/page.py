"""A comparison as sections of a page: its own, or that of a study's report."""

from __future__ import annotations

from pipetune.tuner.report.compare.plot import draw_comparison
from pipetune.tuner.report.compare.values import StudyComparison
from pipetune.tuner.report.compare.wording import plans_table, remarks_of, studies_table
from pipetune.tuner.report.document import Bullets, Document, Pictures, Section


def page_of(comparison: StudyComparison) -> Document:
    """A page of its own."""
    first, *others = comparison.contestants
    return Document(
        title=f"{first.name} and {len(others)} more",
        facts=tuple((one.name, one.place) for one in comparison.contestants),
        parts=sections_of(comparison),
    )


def sections_of(comparison: StudyComparison) -> tuple[Section, ...]:
    """Each at its own best, the same plans, and what changed."""
    pictures = draw_comparison(comparison)

    def figure(name: str) -> Pictures:
        return Pictures(tuple(pictures[one] for one in (name,) if one in pictures))

    names = ", ".join(one.name for one in comparison.contestants)
    own = (Bullets(remarks_of(comparison)), studies_table(comparison), figure("own_best"))
    found = (Section(f"Compared: {names}", own),)
    plans = plans_table(comparison)
    return (*found, Section("The same plans", (plans, figure("same_plans")))) if plans else found
