"""The same prompts and outputs of equal length, all there at once: served one by one over time, against one batch.

    python -m tests.evaluation.online.against_batch --devices cpu:0,cpu:1 --counts 17,13 --micro-batch-size 8

Rounds are interleaved, and the order within them alternates; what is printed are ratios of tokens a second.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence

from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.load.online import OnlineRequest
from pipetune.bench.spec import ModelSpec, Plan
from tests.evaluation.harness import exit_code_of, say


def main() -> int:
    """Prints each round's ratio, and their median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices", default="cpu:0,cpu:1")
    parser.add_argument("--counts", default="17,13")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--prefill-size", type=int)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--in-flight", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    devices = tuple(args.devices.split(","))
    plan = Plan.from_layer_counts(
        tuple(map(int, args.counts.split(","))),
        devices,
        args.micro_batch_size,
        prefill_micro_batch_size=args.prefill_size,
        prefill_chunk_size=args.chunk,
    )
    source = random.Random(0)
    prompts = [[source.randrange(100, 1000) for _ in range(args.input_len)] for _ in range(args.num_prompts)]
    with Experiment.start(ModelSpec(name=args.model), devices) as experiment:
        ratios = measure(experiment.fleet, plan, prompts, args.output_len, in_flight=args.in_flight, rounds=args.rounds)
    print(f"online / batch: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    return 0


def measure(
    fleet: Fleet, plan: Plan, prompts: Sequence[Sequence[int]], output_len: int, *, in_flight: int, rounds: int
) -> list[float]:
    """Tokens a second served one by one, over those of a batch, round by round behind one that warms up."""
    requests = [
        OnlineRequest(number=number, prompt=tuple(prompt), output_len=output_len)
        for number, prompt in enumerate(prompts)
    ]
    count = len(prompts) * output_len
    ratios = []
    for number in range(rounds + 1):
        took: dict[str, float] = {}
        tokens: dict[str, list[tuple[int, ...]]] = {}
        for way in ("online", "batch") if number % 2 else ("batch", "online"):
            if way == "online":
                run = fleet.run_trace(plan, requests, in_flight=in_flight)
                took[way] = run.duration_s
                tokens[way] = [one.token_ids for one in run.requests]
            else:
                results = fleet.generate(plan, prompts, max_new_tokens=output_len, in_flight=in_flight, ignore_eos=True)
                took[way] = max(result.e2el_s for result in results)
                tokens[way] = [result.token_ids for result in results]
        same = sum(one == other for one, other in zip(*tokens.values(), strict=True))
        say(
            f"round {number}: online {count / took['online']:.1f}, batch {count / took['batch']:.1f} tokens/s, "
            f"ratio {took['batch'] / took['online']:.3f}; {same} of {len(prompts)} outputs equal"
            + ("; warms up" if number == 0 else "")
        )
        if number:
            ratios.append(took["batch"] / took["online"])
    return ratios


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
