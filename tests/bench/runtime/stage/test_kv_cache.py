"""KV slots over several passes: what one pass left in them must not reach the next."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.loop import StageLoop, Status
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.spec import ModelSpec

HYBRID = {
    "architectures": ["JambaForCausalLM"],
    "model_type": "jamba",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 4,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
    "vocab_size": 64,
}


def test_recurrent_states_start_anew_with_every_prefill(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HYBRID), encoding="utf-8")
    stage = Stage(resolve_model(ModelSpec(name=str(tmp_path), load_format="dummy")), torch.device("cpu"))
    stage.assign(0, 4, is_first=True, is_last=True)
    loop = StageLoop(stage, DeviceContext("cpu:0", num_threads=1), Status())
    # Two micro-batches of the same prompts, one after the other through one slot; and all of it twice.
    prompts = ((5, 6, 7), (8, 9, 10)) * 2
    job = Job(
        prompts=prompts,
        output_len=4,
        micro_batch_size=2,
        prefill_size=2,
        in_flight=1,
        pad_token_id=0,
        keep_margins=True,
    )
    loop.prepare(job)
    passes = [loop.run(job) for _ in range(2)]
    for one in passes:
        assert one.tokens is not None
        assert one.margins is not None
        assert one.tokens[0] == one.tokens[2]
        assert torch.allclose(one.margins[1], one.margins[3])
    assert passes[0].tokens == passes[1].tokens
