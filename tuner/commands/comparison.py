"""One plan beside the un-pipelined model and our single stage: interleaved rounds in one fleet, and what they say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from pipetune.bench import metrics
from pipetune.bench.record import Failure, Measurement, Outcome
from pipetune.bench.spec import Value
from pipetune.tuner.progress import Reporter, describe
from pipetune.tuner.ranking import finals

_MOST_SHOWN = 4
"""Stages whose times fit side by side."""


class Contender(Value):
    """One row of the comparison: medians over the rounds."""

    name: str
    title: str
    throughput: float
    """Tokens put out in a second; where texts are scored, all tokens."""
    q1: float
    q3: float
    ratio: float
    """Over the baseline: the median of the rounds' ratios."""
    ratio_low: float
    ratio_high: float
    bubble_ratio: float | None
    mean_ttft_ms: float | None
    """None where texts are scored."""
    mean_e2el_ms: float
    stage_busy_ms: tuple[float, ...]
    """Of the stages of all replicas."""
    throughputs: tuple[float, ...]
    """Of each round, in tokens per second."""

    @property
    def iqr(self) -> float:
        return self.q3 - self.q1


class Comparison(Value):
    """What the rounds said; the first contender is the baseline."""

    rounds: int
    contenders: tuple[Contender, ...]

    def print(self, console: Console) -> None:
        """As a table of at most 80 columns."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("")
        generates = all(row.mean_ttft_ms is not None for row in self.contenders)
        latency = "TTFT" if generates else "E2EL"
        for name in ("tok/s", "IQR", "×", "worst–best", "bubble", latency, "busy/stage"):
            table.add_column(name, justify="right")
        for row in self.contenders:
            table.add_row(
                row.name,
                f"{row.throughput:.1f}",
                f"{row.iqr:.1f}",
                f"{row.ratio:.2f}",
                f"{row.ratio_low:.2f}–{row.ratio_high:.2f}",
                f"{100 * row.bubble_ratio:.0f} %" if row.bubble_ratio is not None else "–",
                f"{(row.mean_ttft_ms if generates and row.mean_ttft_ms else row.mean_e2el_ms) / 1e3:.2f} s",
                _busy_text(row.stage_busy_ms),
            )
        for row in self.contenders:
            console.print(f"{row.name}: {row.title}", markup=False)
        console.print()
        console.print(table)
        console.print(
            f"\nMedians of {self.rounds} interleaved rounds in random order; × is over the baseline, round by round.",
            markup=False,
        )


def run_rounds(
    contenders: Mapping[str, Callable[[], Outcome]], *, rounds: int, seed: int, reporter: Reporter
) -> dict[str, list[Measurement]] | Failure:
    """Runs every contender once a round, each round in an order of its own; the first failure ends it."""
    measured: dict[str, list[Measurement]] = {name: [] for name in contenders}
    for round_, name in finals.schedule(tuple(contenders), rounds=rounds, seed=seed):
        reporter.begin(f"round {round_ + 1} of {rounds} · {name}")
        outcome = contenders[name]()
        reporter.end(describe(outcome, ()))
        if isinstance(outcome, Failure):
            return outcome
        measured[name].append(outcome)
    return measured


def compare(measured: Mapping[str, Sequence[Measurement]], titles: Mapping[str, str]) -> Comparison:
    """Medians and ratios of what was measured; the first name is the baseline."""
    base = [_throughput(measurement) for measurement in next(iter(measured.values()))]
    return Comparison(
        rounds=len(base),
        contenders=tuple(_contender(name, titles[name], runs, base) for name, runs in measured.items()),
    )


def _contender(name: str, title: str, runs: Sequence[Measurement], base: Sequence[float]) -> Contender:
    derived = [metrics.derive(run) for run in runs]
    throughputs = [_throughput(run) for run in runs]
    ratios = [own / other for own, other in zip(throughputs, base, strict=True)]
    busy = [row["stage_busy_ms"] for run in runs if (row := metrics.stage_metrics(run))]
    return Contender(
        name=name,
        title=title,
        throughput=statistics.median(throughputs),
        q1=metrics.percentile(throughputs, 0.25),
        q3=metrics.percentile(throughputs, 0.75),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        bubble_ratio=_median(derived, "bubble_ratio"),
        mean_ttft_ms=_median(derived, "mean_ttft_ms"),
        mean_e2el_ms=statistics.median(values["mean_e2el_ms"] for values in derived),
        stage_busy_ms=tuple(statistics.median(column) for column in zip(*busy, strict=True)) if busy else (),
        throughputs=tuple(throughputs),
    )


def _throughput(measurement: Measurement) -> float:
    return statistics.median(metrics.throughputs(measurement))


def _median(derived: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [row[name] for row in derived if name in row]
    return statistics.median(values) if values else None


def _busy_text(stage_busy_ms: Sequence[float]) -> str:
    """Of each stage, or of very many the least and the largest."""
    if not stage_busy_ms:
        return "–"
    shown = [f"{busy / 1e3:.2f}" for busy in stage_busy_ms]
    if len(shown) > _MOST_SHOWN:
        shown = [f"{min(stage_busy_ms) / 1e3:.2f}–{max(stage_busy_ms) / 1e3:.2f}"]
    return " ".join(shown) + " s"
