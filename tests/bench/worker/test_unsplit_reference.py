"""The unsplit model asked for the truth: its tokens, its draws, its log-probabilities."""

from __future__ import annotations

from typing import Any

import torch

from pipetune.bench.runtime.sampling import draw, uniforms
from pipetune.bench.spec import Sampling
from tests.bench.worker.references import OUTPUT_LEN, PROMPTS, reference_of
from tests.tiny_models import unsplit_tokens


def test_the_greedy_reference_is_what_transformers_generates(model: Any) -> None:
    reference = reference_of(model)
    assert reference.tokens.tolist() == unsplit_tokens(model, PROMPTS, output_len=OUTPUT_LEN)
    assert reference.scores is None
    assert (reference.margins > 0).all()


def test_a_sampled_reference_draws_as_the_runtime_does(model: Any) -> None:
    """One prompt at a time, without cache or padding: the plainest way to the same tokens."""
    sampling = Sampling(temperature=1.5, top_k=40, top_p=0.9, seed=3)
    reference = reference_of(model, sampling=sampling)
    numbers = uniforms(sampling, range(len(PROMPTS)), OUTPUT_LEN)
    for index, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for step in range(OUTPUT_LEN):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[:, -1]
            ids.append(int(draw(logits, numbers[index : index + 1, step], sampling)))
        assert reference.tokens[index].tolist() == ids[len(prompt) :]
    assert reference.tokens.tolist() != reference_of(model).tokens.tolist()
    assert (
        reference.tokens.tolist()
        != reference_of(model, sampling=sampling.model_copy(update={"seed": 4})).tokens.tolist()
    )
    assert reference.margins.shape == reference.tokens.shape
    assert (reference.margins > 0).all()


def test_scores_are_the_log_probabilities_of_each_text_alone(model: Any) -> None:
    reference = reference_of(model, kind="score")
    assert reference.scores is not None
    for prompt, scores in zip(PROMPTS, reference.scores, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            expected = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert reference.tokens.shape == (len(PROMPTS), 0)
