"""What a command says while it works: one live line on a terminal, plain lines elsewhere, always on stderr."""

import time
from collections.abc import Mapping, Sequence
from typing import Self

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.text import Text

from pipetune.bench import metrics
from pipetune.bench.fleet.fleet import Progress, load_now
from pipetune.bench.record import Failure, Outcome

_MANY_STEPS = 8
"""Steps of a worker's that a bar is drawn for, and a log told of by quarters."""
_LOOK_S = 5.0
"""How long a machine must be quiet."""


class Steps:
    """How far a work of several steps is, by those done since it was first looked at."""

    def __init__(self, done: int, left: int, what: str) -> None:
        self.first, self.done, self.left, self.what = done, done, left, what
        self._began = time.monotonic()

    @property
    def total(self) -> int:
        """Steps done and left."""
        return self.done + self.left

    @property
    def text(self) -> str:
        """`7 of at most 30 runs · about 4 min left`."""
        return f"{self.done} of at most {self.total} {self.what}{self.time_text}"

    @property
    def time_text(self) -> str:
        """` · about 4 min left`; empty before the first step and behind the last."""
        if self.done == self.first or not self.left:
            return ""
        left_s = (time.monotonic() - self._began) * self.left / (self.done - self.first)
        return f" · about {left_s:.0f} s left" if left_s < 90 else f" · about {left_s / 60:.0f} min left"

    def at(self, done: int, left: int, what: str) -> Self:
        """This one, further on; a new one where it is of something else."""
        if what != self.what or done < self.done:
            return type(self)(done, left, what)
        self.done, self.left = done, left
        return self


