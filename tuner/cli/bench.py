"""`pipetune bench`: measures one plan, serves prompts with it, or compares it with the un-pipelined model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o

_PLAN = "Plan (one of --plan, --device-map and --layers)"


@o.settings("Model", "Workload", "baseline_batch_sizes", before="compare_baseline")
def bench(
    ctx: typer.Context,
    config: o.Config = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="best_plan.json, or a bare plan.", rich_help_panel=_PLAN),
    ] = None,
    device_map: Annotated[
        Path | None,
        typer.Option("--device-map", metavar="FILE", help="JSON, names or ranges.", rich_help_panel=_PLAN),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="17,13", help="Layers of each stage.", rich_help_panel=_PLAN)
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option("--micro-batch-size", help="Sequences a stage.", min=1, rich_help_panel=_PLAN)
    ] = None,
    prefill_micro_batch_size: Annotated[
        int | None, typer.Option("--prefill-micro-batch-size", help="… in prefill.", min=1, rich_help_panel=_PLAN)
    ] = None,
    prefill_chunk_size: Annotated[
        int | None,
        typer.Option("--prefill-chunk-size", help="Tokens of a prompt at a time.", min=1, rich_help_panel=_PLAN),
    ] = None,
    plan_replicas: Annotated[
        int | None, typer.Option("--replicas", help="Such pipelines side by side.", min=1, rich_help_panel=_PLAN)
    ] = None,
    plan_compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="By torch.compile.", rich_help_panel=_PLAN)
    ] = None,
    plan_cuda_graphs: Annotated[
        bool | None,
        typer.Option("--cuda-graphs/--no-cuda-graphs", help="GPU: capture decode steps.", rich_help_panel=_PLAN),
    ] = None,
    plan_packed_weights: Annotated[
        bool | None,
        typer.Option(
            "--packed-weights/--no-packed-weights", help="CPU: lay weights out for oneDNN.", rich_help_panel=_PLAN
        ),
    ] = None,
    memory_fraction: Annotated[
        float | None, typer.Option("--memory-fraction", help="Cap of each device.", rich_help_panel=_PLAN)
    ] = None,
    compare_baseline: Annotated[
        bool, typer.Option("--compare-baseline", help="Beside the un-pipelined model, in rounds.")
    ] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of the comparison.")] = 5,
    save_outputs: Annotated[
        Path | None, typer.Option("--save-outputs", metavar="FILE", help="Write what is generated or scored, as JSONL.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="… and go on after an end-of-sequence token.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the records, as JSONL.")
    ] = None,
    show_config: o.ShowConfig = False,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Measure one plan; with --compare-baseline, beside the un-pipelined model in interleaved rounds."""
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.bench import Bench
    from pipetune.tuner.commands.bench_document import document_of, exit_code, json_of
    from pipetune.tuner.commands.plan_request import PlanRequest
    from pipetune.tuner.config import sources
    from pipetune.tuner.config.resolve import resolve_settings
    from pipetune.tuner.progress import make_reporter

    request = PlanRequest.of(
        plan=plan,
        device_map=device_map,
        layers=layers,
        micro_batch_size=micro_batch_size,
        prefill_micro_batch_size=prefill_micro_batch_size,
        prefill_chunk_size=prefill_chunk_size,
        replicas=plan_replicas,
        switches={
            "compile": plan_compile,
            "cuda_graphs": plan_cuda_graphs,
            "packed_weights": plan_packed_weights,
        },
        memory_fraction=memory_fraction,
    )
    below, below_name = request.settings_below()
    resolved = resolve_settings(ctx.params, below=below, below_name=below_name, warn=common.warn)
    if show_config:
        typer.echo(sources.show(resolved), nl=False)
        return 0
    job = Bench(
        config=resolved.config,
        request=request,
        output=output,
        save_outputs=save_outputs,
        ignore_eos=ignore_eos,
        rounds=rounds if compare_baseline else 0,
    )
    reporter = make_reporter(common.err(), silent=no_progress)
    result = job.run(reporter)
    if json:
        common.print_json(json_of(result))
    else:
        common.show(document_of(result))
    return exit_code(result)
