"""README's picture: `python -m tests.evaluation.picture STUDY FILE.svg` draws how a study's best pipeline ran."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

from pipetune.tuner.report.data import Report
from pipetune.tuner.report.render.plot import draw
from pipetune.tuner.report.study_charts import timeline_chart
from pipetune.tuner.study.files import load_study


def main(study: Path, file: Path) -> None:
    """Writes the picture; copies of the whole model are no pipeline."""
    report = Report.of(load_study(study))
    rows = tuple(row for row in report.ranking.rows if len(row.plan.stages) > 1 and row.plan.replicas == 1)
    chart = timeline_chart(report.model_copy(update={"ranking": report.ranking.model_copy(update={"rows": rows})}))
    assert chart is not None, f"{study}: no pipeline was measured with its stages' times"
    bare = replace(chart, size=(9.0, 2.6))
    # Letters stay letters, and equal pictures are equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pipetune", "font.family": "sans-serif"}):
        draw(bare).savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
