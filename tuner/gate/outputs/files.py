"""Writes what a gate leaves behind: a folder of it, JUnit XML alone, and a job's summary where GitHub asks for one."""

from __future__ import annotations

import os
from pathlib import Path

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import write_durably
from pipetune.tuner.gate.outputs.junit import render_junit
from pipetune.tuner.gate.outputs.plot import differences_chart
from pipetune.tuner.gate.outputs.wording import markdown_of
from pipetune.tuner.gate.values import GateResult
from pipetune.tuner.report.render.markdown import render_markdown
from pipetune.tuner.report.render.plot import render_png
from pipetune.tuner.study.files import refuse_existing

RESULT_FILE, JUNIT_FILE, MARKDOWN_FILE, PLOT_FILE = "gate.json", "junit.xml", "gate.md", "differences.png"
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def refuse_places(folder: Path | None, junit: Path | None) -> None:
    """Refuses to overwrite what is there, before anything is measured.

    Raises:
        ConfigError: the folder holds something, or the file is there.
    """
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; name a new one for this gate")
    refuse_existing(junit)


def write(result: GateResult, folder: Path | None, junit: Path | None) -> None:
    """Writes what was asked for.

    Raises:
        ConfigError: it cannot be written.
    """
    summary = os.environ.get(SUMMARY_VARIABLE)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(folder / RESULT_FILE, result.model_dump_json(indent=1) + "\n")
            write_durably(folder / JUNIT_FILE, render_junit(result))
            write_durably(folder / MARKDOWN_FILE, render_markdown(markdown_of(result), level=2))
            chart = differences_chart(result)
            if chart is not None:
                (folder / PLOT_FILE).write_bytes(render_png(chart))
        if junit is not None:
            write_durably(junit, render_junit(result))
        if summary:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(render_markdown(markdown_of(result), level=2))
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder or junit}: cannot be written: {error.strerror or error}"
        ) from None
