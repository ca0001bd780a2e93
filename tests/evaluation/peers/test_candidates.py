"""Where searches begin: balanced, and possible."""

from __future__ import annotations

import pytest

from pipetune.bench.memory import LayerShape, ModelShape
from pipetune.bench.spec import Workload
from tests.evaluation.peers.candidates import balanced_cut, search_of


def shape(*, num_layers: int, vocab_size: int) -> ModelShape:
    return ModelShape(
        architecture="LlamaForCausalLM",
        num_parameters=1,
        layers_prefix="model.layers",
        first_modules=(),
        last_modules=(),
        embedding_bytes=0,
        head_bytes=0,
        other_bytes=0,
        tied=True,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        vocab_size=vocab_size,
        dtype_bytes=4,
        layers=(LayerShape(weight_bytes=1, active_params=3_540_000, kv_bytes_per_token=1),) * num_layers,
    )


def test_the_head_counts_as_layers_as_often_as_it_is_met() -> None:
    model = shape(num_layers=30, vocab_size=49152)
    prompts = Workload(num_prompts=16, input_len=256, output_len=4)
    assert balanced_cut(model, prompts) == 15
    assert balanced_cut(model, Workload(num_prompts=64, input_len=16, output_len=32)) == 18
    assert balanced_cut(model, prompts.model_copy(update={"kind": "score"})) == 19
    assert balanced_cut(shape(num_layers=2, vocab_size=10**7), prompts) == 1


@pytest.mark.parametrize("num_prompts", [1, 2, 16, 64])
@pytest.mark.parametrize("quick", [False, True])
def test_every_start_is_possible(num_prompts: int, quick: bool) -> None:
    workload = Workload(num_prompts=num_prompts, input_len=16, output_len=4)
    model = shape(num_layers=24, vocab_size=8192)
    sides = ("hf_one", "hf_all", "hf_two", "single", "replicas", "pipeline", "gpipe", "score_pipeline", "score_single")
    for side in sides:
        search = search_of(side, model, workload, quick=quick)
        assert 1 <= search.start.rows <= num_prompts
        assert (search.start.prefill_rows or 1) <= search.start.rows
        assert (search.start.cut is None) == (side not in ("pipeline", "gpipe", "score_pipeline"))
        assert 1 <= search.max_runs <= 6
