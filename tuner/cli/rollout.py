"""`pipetune rollout`: a split from a small fleet to a large one, each step predicted and then measured."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o


@o.settings("Model", "Workload", "Search", "output_dir", before="show_config", without=("devices",))
def rollout(
    ctx: typer.Context,
    fleet: Annotated[
        list[str],
        typer.Option(
            metavar="DEVICES", help="One more fleet, the smallest first, as in --fleet cpu:0 --fleet cpu:0-1."
        ),
    ],
    config: o.Config = None,
    first_model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The model with fewer layers, for the first fleet; random weights do."),
    ] = None,
    today: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The plan that runs on the last fleet now. [an even split]")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Predicted plans to measure on each fleet.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, help="The gate decides by then.")] = None,
    wait_for_quiet: o.WaitForQuiet = None,
    show_config: o.ShowConfig = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Tune on a small fleet, predict and measure on larger ones, promote what a gate lets pass; goes on if begun."""
    from pipetune.bench.errors import ConfigError, explain
    from pipetune.bench.spec import parse_devices
    from pipetune.tuner.cli import common
    from pipetune.tuner.cli.tune import tune_study
    from pipetune.tuner.commands import rollout_document as told
    from pipetune.tuner.commands.rollout import TUNE, Chain, RolloutRequest
    from pipetune.tuner.config import sources
    from pipetune.tuner.progress import make_reporter
    from pipetune.tuner.study.files import StudyFile
    from pipetune.tuner.study.plan_file import PLAN_FILE

    try:
        fleets = tuple(parse_devices(text) for text in fleet)
    except ValueError as error:
        raise ConfigError(f"--fleet: {explain(error)}") from None
    resolved = sources.resolve_settings({**ctx.params, "devices": list(fleets[0])}, warn=common.warn)
    if show_config:
        typer.echo(sources.show(resolved), nl=False)
        return 0
    if resolved.config.output_dir is None:
        raise ConfigError("rollout: give a folder by -o; a rollout that was begun there goes on")
    folder = Path(resolved.config.output_dir)
    request = RolloutRequest(
        config=resolved.config.model_copy(update={"output_dir": None}),
        fleets=fleets,
        folder=folder,
        first_model=first_model,
        today=today,
        top=top,
        rounds=rounds,
        max_minutes=max_minutes,
    )
    if dry_run:
        steps = [{"step": what, "leaves": place, "done": done} for what, place, done in request.steps()]
        common.give(steps, told.intended(request), json=json)
        return 0
    reporter = make_reporter(common.err(), silent=no_progress)
    study = folder / TUNE
    if not (study / PLAN_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        begun = (study / StudyFile.CONFIG).exists()
        # What the chain comes to is the result; the first study's report is on the way to it.
        with contextlib.redirect_stdout(sys.stderr):
            code = tune_study(study, request.first, reporter, resume=begun, json=False, wait_for_quiet=wait_for_quiet)
        if code:
            return code
    found = Chain(request, reporter).run()
    told.write(found, request)
    common.give(found.model_dump(mode="json"), told.document_of(found), json=json)
    return found.exit_code
