"""The truth that plans are checked against: what it holds, how it is compared, and that it must itself be numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipetune.bench.errors import ModelError, StudyError
from pipetune.bench.runtime.sampling import draw, uniforms
from pipetune.bench.spec import Protocol, Sampling, Workload
from pipetune.bench.worker.acceptance import wrong_output
from pipetune.bench.worker.reference import (
    FLOOR_ULPS,
    Reference,
    compare_logits,
    compare_scores,
    compare_tokens,
    spread_of,
)
from pipetune.bench.worker.unsplit_reference import make_reference
from tests.tiny_models import save_tiny_model, tiny_prompts, unsplit_tokens

PROMPTS = tiny_prompts(7)
OUTPUT_LEN = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    untyped: Any = AutoModelForCausalLM
    return untyped.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("models"), "llama")).eval()


def reference_of(model: Any, **workload: Any) -> Reference:
    return make_reference(
        model,
        PROMPTS,
        workload=Workload(num_prompts=len(PROMPTS), output_len=OUTPUT_LEN, **workload),
        protocol=Protocol(),
        dtype=torch.float32,
        pad_token_id=0,
        workload_digest="a digest",
    )


def test_passes_that_agree_bit_for_bit_leave_some_units_in_the_last_place() -> None:
    logits = torch.tensor([[1.0, -8.0]])
    floor = FLOOR_ULPS[torch.float32] * torch.finfo(torch.float32).eps * 8
    assert spread_of(logits, [logits.clone()], torch.float32) == (floor, floor)
    assert spread_of(logits, [logits + 0.5], torch.float32) == (0.5, 0.5)
    many = logits.expand(5, -1)
    one_off = many + torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0]).unsqueeze(-1)
    assert spread_of(many, [one_off], torch.float32) == (3.0, floor), "one position does not move the median"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_overflows_is_refused_by_its_dtype(value: float) -> None:
    logits = torch.tensor([[1.0, value]])
    with pytest.raises(ModelError, match=r"float16.*not finite"):
        spread_of(logits, [logits], torch.float16)


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


@pytest.mark.parametrize("kind", ["generate", "score"])
def test_a_reference_comes_back_from_its_file(kind: str, model: Any, tmp_path: Path) -> None:
    reference = reference_of(model, kind=kind)
    reference.save(tmp_path / "reference")
    loaded = Reference.load(tmp_path / "reference", "a digest")
    for name in ("tokens", "margins", "logits"):
        assert torch.equal(getattr(loaded, name), getattr(reference, name))
    assert (loaded.checked, loaded.spread, loaded.source) == (reference.checked, reference.spread, "unsplit")
    if reference.scores is None:
        assert loaded.scores is None
    else:
        assert loaded.scores is not None
        assert all(torch.equal(own, given) for own, given in zip(loaded.scores, reference.scores, strict=True))
    with pytest.raises(StudyError, match="another model or workload"):
        Reference.load(tmp_path / "reference", "another digest")


def test_scores_that_are_off_are_wrong_output(model: Any) -> None:
    reference = reference_of(model, kind="score")
    assert reference.scores is not None
    right = dict(enumerate(reference.scores))
    check = compare_scores(reference, right)
    assert check.compared_logits == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert wrong_output(check, scored=True) is None
    for wrong in (1e-2, float("nan")):
        longest = max(right, key=lambda index: len(right[index]))
        off = right[longest].clone()
        off[-1] += wrong
        failure = wrong_output(compare_scores(reference, {**right, longest: off}), scored=True)
        assert failure is not None
        assert "log-probabilities" in failure.message


def test_tokens_may_part_where_the_margin_is_within_the_tolerance(model: Any) -> None:
    reference = reference_of(model, sampling=Sampling(seed=1))
    own = {index: row.tolist() for index, row in enumerate(reference.tokens)}
    assert compare_tokens(reference, own) == (0, 0)
    own[2][3] += 1
    assert compare_tokens(reference, own) == (1, 0)
    reference.margins[2, 3] = reference.tolerance
    assert compare_tokens(reference, own) == (0, 1)


def rerouted() -> Reference:
    """As of a model with experts in half precision: one position of its own passes came out otherwise."""
    torch.manual_seed(0)
    return Reference(
        source="unsplit",
        workload_digest="",
        tokens=torch.zeros((4, 8), dtype=torch.long),
        margins=torch.ones((4, 8)),
        checked=(0, 1, 2, 3),
        logits=torch.randn(4, 8, 50) * 3,
        spread=2.0,
        typical=0.05,
    )


def off_by(reference: Reference, errors: torch.Tensor) -> dict[int, torch.Tensor]:
    """Logits whose largest error at each position `[4, 8]` is given."""
    noise = torch.rand(reference.logits.shape) * 2 - 1
    noise = noise / noise.abs().amax(-1, keepdim=True) * errors.unsqueeze(-1)
    return dict(enumerate(reference.logits + noise))


def test_an_expert_routed_otherwise_at_one_position_is_not_a_wrong_plan() -> None:
    reference = rerouted()
    errors = torch.full((4, 8), 0.06)
    errors[2, 5] = 9.0
    check = compare_logits(reference, off_by(reference, errors))
    assert (check.outliers, check.positions) == (1, 32)
    assert wrong_output(check, may_route_otherwise=True) is None
    assert wrong_output(check) is not None, "a model without experts has no such excuse"
    errors[2] = 9.0
    several = compare_logits(reference, off_by(reference, errors))
    assert wrong_output(several, may_route_otherwise=True) is not None, "a whole prompt is no accident"


def test_a_wrong_stage_is_caught_behind_a_spread_that_one_position_widened() -> None:
    reference = rerouted()
    check = compare_logits(reference, off_by(reference, torch.full((4, 8), 1.0)))
    assert check.max_logit_error < check.tolerance
    for may_route_otherwise in (False, True):
        failure = wrong_output(check, may_route_otherwise=may_route_otherwise)
        assert failure is not None
        assert "at most positions" in failure.message