class Reporter:
    """Who waits is told what runs, how far it is, and what came out; this one says nothing, as `--no-progress` wants.
    It is entered around all work that it is told of, and may be entered again."""

    _course: Steps | None = None
    _steps = Steps(0, 0, "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def say(self, text: str) -> None:
        """A line that stays."""

    def begin(self, text: str) -> None:
        """What runs now: `trial 3 of 20 · 17+13 · micro-batch 8`."""

    def end(self, text: str) -> None:
        """What came of it."""

    def best(self, text: str) -> None:
        """The best so far."""

    def fleet(self, progress: Progress) -> None:
        """What the workers are doing."""
        done, total = progress.done or 0, progress.total or 0
        self._steps = self._steps.at(done, total - done, progress.phase)

    def course(self, done: int, left: int, what: str = "runs") -> None:
        """How many steps of the whole work are done, and left at most."""
        self._course = (self._course or Steps(done, left, what)).at(done, left, what)


def make_reporter(console: Console, *, silent: bool = False) -> Reporter:
    """Live on a terminal, plain lines otherwise; silent if asked."""
    if silent:
        return Reporter()
    return LiveReporter(console) if console.is_terminal and not console.is_dumb_terminal else PlainReporter(console)


def look_at_load(devices: Sequence[str], reporter: Reporter, wait_minutes: float | None = None) -> None:
    """Says what else these devices do, once it was waited for so long; where nobody listens, it only waits."""
    if type(reporter) is Reporter and not wait_minutes:
        return
    began = time.monotonic()
    busy = load_now(devices)
    if busy and wait_minutes:
        reporter.begin(f"waiting for a quiet machine, {wait_minutes:g} min at most: {'; '.join(busy)}")
        while busy and time.monotonic() - began < 60 * wait_minutes:
            busy = load_now(devices, _LOOK_S)
        reporter.end(f"{'still busy' if busy else 'quiet'} after {time.monotonic() - began:.0f} s")
    if busy:
        way_out = "" if wait_minutes else ", or wait by --wait-for-quiet MINUTES"
        reporter.say(f"this machine is busy: {'; '.join(busy)}. What is measured now is doubtful: end them{way_out}")


def progress_text(progress: Progress) -> str:
    """`stage 1 · measure 2/3`, or the worker's own words."""
    counted = progress.total is not None and progress.done is not None and progress.total > 1
    parts = [
        f"stage {progress.stage}" if progress.stage is not None else "",
        f"{progress.phase} {(progress.done or 0) + 1}/{progress.total}" if counted else progress.phase,
        progress.message,
    ]
    return " · ".join(part for part in parts if part)


def describe(result: Outcome, objectives: Sequence[str]) -> str:
    """What came of a run, in a line."""
    if isinstance(result, Failure):
        return f"{result.kind.value}: {result.message}"
    derived = metrics.derive(result)
    shown = ("output_throughput", "bubble_ratio", "mean_ttft_ms")
    if "output_throughput" not in derived:
        shown = ("total_token_throughput", "bubble_ratio", "mean_e2el_ms")
    return values_text(derived, (*objectives, *shown))


def values_text(values: Mapping[str, float], names: Sequence[str]) -> str:
    """Metrics for people: `95.2 tok/s · bubble 11 % · mean_ttft 1204 ms`; those that are missing are left out."""
    scored, shown = "output_throughput" not in values, (name for name in dict.fromkeys(names) if name in values)
    return " · ".join(_value_text(name, values[name], scored=scored) for name in shown)


def _value_text(name: str, value: float, *, scored: bool) -> str:
    if name == "output_throughput" or (scored and name == "total_token_throughput"):
        return f"{value:.1f} tok/s"
    if name == "bubble_ratio":
        return f"bubble {100 * value:.0f} %"
    return f"{name.removesuffix('_ms')} {value:.0f} ms" if name.endswith("_ms") else f"{name} {value:.4g}"


class PlainReporter(Reporter):
    """Whole lines, for logs: what begins, what came of it, and long first steps such as a download."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_message = ""
        self._begun = ""
        self._quarter = 0

    def say(self, text: str) -> None:
        """Prints the line."""
        # Text may come from a model or a path: it is never markup.
        self._console.print(Text(text), soft_wrap=True)

    def begin(self, text: str) -> None:
        """Prints what runs now."""
        self._begun = text
        self.say(text)

    def end(self, text: str) -> None:
        """Prints what came of it, indented."""
        self.say(f"  {text}")

    def course(self, done: int, left: int, what: str = "runs") -> None:
        """Prints it."""
        super().course(done, left, what)
        if done and self._course:
            self.say(f"  {self._course.text}")

    def fleet(self, progress: Progress) -> None:
        """Prints a worker's message once, if it says something new, and each quarter of many steps."""
        super().fleet(progress)
        steps = self._steps
        quarter = 4 * steps.done // steps.total if steps.total >= _MANY_STEPS else 0
        if quarter and quarter != self._quarter:
            self.say(f"  {steps.what} {25 * quarter} %{steps.time_text}")
        self._quarter = quarter
        if progress.message and progress.message not in (self._last_message, self._begun):
            self._last_message = progress.message
            self.say(f"  {progress_text(progress)}")


class LiveReporter(Reporter):
    """Lines that stay scroll by above two that change: what runs now, and the best so far."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._now, self._fleet, self._best = "", "", ""
        self._began = time.monotonic()
        self._spinner = Spinner("dots")
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Prints the line above those that change."""
        self._console.print(Text(text))

    def begin(self, text: str) -> None:
        """Shows what runs now, in place of what ran before."""
        self._now, self._fleet, self._began = text, "", time.monotonic()
        self._steps = Steps(0, 0, "")

    def end(self, text: str) -> None:
        """Prints what ran with what came of it, above the lines that change."""
        self._console.print(Text.assemble((self._now, ""), "\n  ", (text, "dim")))
        self._now, self._fleet = "", ""

    def best(self, text: str) -> None:
        """Shows the best so far."""
        self._best = text

    def fleet(self, progress: Progress) -> None:
        """Shows what the workers are doing beside what runs now."""
        self._fleet = progress_text(progress) if progress.message != self._now else ""
        super().fleet(progress)

    def _render(self) -> RenderableType:
        lines: list[RenderableType] = []
        if self._now or self._fleet:
            seconds = time.monotonic() - self._began
            self._spinner.update(text=_one_line(self._now or self._fleet))
            lines.append(self._spinner)
            doing = f"  {self._fleet} · {seconds:.0f} s" if self._now and self._fleet else f"  {seconds:.0f} s"
            lines.append(_one_line(doing, "dim"))
        if self._steps.total >= _MANY_STEPS:
            lines.append(_bar(self._steps, f"of this step{self._steps.time_text}"))
        if self._course:
            lines.append(_bar(self._course, self._course.text))
        if self._best:
            lines.append(_one_line(f"  best so far: {self._best}", "green"))
        return Group(*lines)


def _bar(steps: Steps, text: str) -> Columns:
    total = steps.total or 1
    bar = ProgressBar(total=total, completed=steps.done, width=12)
    return Columns((" ", bar, _one_line(f"{100 * steps.done / total:.0f} % {text}")))


def _one_line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
