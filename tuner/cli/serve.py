"""`pipetune serve`: a plan behind OpenAI's HTTP API."""

from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o


@o.settings("Model", "temperature", "top_k", "top_p", before="max_model_len")
def serve(
    ctx: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="best_plan.json, or a bare plan.")],
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its answer. [the model's, at most 2048]")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name that requests give. [the model's]")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback let others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    no_progress: o.NoProgress = False,
) -> int:
    """Serve a plan by OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models, /health."""
    from pipetune.bench.errors import ConfigError
    from pipetune.bench.pipeline import Pipeline
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.plan_request import PlanRequest
    from pipetune.tuner.config import sources
    from pipetune.tuner.progress import make_reporter

    try:
        from pipetune.tuner.commands import serve as api
    except ImportError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'pipetune[serve]'") from None
    request = PlanRequest.of(ctx.params)
    below, place = request.settings_below()
    # Workloads of a plan file are of no meaning here.
    kept = {key: value for key, value in below.items() if key[0] in ("model", "devices")}
    resolved = sources.resolve_settings(ctx.params, below=(kept, place), warn=common.warn)
    config, reporter = resolved.config, make_reporter(common.err(), silent=no_progress)
    with reporter:
        reporter.begin(f"starting {len(config.concrete_devices)} workers")
        assert request.plan_file is not None
        with Pipeline.start(config.model, request.plan_file.plan, on_progress=reporter.fleet) as pipeline:
            sampling, name = config.workload.sampling, served_model_name or config.model.name
            with pipeline.open_queue(max_len=max_model_len, sampling=sampling) as queue:
                reporter.end(f"{pipeline.plan.describe()}, prompts and answers of up to {queue.max_len} tokens")
                api.serve(api.Api(queue=queue, model=name, sampling=sampling), host=host, port=port, say=reporter.say)
    return 0
