"""`pipetune bench`: measures one plan, serves prompts with it, or compares it with the un-pipelined model."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipetune.tuner.cli import options as o

_engine = partial(typer.Option, rich_help_panel="vLLM or SGLang in place of our runtime")
_plan = partial(typer.Option, rich_help_panel="Plan (one of --plan, --device-map and --layers)")
_load = partial(typer.Option, rich_help_panel="Load")


@o.on_hosts
@o.settings("Model", "Workload", "Load", "baseline_batch_sizes", "device_names", before="compare_baseline")
def bench(
    ctx: typer.Context,
    config: o.Config = None,
    plan: Annotated[Path | None, _plan(metavar="FILE", help="best_plan.json, or a bare plan.")] = None,
    device_map: Annotated[Path | None, _plan(metavar="FILE", help="JSON, names or ranges.")] = None,
    layers: Annotated[str | None, _plan(metavar="17,13", help="Layers of each stage.")] = None,
    micro_batch_size: Annotated[int | None, _plan(help="Sequences decoded together. [prompts / stages]", min=1)] = None,
    prefill_micro_batch_size: Annotated[int | None, _plan(help="Sequences prefilled together.", min=1)] = None,
    prefill_chunk_size: Annotated[int | None, _plan(help="Tokens of a prompt at a time. [all]", min=1)] = None,
    lanes: Annotated[str | None, _plan(metavar="JSON", help="Lanes of requests that come over time.")] = None,
    plan_replicas: Annotated[int | None, _plan("--replicas", help="Such pipelines side by side. [1]", min=1)] = None,
    plan_compile: Annotated[bool | None, _plan("--compile/--no-compile", help="By torch.compile.")] = None,
    plan_cuda_graphs: Annotated[
        bool | None, _plan("--cuda-graphs/--no-cuda-graphs", help="GPU: capture decode steps.")
    ] = None,
    plan_packed_weights: Annotated[
        bool | None, _plan("--packed-weights/--no-packed-weights", help="CPU: lay weights out for oneDNN.")
    ] = None,
    memory_fraction: Annotated[
        float | None, _plan(min=1e-9, max=1.0, help="Cap of each device, a share. [0.9]")
    ] = None,
    max_memory_bytes: Annotated[
        str | None, _plan("--max-memory-per-device", metavar="SIZE", help="Cap in bytes: 600MiB.")
    ] = None,
    compare_baseline: Annotated[
        bool, typer.Option("--compare-baseline", help="Beside the un-pipelined model, in rounds.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the comparison.")] = 5,
    name: Annotated[
        Literal["vllm", "sglang"] | None, _engine("--engine", metavar="vllm|sglang", help="[the plan's, or vllm]")
    ] = None,
    engine_python: Annotated[Path | None, _engine(metavar="FILE", help="Python that has it, to run it.")] = None,
    max_num_batched_tokens: Annotated[int | None, _engine(min=1, help="Tokens of a batch. [the engine's]")] = None,
    max_num_seqs: Annotated[int | None, _engine(min=1, help="Sequences at once. [the engine's]")] = None,
    kv_cache_memory_bytes: Annotated[
        str | None, _engine(metavar="SIZE", help="KV cache of each worker: 2GiB. [what the caps leave]")
    ] = None,
    tensor_parallel_size: Annotated[int | None, _engine(min=1, help="Workers that share each layer. [1]")] = None,
    enforce_eager: Annotated[bool | None, _engine("--enforce-eager", help="Compile nothing.")] = None,
    served: Annotated[bool | None, _engine("--served", help="By its HTTP server, asked over loopback.")] = None,
    sweep: Annotated[str | None, _load(metavar="2,4,8", help="Rates to measure one after the other.")] = None,
    max_request_rate: Annotated[
        bool, _load("--max-request-rate", help="Find the highest rate that keeps --goodput, from --request-rate on.")
    ] = False,
    plot: Annotated[
        Path | None, _load(metavar="FILE", help="Latency against rate, as PNG; the curves of --beside too.")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        _load(metavar="FILE", help="Records of another sweep (-o), or results of vllm bench serve, for --plot."),
    ] = None,
    save_outputs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what is generated or scored, as JSONL.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Save what follows an end-of-sequence token, too.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the records, as JSONL.")
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", "-f", metavar="FORMAT", help="text, md, csv, json, jsonl, vllm, github[-latency]."),
    ] = "text",
    wait_for_quiet: o.WaitForQuiet = None,
    show_config: o.ShowConfig = False,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Measure one plan; with --compare-baseline, beside the un-pipelined model in interleaved rounds."""
    from pipetune.bench.errors import ConfigError
    from pipetune.bench.spec import EngineSettings
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.bench import Bench
    from pipetune.tuner.commands.bench_document import FORMATS, document_of, exit_code, json_of, render
    from pipetune.tuner.commands.plan_request import PlanRequest
    from pipetune.tuner.commands.sweep import check_load, draw_sweeps, points_of, rates_of, read_points
    from pipetune.tuner.config import sources
    from pipetune.tuner.progress import look_at_load, make_reporter
    from pipetune.tuner.study.files import refuse_existing, write_new

    if form not in (forms := ("text", "json", "md", *FORMATS)):
        raise ConfigError(f"--format: {form!r} is none of {', '.join(forms)}")
    request, rates = PlanRequest.of(ctx.params), rates_of(sweep)
    others = [point for path in beside or () for point in read_points(path)]
    # What is said of an engine is the plan's here, and no bound of a search.
    own = {"engine_python", *EngineSettings.model_fields}
    params = {name: value for name, value in ctx.params.items() if name not in own}
    params |= {"request_rate": rates[0]} if rates else {}
    resolved = sources.resolve_settings(params, below=request.settings_below(), reads_trace=True, warn=common.warn)
    if max_request_rate:
        resolved = sources.with_rate_search(resolved, "--max-request-rate")
    if name is not None and engine_python is None:
        raise ConfigError(f"--engine {name}: which Python has it? Give it by --engine-python")
    if engine_python is not None and (compare_baseline or save_outputs is not None):
        raise ConfigError("--engine-python: measures a plan alone; leave out --compare-baseline and --save-outputs")
    check_load(resolved.config, compare_baseline=compare_baseline, saves=save_outputs is not None)
    if show_config:
        typer.echo(sources.show(resolved), nl=False)
        return 0
    refuse_existing(plot)
    job = Bench(
        config=resolved.config,
        request=request,
        output=output,
        save_outputs=save_outputs,
        ignore_eos=ignore_eos,
        rounds=rounds if compare_baseline else 0,
        rates=rates,
        engine_python=engine_python,
    )
    reporter = make_reporter(common.err(), silent=no_progress)
    look_at_load(resolved.config.concrete_devices, reporter, wait_for_quiet)
    result = job.run(reporter)
    if form in ("text", "json"):
        common.give(json_of(result), document_of(result), json=json or form == "json")
    else:
        typer.echo(render(result, form), nl=False)
    for path, text in result.files.items():
        write_new(path, text)
    if plot is not None:
        draw_sweeps(plot, (*points_of(result.records), *others))
    return exit_code(result)
