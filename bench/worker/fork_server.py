"""A process that has imported what CPU workers import, and forks them: torch and transformers take seconds to import.

Started as `python -P -m pipetune.bench.worker --fork-server`, with a socket of packets to the driver: JSON, and for
each worker the file of its output. GPU workers start by themselves: CUDA does not survive a fork.
"""

import gc
import json
import os
import select
import signal
import socket
import sys
import warnings
from typing import Any

_LOOK_S = 1.0
"""How often it looks whether its driver is there: others may hold the socket's other end open."""


def serve(fd: int, driver_pid: int) -> list[str]:
    """Forks workers until the driver is gone, which ends them too; in each worker, returns its arguments."""
    control = socket.socket(fileno=fd)
    # A Ctrl-C at the terminal is the driver's to handle; a worker that ends shall be heard of at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    from pipetune.bench.worker import commands  # noqa: F401

    # What was imported stays for ever: collections need not look at it, nor copy its pages.
    gc.collect()
    gc.freeze()
    own_pid = os.getpid()
    _say(control, ready=True)
    while os.getppid() == driver_pid:
        readable, _, _ = select.select([fd, woken], [], [], _LOOK_S)
        if woken in readable:
            os.read(woken, 4096)
            _tell_of_the_ended(control)
        if fd in readable:
            packet, files, _, _ = socket.recv_fds(control, 1 << 16, 1)
            if not packet:
                break
            request: dict[str, Any] = json.loads(packet)
            with warnings.catch_warnings():
                # Threads of BLAS libraries, which look after themselves.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for one in (woken, wake):
                    os.close(one)
                control.close()
                os.setsid()
                for stream in (1, 2):
                    os.dup2(files[0], stream)
                os.close(files[0])
                os.chdir(request["cwd"])
                sys.argv[1:] = request["arguments"]
                return [*sys.argv[1:], "--driver-pid", str(own_pid)]
            os.close(files[0])
            _say(control, started=pid)
    os._exit(0)


def _tell_of_the_ended(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say(control, ended=pid, code=os.waitstatus_to_exitcode(status))


def _say(control: socket.socket, **message: object) -> None:
    try:
        control.send(json.dumps(message).encode())
    except OSError:
        os._exit(0)
