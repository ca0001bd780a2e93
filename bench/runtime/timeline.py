"""What one stage did and when: compute spans and waits, taken without stalling the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipetune.bench.record import StageTrace
from pipetune.bench.runtime.device import Clock, Stamp


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedTimeline:
    """Times in seconds of `DeviceContext.now`; arrays run along the tasks this stage really ran."""

    started_s: float
    ended_s: float
    compute_start_s: list[float]
    compute_end_s: list[float]
    recv_wait_s: list[float]
    send_wait_s: list[float]
    token_times_s: list[float]

    def trace(self, zero_s: float) -> StageTrace:
        """The stage's trace, counted from the moment the prompts were given."""
        return StageTrace(
            compute_start_s=tuple(max(0.0, round(value - zero_s, 6)) for value in self.compute_start_s),
            compute_end_s=tuple(max(0.0, round(value - zero_s, 6)) for value in self.compute_end_s),
            recv_wait_s=tuple(max(0.0, round(value, 6)) for value in self.recv_wait_s),
            send_wait_s=tuple(round(value, 6) for value in self.send_wait_s),
        )

    def host_gap_s(self) -> float:
        """Time of the loop that was neither compute nor waiting."""
        busy = sum(end - start for start, end in zip(self.compute_start_s, self.compute_end_s, strict=True))
        return max(0.0, self.ended_s - self.started_s - busy - sum(self.recv_wait_s) - sum(self.send_wait_s))


class Timeline:
    """Collects stamps while a stage works; `enabled=False` keeps only the token times."""

    def __init__(self, clock: Clock, now: Callable[[], float] = time.monotonic, *, enabled: bool = True) -> None:
        self._clock, self._now = clock, now
        self._enabled = enabled
        self.reset()

    def reset(self) -> None:
        """Forgets everything, before an iteration."""
        self._starts: list[Stamp] = []
        self._ends: list[Stamp] = []
        self._pending: Stamp | None = None
        self._receives: list[Stamp] = []
        self._send_wait_s: list[float] = []
        self._tokens: list[Stamp] = []
        self._started_s = self._now()

    def receive_begins(self) -> None:
        """From here to the begin of compute, the task waits for its input: the host on CPU, the stream on GPUs."""
        if self._enabled:
            self._pending = self._clock.stamp()

    def compute_begins(self) -> None:
        """The next task's compute is about to be issued."""
        if self._enabled:
            assert self._pending is not None
            self._receives.append(self._pending)
            self._starts.append(self._clock.stamp())

    def compute_ended(self) -> None:
        """The task's compute has been issued."""
        if self._enabled:
            self._ends.append(self._clock.stamp())

    def sent(self, wait_s: float) -> None:
        """The output was handed over, which blocked the host for so long."""
        if self._enabled:
            self._send_wait_s.append(wait_s)

    def tokens_known(self) -> None:
        """The task's tokens are sampled; kept even when instrumentation is off."""
        self._tokens.append(self._clock.stamp())

    def resolve(self) -> ResolvedTimeline:
        """Waits for the device and turns stamps into times."""
        count = len(self._starts)
        times = self._clock.resolve([*self._receives, *self._starts, *self._ends, *self._tokens])
        receives, times = times[:count], times[count:]
        return ResolvedTimeline(
            started_s=self._started_s,
            ended_s=self._now(),
            compute_start_s=times[:count],
            compute_end_s=times[count : 2 * count],
            recv_wait_s=[start - begin for begin, start in zip(receives, times[:count], strict=True)],
            send_wait_s=self._send_wait_s,
            token_times_s=times[2 * count :],
        )
