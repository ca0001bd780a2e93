"""The landscapes that are measured: what is asked, short enough that each takes half an hour at most."""

from __future__ import annotations

from pipetune.bench.spec import ModelSpec, Workload
from tests.evaluation.search.landscape import LandscapeSpec

_TWO = ("cpu:0", "cpu:1")

MEASURED = {
    spec.name: spec
    for spec in (
        LandscapeSpec(
            name="smollm2-prefill-heavy",
            about="SmolLM2-135M, 16 prompts of 48 tokens, 4 tokens out, two CPU workers",
            model=ModelSpec(name="smollm2-135m"),
            workload=Workload(num_prompts=16, input_len=48, output_len=4),
            device_orders=(_TWO,),
            micro_batch_sizes=(2, 4, 8),
        ),
        LandscapeSpec(
            name="smollm2-decode-heavy",
            about="SmolLM2-135M, 32 prompts of 8 tokens, 8 tokens out, two CPU workers",
            model=ModelSpec(name="smollm2-135m"),
            workload=Workload(num_prompts=32, input_len=8, output_len=8),
            device_orders=(_TWO,),
            micro_batch_sizes=(8, 16, 32),
        ),
        LandscapeSpec(
            name="unlike-layers",
            about="8 dense layers before 8 mixtures of experts (examples/dummy-moe-16l), two CPU workers",
            model=ModelSpec(name="examples/dummy-moe-16l", load_format="dummy"),
            workload=Workload(num_prompts=16, input_len=32, output_len=8),
            device_orders=(_TWO,),
            micro_batch_sizes=(2, 4, 8, 16),
        ),
        LandscapeSpec(
            name="unlike-devices",
            about="24 layers (examples/dummy-llama-24l), the second CPU worker kept to AVX2, both device orders",
            model=ModelSpec(name="examples/dummy-llama-24l", load_format="dummy"),
            workload=Workload(num_prompts=16, input_len=32, output_len=8),
            device_orders=(_TWO, _TWO[::-1]),
            micro_batch_sizes=(4, 8),
            worker_env={"cpu:1": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}},
        ),
    )
}
