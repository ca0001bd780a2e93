"""`pipetune export`: prints or writes one plan of a study in the form that another stack loads."""

from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o


@o.settings("device_names", before="output")
def export(
    ctx: typer.Context,
    study: o.StudyArgument,
    form: Annotated[
        str,
        typer.Option(
            "--format", "-f", metavar="FORMAT", help="hf, ranges, plan, vllm, vllm-yaml, sglang, trtllm or llama.cpp."
        ),
    ] = "hf",
    rank: Annotated[int, typer.Option(min=1, help="Which plan of the ranking.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there. [stdout]")
    ] = None,
) -> int:
    """Print the best plan as a device map (hf, ranges), a plan, or lines for another engine."""
    from pipetune.bench.errors import ConfigError, NothingFeasibleError, StudyError
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.conclude import plan_file
    from pipetune.tuner.report.data import Report
    from pipetune.tuner.report.wording import export_note
    from pipetune.tuner.study.files import load_study, study_at, write_new
    from pipetune.tuner.study.plan_file import FORMATS, MAPS, render

    if (known := next((name for name in FORMATS if name == form), None)) is None:
        raise ConfigError(f"--format: {form!r} is none of {', '.join(FORMATS)}")
    contents = load_study(study_at(study))
    report = Report.of(contents)
    common.warn_unread(report)
    ranked = [row for row in report.ranking.rows if row.rank is not None]
    if contents.shape is None or contents.machine is None:
        raise StudyError(contents.unread[-1])
    if not ranked:
        raise NothingFeasibleError(f"{contents.folder}: no plan is ranked, so there is none to export")
    if rank > len(ranked):
        raise ConfigError(f"--rank {rank}: {contents.folder} has {len(ranked)} ranked plans")
    given = ctx.params["device_names"]
    names = tuple(name.strip() for name in given.split(",")) if given else contents.config.device_names
    row = ranked[rank - 1]
    if given and (known not in MAPS or len(names) != len(row.plan.stages)):
        raise ConfigError(
            f"--device-names {given}: name the devices of a map (hf, ranges), one for each of the plan's "
            f"{len(row.plan.stages)} stages, {', '.join(stage.device for stage in row.plan.stages)}"
        )
    lens = report.prompt_lens
    text = render(plan_file(contents, row), contents.shape, known, names, machine=contents.machine, prompt_lens=lens)
    if known in MAPS and (note := export_note(row.plan)) is not None:
        common.warn(note)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_new(output, text)
    return 0
