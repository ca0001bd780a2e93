"""A busy machine is said before anything is measured on it, with the name of who keeps it so, and waited for."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from rich.console import Console

from pipetune.bench.fleet.fleet import load_now
from pipetune.tuner.commands.quiet import look_at_load
from pipetune.tuner.progress import PlainReporter, Reporter


@pytest.fixture
def stranger() -> Iterator[int]:
    """Pid of a process that burns a core and is no child of ours."""
    shell = f"'{sys.executable}' -c 'while True: pass' > /dev/null 2>&1 & echo $!"
    pid = int(subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout)
    try:
        process = psutil.Process(pid)
        while process.cpu_times().user < 0.1:
            time.sleep(0.02)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)


def test_who_takes_the_cores_is_named_though_the_same_shell_began_both(stranger: int) -> None:
    assert f"(pid {stranger})" in "; ".join(load_now(("cpu:0",), look_s=3.0))


def test_it_is_said_with_the_way_out_and_again_once_the_time_to_wait_is_over(stranger: int) -> None:
    out = io.StringIO()
    look_at_load(("cpu:0",), PlainReporter(Console(file=out, width=200)))
    assert "this machine is busy: other processes took " in out.getvalue()
    assert "wait by --wait-for-quiet MINUTES" in out.getvalue()
    look_at_load(("cpu:0",), PlainReporter(Console(file=(again := io.StringIO()), width=200)), 0.01)
    first, second, third = again.getvalue().splitlines()
    assert first.startswith("waiting for a quiet machine, 0.01 min at most: other processes took ")
    assert second.startswith("  still busy after ")
    assert third.startswith("this machine is busy: ")


def test_where_nobody_listens_nothing_is_looked_at() -> None:
    look_at_load(("no such device",), Reporter())
