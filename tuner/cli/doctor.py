"""`pipetune doctor`: looks at the machine, starts real workers on it, and says what a study would use and refuse."""

from __future__ import annotations

from typing import Annotated

import typer

from pipetune.tuner.cli import options as o

_FIT = "Fit (with --model)"


@o.settings("Model", "devices", "workload_kind", "num_prompts", "input_len", "output_len", before="micro_batch_size")
def doctor(
    ctx: typer.Context,
    config: o.Config = None,
    micro_batch_size: Annotated[
        int | None, typer.Option("--micro-batch-size", help="Sequences a stage.", min=1, rich_help_panel=_FIT)
    ] = None,
    memory_fraction: Annotated[
        float | None, typer.Option("--memory-fraction", help="Cap of each device.", rich_help_panel=_FIT)
    ] = None,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Check this machine, with workers that really talk to each other; with --model, what a model is made of and
    what of it would fit."""
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.doctor import Fitting, run_doctor
    from pipetune.tuner.config.resolve import resolve_settings
    from pipetune.tuner.progress import make_reporter

    model = ctx.params["model"]
    named = model is not None or config is not None
    resolved = resolve_settings({**ctx.params, "model": model if named else "tiny"}, warn=common.warn)
    given = {"micro_batch_size": micro_batch_size, "memory_fraction": memory_fraction}
    fitting = Fitting.model_validate({name: value for name, value in given.items() if value is not None})
    result = run_doctor(resolved.config, fitting if named else None, make_reporter(common.err(), silent=no_progress))
    if json:
        common.print_json(
            result.model_dump(mode="json", by_alias=True) | {"schema_version": 1, "exit_code": result.exit_code}
        )
    else:
        common.show(result.document())
    return result.exit_code
