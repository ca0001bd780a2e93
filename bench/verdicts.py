"""What a run's numbers amount to: steady or not, right or wrong, within its cap or over it. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from bench.record import Failure, FailureKind, OutputCheck, StageMemory

BYTES_PER_MIB = 2**20


def is_steady(durations: Sequence[float], tolerance: float) -> bool:
    """Whether passes of the same work differ by no more than a share of the shortest."""
    return max(durations) - min(durations) <= tolerance * min(durations)


def wrong_output(check: OutputCheck) -> Failure | None:
    """The failure that a logit check amounts to, if any."""
    if check.max_logit_error <= check.tolerance and check.argmax_flips == 0:
        return None
    return Failure(
        kind=FailureKind.WRONG_OUTPUT,
        phase="check",
        message=(
            f"under the reference's tokens the logits are off by {check.max_logit_error:.3g}, and kernels explain no "
            f"more than {check.tolerance:.3g} ({check.argmax_flips} of the most likely tokens differ): this plan "
            "computes something else than the model; do not use it"
        ),
    )


def wrong_tokens(wrong: int, num_prompts: int, dtype_bytes: int) -> Failure | None:
    """The failure that differing greedy tokens amount to: in fp32 alone, since shapes change half-precision kernels."""
    if wrong == 0 or dtype_bytes < 4:
        return None
    return Failure(
        kind=FailureKind.WRONG_OUTPUT,
        phase="measure",
        message=(
            f"the greedy tokens of {wrong} of {num_prompts} prompts differ from the reference's where it is not near a "
            "tie: this plan computes something else than the model; do not use it"
        ),
    )


def over_cap(memory: Sequence[StageMemory]) -> Failure | None:
    """The failure of a stage whose real peak lies above its cap, if there is one."""
    for index, stage in enumerate(memory):
        used = stage.peak_bytes - stage.baseline_bytes
        if used > stage.cap_bytes:
            return Failure(
                kind=FailureKind.OVER_MEMORY_CAP,
                stage=index,
                device=stage.device,
                phase="measure",
                bytes_wanted=used,
                bytes_had=stage.cap_bytes,
                message=(
                    f"stage {index} on {stage.device} peaked at {used / BYTES_PER_MIB:.0f} MiB, above its cap of "
                    f"{stage.cap_bytes / BYTES_PER_MIB:.0f} MiB; give it fewer layers or smaller micro-batches"
                ),
            )
    return None
