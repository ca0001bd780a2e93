"""`pipetune plan`: prints the best predicted plans without running one, for devices that need not be here."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o

_from = partial(typer.Option, rich_help_panel="What predictions are made from")


@o.settings("Model", "Workload", before="device_file", without=("protocol",))
@o.settings("Load", before="device_file", without=("most_rates",))
@o.settings("Engine", "warm_start", before="device_file", without=("served", "served_finals"))
@o.settings("device_order", "objective", "constraint", "space", before="top")
def plan(
    ctx: typer.Context,
    config: o.Config = None,
    device_file: o.DeviceFile = None,
    profile_file: Annotated[
        Path | None, _from("--profile", metavar="FILE", help="A profile, instead of the cached one.")
    ] = None,
    no_profile: Annotated[bool, _from("--no-profile", help="Nominal rates, even if there is one.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Plans to print.")] = 10,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the best one, for bench --plan.")
    ] = None,
    show_config: o.ShowConfig = False,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Print the best predicted plans without running one; for devices here, or described in a file."""
    from pipetune.bench.errors import ConfigError
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.plan import Planned
    from pipetune.tuner.commands.plan_document import document_of, json_of
    from pipetune.tuner.config import sources
    from pipetune.tuner.planning.costs.described import read_devices
    from pipetune.tuner.progress import make_reporter

    if sum((device_file is not None, profile_file is not None, no_profile)) > 1:
        raise ConfigError("predict from what? Give one of --device-file, --profile and --no-profile, not several")
    described = read_devices(device_file) if device_file is not None else None
    resolved = sources.resolve_settings(
        {**ctx.params, "profile": False if no_profile else None},
        below=({("devices",): list(described.names)} if described is not None else {}, str(device_file)),
        warn=common.warn,
    )
    if show_config:
        typer.echo(sources.show(resolved), nl=False)
        return 0
    reporter = make_reporter(common.err(), silent=no_progress)
    with reporter:
        planned = Planned(resolved.config, reporter, described=described, profile_file=profile_file, top=top)
    if output is not None:
        planned.write(output)
    common.give(json_of(planned), document_of(planned), json=json)
    if output is not None and not json:
        python = f" --engine-python {engine.python}" if (engine := resolved.config.engine) is not None else ""
        common.out().print(f"It is in {output}: `pipetune bench --plan {output}{python}` measures it.", markup=False)
    return 0
