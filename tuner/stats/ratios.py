"""How many times better one thing is than another; every ratio that is shown anywhere is made here."""

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

from pipetune.bench.spec import Value

TAIL = 0.025
"""Chance that is left out at each end of an interval of 95 %."""


class Ratio(Value):
    """How many times better one thing is than another; above 1 is better."""

    value: float
    low: float | None = None
    """Lower end of its interval: with `high`, what a test that may look after every round leaves possible; of studies
    compared, 95 % confidence by the runs of both sides. None where too few runs tell one."""
    high: float | None = None
    rounds: int = 0
    """Interleaved rounds in which both were measured; 0 means unpaired."""

    @property
    def paired(self) -> bool:
        """Whether both were measured in common rounds."""
        return self.rounds > 0

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves 1 out."""
        return self.low is not None and self.high is not None and not self.low <= 1.0 <= self.high


def ratio_of(
    log_gain: float, error: float = 0.0, freedom: float = 0.0, *, tail: float = TAIL, rounds: int = 0
) -> Ratio:
    """The ratio of a gain in logarithms, of that standard error, with its t interval, which leaves out the chance
    `tail` at each end, where there are degrees of freedom for one."""
    if not freedom:
        return Ratio(value=math.exp(log_gain), rounds=rounds)
    half = float(stdtrit(freedom, 1 - tail)) * error if error else 0.0
    return Ratio(value=math.exp(log_gain), low=math.exp(log_gain - half), high=math.exp(log_gain + half), rounds=rounds)


def welch(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Standard error of the difference of two means of logarithms, and its freedom (Welch 1947, Biometrika 34, 28-35).

    The runs, at least one a side and all above zero, are taken for independent. Those of one study share a session, so
    an interval by them says what runs differ by and nothing of what nights do. Without two runs a side there is no
    freedom.
    """
    if len(ours) < 2 or len(theirs) < 2:
        return 0.0, 0.0
    shares = [statistics.variance(map(math.log, side)) / len(side) for side in (ours, theirs)]
    parts = [share**2 / (len(side) - 1) for share, side in zip(shares, (ours, theirs), strict=True)]
    return math.sqrt(sum(shares)), sum(shares) ** 2 / sum(parts) if any(shares) else math.inf
