"""`pipetune collect`: a folder of what the processes of a shared study have measured, from their database alone."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipetune.tuner.cli import options as o


@o.settings("storage", "output_dir", before="json")
def collect(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The study, as --shared-study calls it.")],
    json: o.Json = False,
) -> int:
    """Write the folder of a shared study from its database, with no devices at hand, and report it."""
    from pipetune.bench.errors import ConfigError
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.conclude import conclude
    from pipetune.tuner.config import sources
    from pipetune.tuner.search.shared.collect import collect as write

    url = ctx.params["storage"] or os.environ.get(sources.settings()["storage"].variable)
    folder = sources.place_of(ctx.params)[0]
    if url is None or folder is None:
        raise ConfigError("collect: give --storage URL (or PIPETUNE_STORAGE) and a new folder by -o")
    count = write(url, name, Path(folder))
    common.warn(f"{count} runs of {name} are in {folder}; baselines are in the folders of those who measured them")
    return conclude(Path(folder), partial(common.show_study, json=json))
