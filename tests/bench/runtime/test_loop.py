"""Pipelined greedy output equals the unsplit model's, token for token in fp32, over real processes and gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.spec import ModelSpec, Plan
from tests.hooks import break_workers
from tests.tiny_models import save_tiny_model, tiny_prompts, unsplit_tokens

DEVICES = ("cpu:0", "cpu:1", "cpu:2", "cpu:3")
OUTPUT_LEN = 7
# Layers per stage, micro-batch size, prefill micro-batch size, micro-batches in flight, what else.
SHAPES: list[tuple[tuple[int, ...], int, int | None, int | None, dict[str, Any]]] = [
    ((6,), 5, None, None, {}),
    ((3, 3), 3, None, None, {}),
    ((1, 5), 2, 1, 2, {"prefill_chunk_size": 3}),
    ((4, 2), 5, 2, 1, {}),
    ((2, 1, 3), 2, None, None, {"prefill_chunk_size": 1}),
    ((1, 2, 1, 2), 1, None, 3, {}),
    ((3, 1, 1, 1), 4, 3, None, {"prefill_chunk_size": 100}),
    ((2, 4), 2, 1, 2, {"replicas": 2, "prefill_chunk_size": 4}),
    ((6,), 2, None, None, {"replicas": 4}),
]
PLANS = [
    (in_flight, Plan.from_layer_counts(counts, DEVICES, size, prefill_micro_batch_size=prefill, **more))
    for counts, size, prefill, in_flight, more in SHAPES
]
PLANS += [(None, plan.model_copy(update={"packed_weights": False})) for _, plan in PLANS[1:2]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bloom", "gemma2", "mixtral"])
def test_every_plan_gives_the_unsplit_models_tokens(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / family, family)
    prompts = tiny_prompts(9)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    expected = unsplit_tokens(model, prompts, output_len=OUTPUT_LEN)
    assert len({tuple(row) for row in expected}) > 3, "the model repeats itself: the test would prove little"
    eos = expected[0][2]
    expected_until_eos = unsplit_tokens(model, prompts, output_len=OUTPUT_LEN, eos_token_id=eos)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as fleet:
        for in_flight, plan in PLANS:
            results = fleet.generate(plan, prompts, max_new_tokens=OUTPUT_LEN, in_flight=in_flight, ignore_eos=True)
            assert [list(result.token_ids) for result in results] == expected, plan.describe()
        set_eos(folder, eos)
        for in_flight, plan in PLANS[1::2]:
            results = fleet.generate(plan, prompts, max_new_tokens=OUTPUT_LEN, in_flight=in_flight)
            assert [list(result.token_ids) for result in results] == expected_until_eos, plan.describe()
            assert all(len(result.token_times_s) == len(result.token_ids) for result in results)
            assert all(list(result.token_times_s) == sorted(result.token_times_s) for result in results)


# The edges that only GPUs use, over what a CPU has: the order of groups and messages is theirs.
NCCL_BY_GLOO = """
    import types
    from unittest import mock
    group = module.dist.new_group
    def new_group(ranks, backend, timeout, pg_options):
        return group(ranks, backend="gloo", timeout=timeout)
    module.dist = types.SimpleNamespace(
        **{**vars(module.dist), "ProcessGroupNCCL": mock.MagicMock(), "new_group": new_group}
    )
    module.Links.transport = lambda self, source, destination: "nccl"
    module.torch.cuda.synchronize = lambda device: None
"""
STAGED_BY_GLOO = """
    from unittest import mock
    from pipetune.bench.runtime import links
    module.torch.cuda.Event = mock.Mock
    init = links._Ring.__init__
    links._Ring.__init__ = lambda self, *args, pin=False: init(self, *args)
    module.Links._receiver = lambda self, source, messages: links.StagedReceiver(source, messages, self._device)
    module.Links._sender = lambda self, destination, messages: links.StagedSender(destination, messages)
"""


@pytest.mark.parametrize("body", [NCCL_BY_GLOO, STAGED_BY_GLOO], ids=["nccl", "staged"])
def test_the_edges_of_gpus_carry_the_same_tokens(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path / "llama", "llama")
    prompts = tiny_prompts(9)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    expected = unsplit_tokens(model, prompts, output_len=OUTPUT_LEN)
    eos = expected[0][2]
    until_eos = unsplit_tokens(model, prompts, output_len=OUTPUT_LEN, eos_token_id=eos)
    set_eos(folder, eos)
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.runtime.wiring", body=body)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as fleet:
        for in_flight, plan in PLANS[1:]:
            for ignore_eos, wanted in ((True, expected), (False, until_eos)):
                results = fleet.generate(
                    plan, prompts, max_new_tokens=OUTPUT_LEN, in_flight=in_flight, ignore_eos=ignore_eos
                )
                assert [list(result.token_ids) for result in results] == wanted, plan.describe()


def set_eos(folder: Path, eos: int) -> None:
    """Generation for use reads its end-of-sequence tokens from the folder each time."""
    from transformers import GenerationConfig

    config: Any = GenerationConfig
    config(eos_token_id=eos, pad_token_id=0).save_pretrained(folder)
