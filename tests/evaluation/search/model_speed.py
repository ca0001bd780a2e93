"""How many plans the cost model predicts a second: `python -m tests.evaluation.search.model_speed`.

32 layers over 4 stages, 64 prompts of 64 tokens, 32 tokens out, micro-batches of 8 and 16: every prediction simulates
about 200 tasks on each stage. Each repeat begins with nothing known of costs or schedules.
"""

from __future__ import annotations

import random
import statistics
import sys
import time

from pipetune.bench.memory import LayerShape, ModelShape
from pipetune.bench.spec import Plan, Workload
from pipetune.tuner.planning.partition.splits import all_partitions
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.planning.simulation.schedule import task_sequence_of

REPEATS, WANTED = 7, 2000.0
LAYERS, STAGES, PROMPTS, INPUT_LEN, OUTPUT_LEN = 32, 4, 64, 64, 32
SIZES = (8, 16)
COUNTS = (100, 2000)
"""Plans at once: a schedule is simulated once for all of its plans, so that more of them cost less each."""


def rates_of(count: int) -> list[float]:
    """Plans a second, of each repeat."""
    shape = _shape()
    devices = tuple(f"cuda:{index}" for index in range(STAGES))
    every = list(all_partitions(LAYERS, min_stages=STAGES, max_stages=STAGES))
    partitions = random.Random(0).sample(every, count // len(SIZES))
    plans = [(Plan.from_layer_counts(counts, devices, size), None) for counts in partitions for size in SIZES]
    workload = Workload(num_prompts=PROMPTS, input_len=INPUT_LEN, output_len=OUTPUT_LEN)
    rates = []
    for _ in range(REPEATS):
        task_sequence_of.cache_clear()
        model = CostModel.of_workload(shape, workload, [INPUT_LEN] * PROMPTS)
        began = time.perf_counter()
        model.predict_many(plans)
        rates.append(len(plans) / (time.perf_counter() - began))
    return rates


def main() -> int:
    """0 when the model is as fast as it must be, else 1."""
    slowest = float("inf")
    for count in COUNTS:
        rates = rates_of(count)
        middle = statistics.median(rates)
        sys.stdout.write(
            f"{count} plans at once: {middle:,.0f} plans/s (median of {len(rates)}; "
            f"{min(rates):,.0f} to {max(rates):,.0f})\n"
        )
        slowest = min(slowest, middle)
    return 0 if slowest >= WANTED else 1


def _shape() -> ModelShape:
    """A model of 7 thousand million parameters in bfloat16."""
    layer = LayerShape(weight_bytes=404_766_720, active_params=202_383_360, kv_bytes_per_token=16_384)
    return ModelShape(
        architecture="LlamaForCausalLM",
        num_parameters=6_738_415_616,
        layers_prefix="model.layers",
        first_modules=("model.embed_tokens",),
        last_modules=("model.norm", "lm_head"),
        embedding_bytes=262_144_000,
        head_bytes=262_144_000,
        other_bytes=8_192,
        tied=False,
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        vocab_size=32_000,
        dtype_bytes=2,
        layers=(layer,) * LAYERS,
    )


if __name__ == "__main__":
    raise SystemExit(main())
