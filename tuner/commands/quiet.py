"""The load of a machine before something is measured on it: said, and waited for if that is asked for."""

import time
from collections.abc import Sequence

from pipetune.bench.fleet.fleet import load_now
from pipetune.tuner.progress import Reporter

_LOOK_S = 5.0
"""How long it must be quiet."""


def look_at_load(devices: Sequence[str], reporter: Reporter, wait_minutes: float | None = None) -> None:
    """Says what else these devices do, once it was waited for so long; where nobody listens, it only waits."""
    if reporter.is_silent and not wait_minutes:
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
