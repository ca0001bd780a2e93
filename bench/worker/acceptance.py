"""What a run's numbers amount to: steady or not, right or wrong, within its cap or over it. Pure, no torch."""

from collections.abc import Sequence

from pipetune.bench.record import Failure, FailureKind, OutputCheck, StageMemory

MAX_OUTLIERS = 0.05
"""Share of the positions that may come out otherwise where experts may be chosen otherwise."""
MIN_POSITIONS = 8
"""Positions compared, below which not even one may come out otherwise: it could as well be the rule."""


def is_steady(durations: Sequence[float], tolerance: float) -> bool:
    """Whether passes of the same work differ by no more than a share of the shortest."""
    return max(durations) - min(durations) <= tolerance * min(durations)


def wrong_output(
    check: OutputCheck, *, scored: bool = False, may_route_otherwise: bool = False, phase: str = "check"
) -> Failure | None:
    """The failure that a comparison of logits, or where `scored` of log-probabilities, amounts to, if any.

    `may_route_otherwise`: the model chooses experts, and computes in half precision: where two are nearly tied, kernels
    decide, and the position comes out otherwise. So a few may, as long as most do not.
    """
    error, tolerance = check.max_logit_error, check.tolerance
    typical, typical_tolerance = check.typical_error, check.typical_tolerance
    is_off = typical is not None and typical_tolerance is not None and typical > typical_tolerance
    few = check.outliers <= max(1, int(MAX_OUTLIERS * check.positions))
    if not is_off and error <= tolerance and check.argmax_flips == 0:
        return None
    if not is_off and may_route_otherwise and few and check.positions >= MIN_POSITIONS:
        return None
    if is_off and error <= tolerance:
        what = "log-probabilities" if scored else "logits under the reference's tokens"
        off = f"at most positions the {what} are off by {typical:.3g} or more"
        return _wrong(phase, f"{off}, and kernels explain no more than {typical_tolerance:.3g}")
    what = "the log-probabilities are" if scored else "under the reference's tokens the logits are"
    flips = "" if scored else f" ({check.argmax_flips} of the most likely tokens differ)"
    return _wrong(phase, f"{what} off by {error:.3g}, and kernels explain no more than {tolerance:.3g}{flips}")


def wrong_tokens(wrong: int, num_prompts: int, dtype_bytes: int) -> Failure | None:
    """The failure that differing tokens amount to: in fp32 alone, since shapes change half-precision kernels."""
    if wrong == 0 or dtype_bytes < 4:
        return None
    differ = f"the tokens of {wrong} of {num_prompts} prompts differ from the reference's where it is not near a tie"
    return _wrong("measure", differ)


def _wrong(phase: str, what: str) -> Failure:
    return Failure(
        kind=FailureKind.WRONG_OUTPUT,
        phase=phase,
        message=f"{what}: this plan computes something else than the model; do not use it",
    )


def over_cap(memory: Sequence[StageMemory]) -> Failure | None:
    """The failure of a stage whose real peak lies above its cap, if there is one."""
    for index, stage in enumerate(memory):
        if (used := stage.peak_bytes - stage.baseline_bytes) > stage.cap_bytes:
            return Failure(
                kind=FailureKind.OVER_MEMORY_CAP,
                stage=index,
                device=stage.device,
                phase="measure",
                bytes_wanted=used,
                bytes_had=stage.cap_bytes,
                message=(
                    f"stage {index} on {stage.device} peaked at {used / 2**20:.0f} MiB, above its cap of "
                    f"{stage.cap_bytes / 2**20:.0f} MiB; give it fewer layers or smaller micro-batches"
                ),
            )
    return None
