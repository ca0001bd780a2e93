"""Which comparisons and which memory amount to a failure."""

from __future__ import annotations

import torch

from pipetune.bench.record import StageMemory
from pipetune.bench.worker.acceptance import is_steady, over_cap, wrong_output, wrong_tokens
from pipetune.bench.worker.reference import (
    Reference,
    compare_logits,
)


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


def test_a_peak_above_the_cap_is_a_failure_without_what_was_there_before() -> None:
    within = StageMemory(
        device="cpu:0",
        weights_bytes=1,
        kv_bytes=1,
        activation_bytes=1,
        peak_bytes=150,
        peak_source="vm_hwm",
        baseline_bytes=50,
        cap_bytes=100,
    )
    assert over_cap([within]) is None
    failure = over_cap([within, within.model_copy(update={"peak_bytes": 151})])
    assert failure is not None
    assert (failure.stage, failure.bytes_wanted, failure.bytes_had) == (1, 101, 100)


def test_passes_are_steady_within_a_share_of_the_shortest() -> None:
    assert is_steady([1.0, 1.1], 0.1 + 1e-9)
    assert not is_steady([1.0, 1.11], 0.1)


def test_tokens_that_differ_count_in_fp32_alone() -> None:
    assert wrong_tokens(0, 9, 4) is None
    assert wrong_tokens(2, 9, 2) is None
    failure = wrong_tokens(2, 9, 4)
    assert failure is not None
    assert "2 of 9 prompts" in failure.message
