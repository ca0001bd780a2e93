"""What the first stage spends on one decode step of a slot: deciding, keeping the books, telling another stage.

    python -m tests.evaluation.online.order_cost [--rows 16] [--steps 5000] [--followers 1]

Each follower is a process that answers every order with the moment at which it had read it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import Sequence

from pipetune.bench.load.admission import Admission, Decode, Prefill, Request, Rules
from pipetune.bench.load.slots import Slots
from pipetune.bench.runtime.online import Mail, pack


def main() -> None:
    """Prints median and p90 of each part, in µs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--followers", type=int, default=1)
    args = parser.parse_args()
    lines = [start() for _ in range(args.followers)]
    parts = measure(lines, args.rows, args.steps)
    for line in lines:
        line.send(())
    print(f"{args.rows} rows, {args.followers} followers, {args.steps} steps; µs")
    for name, spans in parts.items():
        p50, p90 = statistics.median(spans), statistics.quantiles(spans, n=10)[-1]
        print(f"{name:>8}: p50 {1e6 * p50:6.1f}  p90 {1e6 * p90:6.1f}")


def start() -> Mail:
    """A line to a follower, a process of its own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    multiprocessing.get_context("fork").Process(target=_answer, args=(Mail(theirs),), daemon=True).start()
    return Mail(ours)


def _answer(line: Mail) -> None:
    while line.receive() != ():
        line.send(time.monotonic())


def measure(lines: Sequence[Mail], rows: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each part, step by step; `lines` lead to followers."""
    rules = Rules(slots=1, rows=rows, prefill_rows=rows)
    admission, slots = Admission(rules), Slots(rules, steps + 20)
    for number in range(rows):
        slots.arrive(number, (5,) * 10, steps + 10, None)
        admission.arrive(Request(number=number, prompt_len=10))
    parts: dict[str, list[float]] = {"decide": [], "announce": [], "wake": [], "learn": []}
    while len(parts["decide"]) < steps:
        # As between tasks: the others wait by now.
        time.sleep(0.001)
        began = time.monotonic()
        order = admission.decide()
        assert isinstance(order, Prefill | Decode)
        edits, task = slots.order(order)
        decided = time.monotonic()
        data = pack(edits, task._replace(ids=None))
        for line in lines:
            line.put(data)
        announced = time.monotonic()
        read = max(line.receive() for line in lines)
        known = time.monotonic()
        slots.known(order, [7] * len(order.requests), ())
        if isinstance(order, Prefill):
            admission.prefilled(order.requests)
        else:
            admission.decoded(order.slot)
        learned = time.monotonic()
        spans = (decided - began, announced - decided, read - announced, learned - known)
        for own, span in zip(parts.values(), spans, strict=True):
            own.append(span)
    return parts


if __name__ == "__main__":
    main()
