"""What is said while a command works: foreign text as it is, lines that fit, nothing when silent; busy machines."""

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

from pipetune.bench.fleet.fleet import Progress, load_now
from pipetune.tuner.progress import (
    LiveReporter,
    PlainReporter,
    Reporter,
    describe,
    look_at_load,
    make_reporter,
    progress_text,
    values_text,
)
from tests.record_factory import make_failure, make_measurement, make_plan


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=terminal, _environ={"TERM": "xterm"})


def written(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


def test_a_terminal_gets_live_lines_and_a_log_plain_ones() -> None:
    assert isinstance(make_reporter(console(terminal=True)), LiveReporter)
    assert isinstance(make_reporter(console()), PlainReporter)
    assert isinstance(make_reporter(console(terminal=True), silent=True), Reporter)


@pytest.mark.parametrize("terminal", [False, True])
def test_foreign_text_is_never_markup(terminal: bool) -> None:
    on = console(terminal=terminal)
    with make_reporter(on) as reporter:
        reporter.begin("trial [red]1[/red]")
        reporter.fleet(Progress(phase="load", message="[/broken", stage=1, done=0, total=3))
        reporter.end("failed: [/]")
        reporter.say("[bold]path[/bold]")
        reporter.best("[x]")
    text = written(on)
    for part in ("trial [red]1[/red]", "failed: [/]", "[bold]path[/bold]"):
        assert part in text


def test_plain_lines_say_what_begins_and_what_came_of_it() -> None:
    on = console()
    with PlainReporter(on) as reporter:
        reporter.begin("starting 2 workers")
        for message in ("starting 2 workers", "fetching", "fetching", ""):
            reporter.fleet(Progress(phase="start", message=message))
        reporter.end("ready")
    assert written(on).splitlines() == ["starting 2 workers", "  start · fetching", "  ready"]


def test_progress_counts_from_one() -> None:
    assert progress_text(Progress(phase="measure", stage=1, done=1, total=3)) == "stage 1 · measure 2/3"
    assert progress_text(Progress(phase="check", done=0, total=1)) == "check"


def test_outcomes_are_described_in_a_line() -> None:
    text = describe(make_measurement(make_plan()), ("output_throughput", "mean_tpot_ms"))
    assert "tok/s" in text
    assert "mean_tpot" in text
    assert "bubble" in text
    assert describe(make_failure(), ()).startswith("worker_died: worker of stage 1")
    assert values_text({"output_throughput": 95.24, "bubble_ratio": 0.114}, ("bubble_ratio", "output_throughput")) == (
        "bubble 11 % · 95.2 tok/s"
    )


def test_a_log_has_a_line_for_each_run_with_its_share_of_all() -> None:
    on = console()
    with PlainReporter(on) as reporter:
        reporter.course(0, 4)
        reporter.course(1, 3)
        reporter.course(2, 0)
        for done in range(3):
            reporter.fleet(Progress(phase="measure", done=done, total=3))
        for done in range(16):
            reporter.fleet(Progress(phase="profile", done=done, total=16))
    first, *lines = written(on).splitlines()
    assert first.startswith("  1 of at most 4 runs · about ")
    assert [line.partition(" · about ")[0] for line in lines] == [
        *("  2 of at most 2 runs", "  profile 25 %", "  profile 50 %", "  profile 75 %"),
    ]


def test_a_terminal_has_bars_of_the_whole_work_and_of_a_long_step() -> None:
    on = console(terminal=True)
    reporter = LiveReporter(on)
    reporter.course(3, 9, "pairs")
    reporter.fleet(Progress(phase="profile", done=8, total=16))
    on.print(reporter._render())
    whole, step = (next(line for line in written(on).splitlines() if text in line) for text in ("pairs", "this step"))
    assert "25 % 3 of at most 12 pairs" in whole
    assert "50 % of this step" in step
    assert "━" in whole
    assert "━" in step


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
