"""`pipetune doctor`: looks at the machine, starts real workers on it, and says what a study would use and refuse."""

from functools import partial
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o

_fit = partial(typer.Option, rich_help_panel="Fit (with --model)")


@o.settings("Model", "devices", "workload_kind", "num_prompts", "input_len", "output_len", before="micro_batch_size")
@o.settings("max_memory_per_device", before="json")
def doctor(
    ctx: typer.Context,
    config: o.Config = None,
    device_file: o.DeviceFile = None,
    micro_batch_size: Annotated[int | None, _fit(min=1, help="Sequences decoded together. [what fits]")] = None,
    memory_fraction: Annotated[float | None, _fit(min=1e-9, max=1.0, help="Cap of each device. [0.9]")] = None,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Check this machine, with workers that really talk to each other; with --model, what a model is made of and
    what of it would fit, also on devices that are only described."""
    from pipetune.bench.errors import ConfigError
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.doctor import run_doctor
    from pipetune.tuner.config.sources import resolve_settings
    from pipetune.tuner.planning.costs.described import read_devices
    from pipetune.tuner.progress import make_reporter

    model = ctx.params["model"]
    named = model is not None or config is not None
    described = read_devices(device_file) if device_file is not None else None
    if described is not None and not named:
        raise ConfigError("--device-file: described devices run no workers; name what is to fit by --model")
    resolved = resolve_settings(
        {**ctx.params, "model": model if named else "tiny"},
        below=({("devices",): list(described.names)} if described is not None else {}, str(device_file)),
        warn=common.warn,
    )
    given = {"micro_batch_size": micro_batch_size, "memory_fraction": memory_fraction}
    fitting = {name: value for name, value in given.items() if value is not None} if named else None
    result = run_doctor(resolved.config, fitting, make_reporter(common.err(), silent=no_progress), described)
    values = result.model_dump(mode="json", by_alias=True) | {"schema_version": 1, "exit_code": result.fault_code}
    common.give(values, result.document(), json=json)
    return result.fault_code
