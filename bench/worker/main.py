"""The worker process: one per device, kept over all plans of a study.

Started as `python -P -m pipetune.bench.worker`. Before anything heavy is imported it arranges to die with its driver.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipetune.bench.worker.channel import DriverLink
    from pipetune.bench.worker.commands import Worker

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
HEARTBEAT_S = 0.5
STARTING: dict[str, Any] = {"phase": "start", "activity": "idle", "tasks_done": 0, "stage": None}


def die_with_driver(driver_pid: int) -> None:
    """Asks the kernel to kill this process when its driver ends; the driver may have ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != driver_pid:
        os._exit(1)


def main() -> None:
    """Entry of the process: everything that goes wrong is told to the driver before it ends."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--fork-server"]:
        from pipetune.bench.worker.fork_server import serve

        if arguments[4:] == ["--main-thread"]:
            die_with_driver(int(arguments[3]))
        arguments = serve(int(arguments[1]), driver_pid=int(arguments[3]))
    if not arguments:
        serve_remote_driver()
        return
    parser = argparse.ArgumentParser(prog="pipetune.bench.worker")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--devices", required=True, help="of all ranks, separated by commas")
    parser.add_argument("--model", required=True, help="a ModelSpec as JSON")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--driver-pid", type=int, required=True, help="of the process that started this one")
    args = parser.parse_args(arguments)
    die_with_driver(args.driver_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    from pipetune.bench.worker.channel import DriverLink

    work(args, DriverLink.local(args.socket, args.rank))


def serve_remote_driver() -> None:
    """Entry of a worker that an elastic agent started: the driver says what it is to be."""
    die_with_driver(os.getppid())
    from pipetune.bench.worker.channel import DriverLink
    from pipetune.bench.worker.rendezvous import DRIVER_VARIABLE, ROUND_VARIABLE

    place = (int(os.environ[name]) for name in (ROUND_VARIABLE, "GROUP_RANK", "LOCAL_RANK"))
    link, told = DriverLink.remote(os.environ[DRIVER_VARIABLE], *place)
    os.environ.update(told["environment"])
    args = argparse.Namespace(
        rank=told["rank"], devices=",".join(told["devices"]), model=json.dumps(told["model"]), rendezvous=None
    )
    work(args, link)


def work(args: argparse.Namespace, link: "DriverLink") -> None:
    """Serves the driver until it says that it is over; everything that goes wrong is told to it."""
    # What `ps` and `top` show: forked workers have one command line.
    ctypes.CDLL(None).prctl(PR_SET_NAME, f"pipetune-rank-{args.rank}".encode(), 0, 0, 0)
    if args.rank != 0:
        link.end_with_driver()
    worker: Worker | None = None
    # From now on silence counts, and what is imported next may take longer than a worker may be silent.
    link.beat(HEARTBEAT_S, lambda: worker.state() if worker is not None else STARTING)
    try:
        from pipetune.bench.worker import commands

        worker = commands.Worker(args, link)
        # What was imported stays for ever: collections between passes need not look at it.
        gc.collect()
        gc.freeze()
        link.send("ready")
        worker.serve()
    except BaseException as error:
        from pipetune.bench.worker.faults import failure_of

        # The log may be on a full disk.
        with contextlib.suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
        state = worker.state() if worker is not None else STARTING
        device = worker.blamed if worker is not None else args.devices.split(",")[args.rank]
        link.send("fault", failure=failure_of(error, stage=state["stage"], device=device, phase=state["phase"]))
        # Threads of gloo or NCCL may hang in messages that will never come.
        os._exit(1)
    os._exit(0)
