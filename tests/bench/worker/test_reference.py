"""The truth that plans are checked against: what it holds, how it is compared, and that it must itself be numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipetune.bench.errors import ModelError, StudyError
from pipetune.bench.spec import Sampling
from pipetune.bench.worker.acceptance import wrong_output
from pipetune.bench.worker.reference import (
    FLOOR_ULPS,
    Reference,
    compare_scores,
    compare_tokens,
    spread_of,
)
from tests.bench.worker.references import PROMPTS, reference_of


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
    remedies = {torch.float16: "bfloat16 or float32", torch.bfloat16: "choose float32", torch.float32: "are damaged"}
    for dtype, remedy in remedies.items():
        with pytest.raises(ModelError, match=rf"{dtype}.*not finite.*{remedy}".replace("torch.", "")):
            spread_of(logits, [logits], dtype)


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
