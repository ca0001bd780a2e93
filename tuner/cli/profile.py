"""`pipetune profile`: times a model's parts on each device and the links between them, or shows what was kept."""

from functools import partial
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o

_grid = partial(typer.Option, rich_help_panel="What is timed")


@o.on_hosts
@o.settings("Model", "devices", "workload_kind", "packed_weights", "cuda_graphs", before="rows")
def profile(
    ctx: typer.Context,
    config: o.Config = None,
    rows: Annotated[str | None, _grid(help="Sizes of micro-batches: 1,4,16. [what plans need]")] = None,
    lengths: Annotated[str | None, _grid(help="Tokens of each row in prefill: 16,64. [what plans need]")] = None,
    pasts: Annotated[str | None, _grid(help="Cached tokens of each row in decode: 64,512. [what plans need]")] = None,
    max_tokens: Annotated[int | None, _grid(min=1, help="Most tokens of a task, over all rows.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure even if a profile is kept.")] = False,
    wait_for_quiet: o.WaitForQuiet = None,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Time a model's layers, embedding and head on each device, and the links between them; kept for later commands."""
    from pipetune.bench.errors import ConfigError
    from pipetune.bench.fleet.experiment import Experiment
    from pipetune.bench.profile import ProfileGrid
    from pipetune.tuner.cli import common
    from pipetune.tuner.config.sources import resolve_settings
    from pipetune.tuner.planning.costs import profile_cache
    from pipetune.tuner.progress import look_at_load, make_reporter
    from pipetune.tuner.report.profile import document_of

    resolved = resolve_settings(ctx.params, warn=common.warn).config
    space, workload, names = resolved.space, resolved.workload, resolved.concrete_devices
    grid: dict[str, object] = {
        "max_tokens": max_tokens or profile_cache.most_tokens_on(names),
        "scores": workload.kind == "score",
        "sampling": None if workload.sampling is None else workload.sampling.model_copy(update={"seed": 0}),
    }
    for name, text in (("rows", rows), ("lengths", lengths), ("pasts", pasts)):
        if text is None:
            continue
        parts = [part.strip() for part in text.split(",")]
        if (wrong := next((part for part in parts if not part.isdecimal() or int(part) < 1), None)) is not None:
            raise ConfigError(f"--{name}: {wrong!r} is no number above 0; write them as 1,4,16")
        grid[name] = tuple(sorted({int(part) for part in parts}))
    switches = {"packed_weights": space.packed_weights, "cuda_graphs": space.cuda_graphs}
    reporter = make_reporter(common.err(), silent=no_progress)
    with reporter:
        reporter.begin(f"starting {len(names)} workers")
        with Experiment.start(resolved.model, names, exclusive=False, on_progress=reporter.fleet) as experiment:
            fleet = experiment.fleet
            wanted = ProfileGrid.model_validate(grid)
            kept = None if refresh else profile_cache.read_kept(profile_cache.profile_key(fleet, wanted, **switches))
            if kept is None:
                look_at_load(names, reporter, wait_for_quiet)
                reporter.begin(f"timing {resolved.model.name} on {', '.join(names)}")
            shown = kept or profile_cache.profile_for(fleet, wanted, **switches, refresh=True)
    common.give(shown.model_dump(mode="json"), document_of(shown, kept=kept is not None), json=json)
    return 0
