"""What is said while a command works: foreign text as it is, lines that fit, nothing when silent."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipetune.bench.fleet.fleet import Progress
from pipetune.tuner.progress import (
    LiveReporter,
    PlainReporter,
    Reporter,
    describe,
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
