"""`pipetune gate`: whether a candidate is worse than the baseline, measured side by side on this machine."""

import signal
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o

_side, _rule, _output = (partial(typer.Option, rich_help_panel=panel) for panel in ("What differs", "Rule", "Output"))


@o.on_hosts
@o.settings("Model", "Workload", "Load", before="output_dir", without=("dtype",))
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
    baseline_plan: Annotated[Path | None, _side(metavar="FILE", help="best_plan.json or a bare plan.")] = None,
    candidate_plan: Annotated[Path | None, _side(metavar="FILE", help="[the baseline's]")] = None,
    baseline_dtype: Annotated[str | None, _side(help="Dtype of the baseline. [the plan's]")] = None,
    candidate_dtype: Annotated[str | None, _side(help="Dtype of the candidate. [the plan's]")] = None,
    baseline_python: Annotated[str | None, _side(metavar="PYTHON", help="The baseline's Python. [this]")] = None,
    candidate_python: Annotated[str | None, _side(metavar="PYTHON", help="The candidate's Python. [this]")] = None,
    baseline_engine_python: Annotated[str | None, _side(metavar="PYTHON", help="Its vLLM runs the plan.")] = None,
    candidate_engine_python: Annotated[str | None, _side(metavar="PYTHON", help="[the baseline's]")] = None,
    baseline_ref: Annotated[str | None, _side(metavar="GIT_REV", help="pipetune's own older revision.")] = None,
    baseline_env: Annotated[list[str] | None, _side(metavar="KEY=VALUE", help="The baseline's; may repeat.")] = None,
    candidate_env: Annotated[list[str] | None, _side(metavar="KEY=VALUE", help="The candidate's; may repeat.")] = None,
    stored: Annotated[
        list[Path] | None,
        _side(
            metavar="STUDY",
            help="A study, or a file of pytest-benchmark, in place of a baseline that cannot run; may be repeated.",
        ),
    ] = None,
    metric: Annotated[list[str] | None, _rule(metavar="NAME", help="Compare this one; may be repeated.")] = None,
    margin: Annotated[float | None, _rule(metavar="SHARE", help="Tolerated: 0.05 for 5 % worse.")] = None,
    max_minutes: Annotated[float | None, _rule(min=0.0, help="Decide by then.")] = None,
    rounds_in_process: Annotated[
        bool, _rule("--rounds-in-process", help="Measure in one running fleet: for models slow to load.")
    ] = False,
    order_seed: Annotated[int | None, _rule(min=0, help="Seed of the randomised order.")] = None,
    output_dir: Annotated[
        Path | None, _output("--output-dir", "-o", metavar="FOLDER", help="New folder: JSON, JUnit, Markdown, plot.")
    ] = None,
    junit: Annotated[Path | None, _output(metavar="FILE", help="JUnit XML alone.")] = None,
    wait_for_quiet: o.WaitForQuiet = None,
    show_config: o.ShowConfig = False,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Say whether a candidate is worse than the baseline: FAIL (exit code 1), OK (0) or INCONCLUSIVE (3)."""
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.gate import GateRequest
    from pipetune.tuner.gate.outputs import files as outputs
    from pipetune.tuner.gate.outputs.wording import screen_of
    from pipetune.tuner.progress import look_at_load, make_reporter

    request = GateRequest.of(ctx.params, warn=common.warn)
    if show_config:
        typer.echo(request.shown(), nl=False)
        return 0
    job = request.job()
    outputs.refuse_places(output_dir, junit)
    # A CI that cancels a job sends SIGTERM: as a Ctrl-C it ends the sides' processes as well.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    reporter = make_reporter(common.err(), silent=no_progress)
    try:
        if not files:
            look_at_load((), reporter, wait_for_quiet)
        result = job(reporter)
    finally:
        signal.signal(signal.SIGTERM, before)
    common.give(result.model_dump(mode="json"), screen_of(result), json=json)
    outputs.write(result, output_dir, junit)
    return result.exit_code
