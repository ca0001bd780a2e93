"""`pipetune doctor`: looks at the machine, starts real workers on it, and says what a study would use."""

from __future__ import annotations

import typer

from tuner.cli import options as o


def doctor(
    ctx: typer.Context,
    config: o.Config = None,
    model: o.Model = None,
    dtype: o.DtypeFlag = None,
    load_format: o.LoadFormatFlag = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = None,
    devices: o.Devices = None,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Check this machine: devices, memory, software, and workers that really talk to each other."""
    from tuner.checkup import run_checkup
    from tuner.cli import common
    from tuner.progress import make_reporter

    checkup = run_checkup(common.given(ctx.params), config, make_reporter(common.err(), silent=no_progress))
    if json:
        common.print_json(checkup.model_dump(mode="json") | {"exit_code": checkup.exit_code})
    else:
        checkup.print(common.out())
    return checkup.exit_code
