"""The reference without torch says what the one with torch says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipetune.bench.engines.reference import EngineReference
from pipetune.bench.errors import StudyError
from pipetune.bench.worker.reference import Reference, compare_logits, compare_tokens


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Reference, EngineReference]:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 11)
    tokens = torch.cat([logits.argmax(-1), torch.tensor([[1, 2], [3, 4]])], dim=1)
    reference = Reference(
        source="unsplit",
        workload_digest="d",
        tokens=tokens,
        margins=torch.tensor([[1.0, 1e-5, 1.0, 1.0, 1.0]] * 2),
        checked=(0, 1),
        logits=logits,
        spread=1e-3,
        typical=1e-4,
    )
    reference.save(tmp_path / "reference")
    return reference, EngineReference.load(tmp_path / "reference")


def test_bounds_and_forced_tokens_are_the_same(kept: tuple[Reference, EngineReference]) -> None:
    reference, own = kept
    assert (own.tolerance, own.typical_tolerance) == (reference.tolerance, reference.typical_tolerance)
    assert (own.checked, own.is_unsplit) == (reference.checked, True)
    assert own.forced() == reference.tokens[:, :3].tolist()


def test_log_probabilities_are_compared_as_logits_are(kept: tuple[Reference, EngineReference]) -> None:
    reference, own = kept
    other = reference.logits.clone()
    # One token becomes far less likely, so that another one is the likeliest.
    other[1, 2, int(reference.tokens[1, 2])] -= 8.0
    scores = other.log_softmax(-1)
    rows = [
        [(float(scores[place, step, token]), int(other[place, step].argmax())) for step, token in enumerate(forced)]
        for place, forced in enumerate(own.forced())
    ]
    check, truth = own.compare(rows), compare_logits(reference, {0: other[0], 1: other[1]})
    assert (check.argmax_flips, check.outliers, check.positions) == (truth.argmax_flips, 1, truth.positions)
    assert 1.0 < check.max_logit_error <= truth.max_logit_error
    assert check.typical_error == pytest.approx(0.0, abs=1e-6)


def test_a_number_that_is_none_is_no_agreement(kept: tuple[Reference, EngineReference]) -> None:
    _, own = kept
    rows = [[(float("nan"), 0)] * 3] * 2
    assert own.compare(rows).max_logit_error > own.tolerance


def test_tokens_part_at_near_ties_or_wrongly(kept: tuple[Reference, EngineReference]) -> None:
    reference, own = kept
    for place in (1, 2):
        rows = reference.tokens.tolist()
        rows[1][place] += 1
        assert (
            own.compare_tokens(rows) == compare_tokens(reference, dict(enumerate(rows))) == ((0, 1), (1, 0))[place - 1]
        )


def test_another_file_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"reference", b"\x02\0\0\0\0\0\0\0{}"):
        (tmp_path / "other").write_bytes(data)
        with pytest.raises(StudyError, match="not a reference"):
            EngineReference.load(tmp_path / "other")
