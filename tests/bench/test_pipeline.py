"""The public way to use a plan gives what the unsplit model gives, for text-like prompts of any length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipetune.bench.errors import ConfigError, PlanError
from pipetune.bench.pipeline import Pipeline
from pipetune.bench.spec import Plan, Sampling
from tests.tiny_models import save_tiny_model, tiny_prompts, unsplit_tokens

DEVICES = ("cpu:0", "cpu:1")
PROMPTS = tiny_prompts(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def test_two_replicas_generate_draw_and_score(folder: Path) -> None:
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_pretrained(folder).eval()
    plan = Plan.from_layer_counts((6,), DEVICES, 2, replicas=2, prefill_chunk_size=4)
    with Pipeline.start(str(folder), plan) as pipeline:
        greedy = pipeline.generate(PROMPTS, max_new_tokens=4, ignore_eos=True)
        drawn, again, other = (
            pipeline.generate(PROMPTS, max_new_tokens=4, ignore_eos=True, sampling=Sampling(seed=seed))
            for seed in (1, 1, 2)
        )
        scored = pipeline.score(PROMPTS)
        with pytest.raises(ConfigError, match="at least 1"):
            pipeline.generate(PROMPTS, max_new_tokens=0)
        with pytest.raises(ConfigError, match="tokenizer"):
            pipeline.score(["a text"])
    assert [list(result.token_ids) for result in greedy] == unsplit_tokens(model, PROMPTS, output_len=4)
    assert [result.token_ids for result in drawn] == [result.token_ids for result in again]
    assert [result.token_ids for result in drawn] != [result.token_ids for result in other]
    for prompt, result in zip(PROMPTS, scored, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            expected = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert list(result.logprobs) == pytest.approx(expected.tolist(), abs=1e-4)
        assert result.text is None


def test_a_plan_that_does_not_cover_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match="layer 4 is missing"):
        Pipeline.start(str(folder), Plan.from_layer_counts((2, 2), DEVICES, 2))
