"""`pipetune report`: writes a study's reports anew and prints its ranking."""

from __future__ import annotations

from tuner.cli import options as o


def report(study: o.StudyArgument, json: o.Json = False) -> int:
    """Write a study's reports anew and print its ranking."""
    from tuner.cli import common
    from tuner.conclusion import conclude

    return common.show_study(conclude(common.study_at(study)), json=json)
