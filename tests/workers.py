"""The processes of a fleet's workers, from outside."""

from __future__ import annotations

from pipetune.bench.fleet.fleet import Fleet


def worker_pids(fleet: Fleet) -> tuple[int, ...]:
    """Process ids by rank; empty while the fleet is down."""
    return tuple(worker.process.pid for worker in fleet._supervisor._workers)
