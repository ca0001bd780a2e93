"""`pipetune join` and the driver's own host: an elastic agent that starts this host's workers.

`python -P -m pipetune.bench.worker.join HOST:PORT --node-rank R --nproc-per-node N`, ended by the driver.
"""

import argparse
import sys
import tempfile
import time

from pipetune.bench.worker.main import die_with_driver


def main() -> int:
    """Exit status: 0 once the last driver has ended it, 1 where the driver is lost or knows another token."""
    parser = argparse.ArgumentParser(prog="pipetune join")
    parser.add_argument("address")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--host-ip", default="")
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--log-dir", default="")
    parser.add_argument("--driver-pid", type=int, default=0, help="ends with this process, its parent")
    args = parser.parse_args()
    if args.driver_pid:
        die_with_driver(args.driver_pid)

    import torch.distributed.elastic.rendezvous as elastic
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from pipetune.bench.machine.wire import split_address
    from pipetune.bench.worker.rendezvous import RETRY_S, DriverRendezvous, connect

    made: list[DriverRendezvous] = []

    def make(params: elastic.RendezvousParameters) -> DriverRendezvous:
        made.append(DriverRendezvous(params))
        return made[-1]

    elastic.rendezvous_handler_registry.register("pipetune-join", make)
    log_dir = args.log_dir or tempfile.mkdtemp(prefix="pipetune-join-")
    stays, said, gives_up_at = False, "", 0.0
    while True:
        # Elastic agents say so when all workers have ended well, which ours do only at the end of the driver.
        made.clear()
        try:
            asking = connect(*split_address(args.address), args.timeout)
            asking.send({"type": "ask", "node": args.node_rank})
            answer = asking.receive()
            asking.socket.close()
            if answer is not None:
                if stays and not answer["stays"] and not answer["workers"]:
                    return 0
                stays, gives_up_at = answer["stays"], time.monotonic() + args.timeout
            if answer is None or not answer["workers"]:
                hosts = "" if answer is None else f"; its hosts are {', '.join(answer['hosts'])}"
                raise elastic.RendezvousConnectionError(f"{args.address} has no work for host{args.node_rank}{hosts}")
            sys.stderr.write(f"pipetune join: {answer['workers']} workers for {args.address}; logs in {log_dir}\n")
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=len(answer["hosts"]),
                nproc_per_node=answer["workers"],
                run_id="pipetune",
                rdzv_backend="pipetune-join",
                rdzv_endpoint=args.address,
                rdzv_configs={"node": args.node_rank, "join_timeout": args.timeout, "host_ip": args.host_ip},
                # A round ends when the driver says so, as often as plans break their workers.
                max_restarts=1_000_000,
                monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=log_dir, redirects=Std.ALL),
            )
            elastic_launch(config, sys.executable)("-P", "-m", "pipetune.bench.worker")
        except elastic.RendezvousClosedError:
            if not stays:
                return 0
        except (elastic.RendezvousConnectionError, OSError) as error:
            if str(error) != said:
                said = str(error)
                sys.stderr.write(f"pipetune join: {said}\n")
            # One of several drivers is lost, is not there yet, or has no work for this host.
            waits = stays and (not made[-1].is_closed() if made else time.monotonic() < gives_up_at)
            if not waits and not (made and made[-1].was_cut):
                return 1
            time.sleep(RETRY_S if stays else 0.0)


if __name__ == "__main__":
    sys.exit(main())
