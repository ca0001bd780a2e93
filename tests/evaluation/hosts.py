"""How fast faults over two hosts are found, and what a second host costs: `python -m tests.evaluation.hosts`, as root.

Hosts are network namespaces of this machine. Prints a table of faults with the seconds until each was found, and the
rate of one plan over two hosts against one, in interleaved pairs of fleets.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.hosts import Driver, Host, cut, two_hosts
from tests.tiny_models import save_tiny_model

HANG_TIMEOUT_S = 4.0
CABLE = f"p{os.getpid()}"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="tests.evaluation.hosts", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="of a fleet over one host and one over two")
    parser.add_argument("--faults", type=int, default=3, help="how often each fault is injected")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_model(folder / "llama", "llama")
        print(f"load {os.getloadavg()[0]:.2f}; hang_timeout_s {HANG_TIMEOUT_S:g}")
        for what in ("kill -9", "SIGSTOP", "cable cut"):
            found = [_fault(what, model, folder) for _ in range(args.faults)]
            if not found:
                break
            noticed, left = zip(*found, strict=True)
            print(f"{what:10} found after {_spread(noticed)} s; no process of the fleet {_spread(left)} s after it")
        random.seed(0)
        ratios = []
        for pair in range(args.pairs):
            rates: dict[int, float] = {}
            for hosts in random.sample((1, 2), 2):
                rates[hosts] = _rate(hosts, model, folder)
            ratios.append(rates[2] / rates[1])
            print(f"pair {pair}: one host {rates[1]:.1f}, two hosts {rates[2]:.1f} passes/s: {ratios[-1]:.3f}")
        logs = [math.log(one) for one in ratios]
        middle = math.exp(statistics.mean(logs))
        half = 2.776 * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) == 5 else math.nan
        print(f"two hosts over one: {middle:.3f} (95 % {middle * math.exp(-half):.3f}-{middle * math.exp(half):.3f})")
        print(f"load {os.getloadavg()[0]:.2f}")


def _spread(values: tuple[float, ...]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"


def _fault(what: str, model: Path, folder: Path) -> tuple[float, float]:
    """Seconds until the fault was found, and from then until no worker was left."""
    with two_hosts(CABLE) as hosts:
        driver = _up(hosts, model, folder, hang_timeout_s=HANG_TIMEOUT_S, num_iters=100_000)
        (victim,) = hosts[1].workers()
        workers = [*hosts[0].workers(), victim]
        driver.tell("measure")
        time.sleep(3.0)
        began = time.monotonic()
        if what == "cable cut":
            cut(hosts[1], CABLE, "b")
        else:
            victim.send_signal(signal.SIGKILL if what == "kill -9" else signal.SIGSTOP)
        outcome = driver.hear()["outcome"]
        found = time.monotonic()
        assert outcome["outcome"] == "failure", outcome
        while any(psutil.pid_exists(one.pid) for one in workers):
            assert time.monotonic() < found + 60, "workers are left"
            time.sleep(0.02)
        return found - began, time.monotonic() - found


def _rate(num_hosts: int, model: Path, folder: Path) -> float:
    """Passes a second of one plan, in the median."""
    with two_hosts(CABLE) as hosts:
        given: dict[str, Any] = {
            "num_iters": 60,
            "workload": {"num_prompts": 6, "input_len": 12, "output_len": 16},
        }
        for core, host in enumerate(hosts):
            # Workers take all cores of their host.
            host.prefix = () if num_hosts == 1 else ("taskset", "-c", str(core))
        if num_hosts == 1:
            driver = Driver(hosts[0], model, folder, devices="cpu:0,cpu:1", listen=None, **given)
            driver.hear()
        else:
            driver = _up(hosts, model, folder, **given)
        outcome = driver.do("measure")["outcome"]
        durations: list[float] = [run["duration_s"] for run in outcome["iterations"]]
        return 1 / statistics.median(durations)


def _up(hosts: tuple[Host, Host], model: Path, folder: Path, **given: Any) -> Driver:
    driver = Driver(hosts[0], model, folder, **given)
    hosts[1].pipetune("join", driver.listen, "--node-rank", 1)
    assert driver.hear()["up"]
    return driver


if __name__ == "__main__":
    main()
