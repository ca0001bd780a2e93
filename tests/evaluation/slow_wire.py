"""What `pipetune tune` makes of a slow wire between two hosts: `python -m tests.evaluation.slow_wire`, as root.

Hosts are network namespaces of this machine, with a core each or with all of its cores. Tunes over a fast wire and over
a slow one; prints what each search recommends, predicted against measured, and both recommendations over both wires, in
interleaved rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import math
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.stats import t
from transformers import LlamaConfig

from pipetune.bench.spec import Plan
from tests.hosts import Driver, Host, two_hosts

CABLE = f"p{os.getpid()}"
WORKLOAD = {"num_prompts": 16, "input_len": 128, "output_len": 4}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="tests.evaluation.slow_wire", description=__doc__)
    parser.add_argument("--rate", type=float, default=50e6, help="bits a second of the slow wire")
    parser.add_argument("--delay", type=float, default=0.01, help="seconds it takes")
    parser.add_argument("--n-trials", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share-cores", action="store_true", help="each host uses all cores, not one of its own")
    args = parser.parse_args()
    wires: dict[str, dict[str, float]] = {"fast": {}, "slow": {"rate": args.rate, "delay_s": args.delay}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Wide and shallow: as long on this wire as in its layers.
        LlamaConfig(
            hidden_size=1024, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=2048, bos_token_id=1, eos_token_id=2,
        ).save_pretrained(folder / "model")  # fmt: skip
        plans: dict[str, Plan] = {}
        for wire, speed in wires.items():
            print(f"load {os.getloadavg()[0]:.2f}")
            plans[wire] = _tune(folder, wire, speed, args)
        for wire, speed in wires.items():
            print(f"load {os.getloadavg()[0]:.2f}")
            _race(folder, wire, speed, plans, args)


@contextlib.contextmanager
def _hosts(speed: dict[str, float], args: argparse.Namespace) -> Iterator[tuple[Host, Host]]:
    with two_hosts(CABLE, **speed) as hosts:
        for core, host in enumerate(hosts):
            host.prefix = () if args.share_cores else ("taskset", "-c", str(core))
        yield hosts


def _tune(folder: Path, wire: str, speed: dict[str, float], args: argparse.Namespace) -> Plan:
    """The recommended plan; prints it, and how well the search's trials were predicted."""
    study = folder / wire
    with _hosts(speed, args) as hosts:
        options = (
            *("--model", folder / "model", "--load-format", "dummy", "--devices", "host0/cpu:0,host1/cpu:0"),
            *(part for key, value in WORKLOAD.items() for part in (f"--{key.replace('_', '-')}", value)),
            *("--min-stages", 2, "--replicas", 1, "--n-trials", args.n_trials, "--no-stop-early", "-o", study),
            *("--nnodes", 2, "--master-addr", hosts[0].address, "--no-progress"),
        )
        runs = [host.pipetune("tune", *options, "--node-rank", rank) for rank, host in enumerate(hosts)]
        said, complaints = runs[0].communicate()
        if runs[0].returncode:
            raise SystemExit(f"{said}{complaints}")
    with (study / "ranking.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["prediction_error"]]
    print(f"over a {wire} wire, as predicted before the plan ran and as measured then, tok/s:")
    pairs = []
    for row in rows:
        predicted, error = float(row["predicted"]), float(row["prediction_error"])
        pairs.append((predicted, predicted / (1 + error)))
        sizes = " ".join(
            f"{row[name] or '-':>4}" for name in ("micro_batch_size", "prefill_micro_batch_size", "prefill_chunk_size")
        )
        mark = " *" if row["recommended"] == "true" else ""
        print(f"  {row['layers']} {sizes} {predicted:7.1f} "
              f"{pairs[-1][1]:7.1f} {error:+6.1%}{mark}")  # fmt: skip
    unlike = [(a, b) for a, b in itertools.combinations(pairs, 2) if abs(math.log(a[1] / b[1])) > math.log(1.05)]
    right = sum((a[0] > b[0]) == (a[1] > b[1]) for a, b in unlike)
    print(f"  median error {statistics.median(abs(p / m - 1) for p, m in pairs):.1%}; in order: {right} of "
          f"{len(unlike)} pairs that differ by more than 5 %")  # fmt: skip
    plan = Plan.model_validate(json.loads((study / "best_plan.json").read_text())["plan"])
    print(f"  recommended: {_text(plan)}")
    return plan


def _text(plan: Plan) -> str:
    layers = "+".join(str(stage.end_layer - stage.first_layer) for stage in plan.stages)
    return (
        f"{layers}, micro-batch {plan.micro_batch_size}, prefill micro-batch {plan.prefill_micro_batch_size}, "
        f"chunk {plan.prefill_chunk_size}"
    )


def _race(folder: Path, wire: str, speed: dict[str, float], plans: dict[str, Plan], args: argparse.Namespace) -> None:
    """Both recommendations over one wire, in one fleet and in random order."""
    ratios = []
    with _hosts(speed, args) as hosts:
        given: dict[str, Any] = {"workload": WORKLOAD, "num_iters": 3, "load_format": "dummy"}
        driver = Driver(hosts[0], folder / "model", folder, **given)
        hosts[1].pipetune("join", driver.listen, "--node-rank", 1)
        driver.hear()
        driver.do("reference")
        for number in range(args.rounds):
            took = {}
            for name in random.sample(list(plans), 2):
                outcome = driver.do(f"measure {plans[name].model_dump_json()}")["outcome"]
                assert outcome["outcome"] == "measurement", outcome
                took[name] = statistics.median(run["duration_s"] for run in outcome["iterations"])
            ratios.append(took["fast"] / took["slow"])
            print(f"round {number} over a {wire} wire: plan of the fast wire {took['fast']:.3f} s, of the slow one "
                  f"{took['slow']:.3f} s: {ratios[-1]:.3f}")  # fmt: skip
    logs = [math.log(ratio) for ratio in ratios]
    half = t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    low, middle, high = (math.exp(statistics.mean(logs) + by) for by in (-half, 0.0, half))
    print(f"over a {wire} wire the slow wire's plan is {middle:.3f} times as fast (95 % {low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main()
