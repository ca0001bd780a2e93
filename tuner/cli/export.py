"""`pipetune export`: prints or writes one plan of a study in the form that another stack loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o


@o.settings("device_names", before="output")
def export(
    ctx: typer.Context,
    study: o.StudyArgument,
    form: Annotated[
        str, typer.Option("--format", "-f", metavar="FORMAT", help="hf, seed, plan, vllm or sglang.")
    ] = "hf",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Which plan of the ranking.")] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Instead of stdout.")] = None,
) -> int:
    """Print the best plan as a device map (hf, seed), a plan, or a line for vLLM or SGLang."""
    from pipetune.bench.errors import ConfigError, NothingFeasibleError
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.conclude import plan_file
    from pipetune.tuner.report.data import Report
    from pipetune.tuner.report.wording import export_note
    from pipetune.tuner.study.files import write_new
    from pipetune.tuner.study.plan_file import FORMATS, render
    from pipetune.tuner.study.store import load_study

    known = next((name for name in FORMATS if name == form), None)
    if known is None:
        raise ConfigError(f"--format: {form!r} is none of {', '.join(FORMATS)}")
    contents = load_study(common.study_at(study))
    ranked = [row for row in Report.of(contents).ranking.rows if row.rank is not None]
    if not ranked:
        raise NothingFeasibleError(f"{contents.folder}: no plan is ranked, so there is none to export")
    if rank > len(ranked):
        raise ConfigError(f"--rank {rank}: {contents.folder} has {len(ranked)} ranked plans")
    given = ctx.params["device_names"]
    names = tuple(name.strip() for name in given.split(",")) if given else contents.config.device_names
    row = ranked[rank - 1]
    text = render(plan_file(contents, row), contents.shape, known, names)
    note = export_note(row.plan) if known in ("hf", "seed") else None
    if note is not None:
        common.err().print(f"pipetune: {note}", markup=False, soft_wrap=True)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_new(output, text)
    return 0
