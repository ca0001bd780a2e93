"""`pipetune join`: this host's devices, for a command that runs on another host."""

from typing import Annotated

import typer


def join(
    address: Annotated[str, typer.Argument(metavar="ADDR:PORT", help="Where the other host listens.")],
    node_rank: Annotated[int, typer.Option(min=1, help="This host's number: 1 for host1.")],
    host_ip: Annotated[str | None, typer.Option(help="This host's address for the others. [routes there]")] = None,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the other host.")] = 600.0,
) -> int:
    """Put this host's devices at the disposal of a command that listens elsewhere, until that ends."""
    from pipetune.bench.fleet import hosts

    return hosts.join(address, node_rank, host_ip=host_ip, timeout_s=timeout)
