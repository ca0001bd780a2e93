"""Writes what a gate leaves behind: a folder of it, JUnit XML alone, and a job's summary where GitHub asks for one."""

import os
from pathlib import Path

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import write_durably
from pipetune.tuner.gate.outputs.junit import render_junit
from pipetune.tuner.gate.outputs.wording import differences_chart, markdown_of
from pipetune.tuner.gate.values import GateResult
from pipetune.tuner.report.render.markdown import render_markdown
from pipetune.tuner.report.render.plot import render_png
from pipetune.tuner.study.files import refuse_existing, refuse_unwritable

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def refuse_places(folder: Path | None, junit: Path | None) -> None:
    """Raises a ConfigError where the folder holds something, the file is there, or one of them cannot be written."""
    if folder is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and is not an empty folder; name a new one for this gate")
        refuse_unwritable(folder)
    refuse_existing(junit)


def write(result: GateResult, folder: Path | None, junit: Path | None) -> None:
    """Writes what was asked for."""
    tests, markdown = render_junit(result), render_markdown(markdown_of(result), level=2)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / "gate.json", result.model_dump_json(indent=1) + "\n")
        write_durably(folder / "junit.xml", tests)
        write_durably(folder / "gate.md", markdown)
        if chart := differences_chart(result):
            write_durably(folder / "differences.png", render_png(chart))
    if junit is not None:
        write_durably(junit, tests)
    if summary := os.environ.get(SUMMARY_VARIABLE):
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(markdown)
        except OSError as error:
            error.filename = summary
            raise
