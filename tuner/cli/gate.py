"""`pipetune gate`: whether a candidate is worse than the baseline, measured side by side on this machine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o

_SIDES = "What differs"
_RULE = "Rule"
_FILES = "Output"


@o.settings("Model", "Workload", before="output_dir", without=("dtype",))
def gate(
    ctx: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[BASELINE.json CANDIDATE.json]", help="Two files of pytest-benchmark, already measured."
        ),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", metavar="FILE", help="YAML file with any of the settings; each is a case."),
    ] = None,
    baseline_plan: Annotated[
        Path | None,
        typer.Option("--baseline-plan", metavar="FILE", help="best_plan.json or a bare plan.", rich_help_panel=_SIDES),
    ] = None,
    candidate_plan: Annotated[
        Path | None,
        typer.Option("--candidate-plan", metavar="FILE", help="… by default the same.", rich_help_panel=_SIDES),
    ] = None,
    baseline_dtype: Annotated[
        str | None, typer.Option("--baseline-dtype", help="float32, bfloat16 or float16.", rich_help_panel=_SIDES)
    ] = None,
    candidate_dtype: Annotated[
        str | None, typer.Option("--candidate-dtype", help="… else what the settings say.", rich_help_panel=_SIDES)
    ] = None,
    baseline_python: Annotated[
        str | None,
        typer.Option("--baseline-python", metavar="PYTHON", help="Of another environment.", rich_help_panel=_SIDES),
    ] = None,
    candidate_python: Annotated[
        str | None,
        typer.Option("--candidate-python", metavar="PYTHON", help="… for the candidate.", rich_help_panel=_SIDES),
    ] = None,
    baseline_ref: Annotated[
        str | None,
        typer.Option(
            "--baseline-ref", metavar="GIT_REV", help="pipetune's own older revision.", rich_help_panel=_SIDES
        ),
    ] = None,
    baseline_env: Annotated[
        list[str] | None,
        typer.Option("--baseline-env", metavar="KEY=VALUE", help="May be repeated.", rich_help_panel=_SIDES),
    ] = None,
    candidate_env: Annotated[
        list[str] | None,
        typer.Option("--candidate-env", metavar="KEY=VALUE", help="… for the candidate.", rich_help_panel=_SIDES),
    ] = None,
    stored: Annotated[
        list[Path] | None,
        typer.Option(
            "--stored",
            metavar="STUDY",
            help="A study, or a file of pytest-benchmark, in place of a baseline that cannot run; may be repeated.",
            rich_help_panel=_SIDES,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", help="Compare this one; may be repeated.", rich_help_panel=_RULE),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option("--margin", metavar="SHARE", help="Of all metrics: 0.05 tolerates 5 %.", rich_help_panel=_RULE),
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", min=0.0, help="End by then.", rich_help_panel=_RULE)
    ] = None,
    rounds_in_process: Annotated[
        bool,
        typer.Option(
            "--rounds-in-process", help="In one running fleet: for models slow to load.", rich_help_panel=_RULE
        ),
    ] = False,
    order_seed: Annotated[
        int | None, typer.Option("--order-seed", help="Of the randomised order.", min=0, rich_help_panel=_RULE)
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            "-o",
            metavar="FOLDER",
            help="New folder: JSON, JUnit, Markdown, plot.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="JUnit XML alone.", rich_help_panel=_FILES)
    ] = None,
    show_config: o.ShowConfig = False,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Say whether a candidate is worse than the baseline: FAIL (exit code 1), OK (0) or INCONCLUSIVE (3)."""
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.gate import GateRequest
    from pipetune.tuner.gate.outputs import files as outputs
    from pipetune.tuner.gate.outputs.wording import screen_of
    from pipetune.tuner.progress import make_reporter

    request = GateRequest.of(ctx.params, warn=common.warn)
    if show_config:
        typer.echo(request.shown(), nl=False)
        return 0
    job = request.job()
    outputs.refuse_places(output_dir, junit)
    # A CI that cancels a job sends SIGTERM: as a Ctrl-C it ends the sides' processes as well.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = job(make_reporter(common.err(), silent=no_progress))
    finally:
        signal.signal(signal.SIGTERM, before)
    outputs.write(result, output_dir, junit)
    if json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        common.show(screen_of(result))
    return result.exit_code
