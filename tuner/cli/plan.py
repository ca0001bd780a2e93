"""`pipetune plan`: prints the best predicted plans without running one, for devices that need not be here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o

_FROM = "What predictions are made from"


def plan(
    ctx: typer.Context,
    config: o.Config = None,
    model: o.Model = None,
    dtype: o.DtypeFlag = None,
    storage_dtype: o.StorageDtype = None,
    load_format: o.LoadFormatFlag = None,
    attention: o.Attention = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = None,
    workload_kind: o.WorkloadKind = None,
    num_prompts: o.NumPrompts = None,
    input_len: o.InputLen = None,
    output_len: o.OutputLen = None,
    random_range_ratio: o.RandomRangeRatio = None,
    prompts: o.Prompts = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    sampling_seed: o.SamplingSeed = None,
    devices: o.Devices = None,
    seed: o.Seed = None,
    device_file: Annotated[
        Path | None,
        typer.Option("--device-file", metavar="FILE", help="YAML that describes devices.", rich_help_panel=_FROM),
    ] = None,
    profile_file: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", help="A profile, instead of the cached one.", rich_help_panel=_FROM),
    ] = None,
    no_profile: Annotated[
        bool, typer.Option("--no-profile", help="Nominal rates, even if there is one.", rich_help_panel=_FROM)
    ] = False,
    device_order: o.DeviceOrder = None,
    objective: o.Objective = None,
    constraint: o.Constraint = None,
    micro_batch_sizes: o.MicroBatchSizes = None,
    prefill_micro_batch_sizes: o.PrefillMicroBatchSizes = None,
    prefill_chunk_sizes: o.PrefillChunkSizes = None,
    replicas: o.Replicas = None,
    min_stages: o.MinStages = None,
    max_stages: o.MaxStages = None,
    memory_fractions: o.MemoryFractions = None,
    compile: o.Compile = None,  # noqa: A002  the name of the flag
    cuda_graphs: o.CudaGraphs = None,
    packed_weights: o.PackedWeights = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Plans to print.")] = 10,
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
    from pipetune.tuner.commands.plan import find_plans
    from pipetune.tuner.commands.plan_document import document_of, json_of
    from pipetune.tuner.config import sources
    from pipetune.tuner.planning.costs.described import read_devices
    from pipetune.tuner.progress import make_reporter

    if sum((device_file is not None, profile_file is not None, no_profile)) > 1:
        raise ConfigError("predict from what? Give one of --device-file, --profile and --no-profile, not several")
    described = read_devices(device_file) if device_file is not None else None
    below: dict[tuple[str, ...], object] = {("devices",): list(described.names)} if described is not None else {}
    resolved = common.resolve_settings(
        {**ctx.params, "profile": False if no_profile else None}, below=below, below_name=str(device_file)
    )
    if show_config:
        typer.echo(sources.show(resolved), nl=False)
        return 0
    reporter = make_reporter(common.err(), silent=no_progress)
    with reporter:
        planned = find_plans(resolved.config, reporter, described=described, profile_file=profile_file, top=top)
    if output is not None:
        planned.write(output)
    if json:
        common.print_json(json_of(planned))
    else:
        common.show(document_of(planned))
        if output is not None:
            common.out().print(f"It is in {output}: `pipetune bench --plan {output}` measures it.", markup=False)
    return 0
