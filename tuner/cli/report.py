"""`pipetune report`: writes a study's reports anew and prints its ranking."""

from functools import partial
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o


def report(
    study: o.StudyArgument,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="STUDY", help="Compare it with this one, in its page; may be repeated.")
    ] = None,
    json: o.Json = False,
) -> int:
    """Write a study's reports anew and print its ranking."""
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.conclude import conclude
    from pipetune.tuner.study.files import study_at

    folder, show = study_at(study), partial(common.show_study, json=json)
    if not compare:
        return conclude(folder, show)
    from pipetune.tuner.report.compare.files import read_reports
    from pipetune.tuner.report.compare.join import compare_studies
    from pipetune.tuner.report.compare.wording import sections_of

    reports, names = read_reports([study_at(other) for other in (*compare, study)])
    common.warn_unread(*reports[:-1])
    return conclude(folder, show, sections_of(compare_studies(reports, names)))
