"""What a survey of one family found, as a value that crosses from worker to table."""

from __future__ import annotations

from typing import Literal

from pipetune.bench.spec import Value

Verdict = Literal["equal", "close", "refused", "wrong", "does not run unsplit", "config does not build", "crashed"]
VERDICTS: dict[Verdict, str] = {
    "equal": "every logit is bit for bit that of the unsplit model",
    "close": "logits differ by at most 1e-4 of the largest one",
    "refused": "a `ModelError` with the reason, while nothing but `config.json` was read",
    "wrong": "logits differ, or a split fails where none was refused",
    "does not run unsplit": "the tiny random model gives no usable logits with transformers alone",
    "config does not build": "transformers cannot build a tiny random model",
    "crashed": "the process ended, or took too long",
}
"""Every verdict and what it says."""


class Survey(Value):
    """What came of one family."""

    family: str
    architecture: str = ""
    verdict: Verdict
    max_error: float | None = None
    """Largest difference of two logits over the largest logit."""
    splits: tuple[tuple[int, ...], ...] = ()
    """Layers of each stage, one entry a split."""
    forbidden_cuts: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    reason: str = ""
    """Why it was refused, or what went wrong."""
    accounting: str = ""
    """Where the predicted bytes of a stage are not what it holds."""
    cpu_s: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether every split gave what the unsplit model gives."""
        return self.verdict in ("equal", "close")

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to mend here: right, refused, or out of reach for transformers itself."""
        return self.verdict not in ("wrong", "crashed")


def same_verdict(found: str, listed: str) -> bool:
    """Whether two verdicts agree; which of `equal` and `close` a family is, depends on the kernels of the machine."""
    right = ("equal", "close")
    return found == listed or (found in right and listed in right)
