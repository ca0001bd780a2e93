"""The unsplit model's reference without torch, and how an engine's output compares with it.

Engines tell log-probabilities of given tokens and no logits: these are compared, within the tolerance of logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pipetune.bench.errors import StudyError
from pipetune.bench.record import OutputCheck

# As in `bench.worker.reference`, which loads torch.
SPREAD_FACTOR, TYPICAL_FACTOR = 2.0, 3.0
_LARGEST = 3.4e38


@dataclass(frozen=True, kw_only=True)
class EngineReference:
    """What `bench.worker.reference.Reference` keeps in its file."""

    tokens: NDArray[np.int64]
    margins: NDArray[np.float32]
    checked: tuple[int, ...]
    logits: NDArray[np.float32]
    tolerance: float
    typical_tolerance: float
    is_unsplit: bool

    @classmethod
    def load(cls, path: Path) -> Self:
        """The reference in a file; StudyError where it cannot be read."""
        try:
            with safe_open(path, "numpy") as file:
                metadata, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tolerance = SPREAD_FACTOR * float(metadata["spread"])
            return cls(
                tokens=arrays["tokens"],
                margins=arrays["margins"],
                checked=tuple(arrays["checked"].tolist()),
                logits=arrays["logits"],
                tolerance=tolerance,
                typical_tolerance=min(TYPICAL_FACTOR * float(metadata["typical"]), tolerance),
                is_unsplit=metadata["source"] == "unsplit",
            )
        except (OSError, SafetensorError, ValueError, LookupError) as error:
            raise StudyError(f"{path}: not a reference ({error!r}); --resume makes it anew") from error

    def forced(self) -> list[list[int]]:
        """The tokens that the checked prompts are continued by."""
        return list(self.tokens[list(self.checked), : self.logits.shape[1]].tolist())

    def compare(self, rows: Sequence[Sequence[tuple[float, int]]]) -> OutputCheck:
        """Compares log-probabilities of forced tokens, and the likeliest token at each, with the reference's; a row for
        each checked prompt, token by token."""
        logits = self.logits.astype(np.float64)
        top = logits.max(-1, keepdims=True)
        scores = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        truth = np.take_along_axis(scores, np.asarray(self.forced())[..., None], -1)[..., 0]
        own = np.array([[logprob for logprob, _ in row] for row in rows])
        best = np.array([[token for _, token in row] for row in rows])
        errors = np.nan_to_num(np.abs(own - truth), nan=_LARGEST, posinf=_LARGEST)
        second, first = np.moveaxis(np.partition(logits, -2, axis=-1)[..., -2:], -1, 0)
        flips = (best != logits.argmax(-1)) & (first - second > self.tolerance)
        return OutputCheck(
            reference="unsplit" if self.is_unsplit else "plan",
            max_logit_error=float(errors.max()),
            tolerance=self.tolerance,
            compared_logits=errors.size,
            argmax_flips=int(flips.sum()),
            typical_error=float(np.median(errors)),
            typical_tolerance=self.typical_tolerance,
            positions=errors.size,
            outliers=int((errors > self.tolerance).sum()),
        )

    def compare_tokens(self, tokens: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Prompts whose greedy tokens part from the reference's where its token was clear, and those at a near tie."""
        wrong = near = 0
        for own, truth, margins in zip(tokens, self.tokens.tolist(), self.margins, strict=True):
            parting = next((place for place, (a, b) in enumerate(zip(own, truth, strict=False)) if a != b), None)
            if parting is not None:
                is_near = float(margins[parting]) <= self.tolerance
                wrong, near = wrong + (not is_near), near + is_near
        return wrong, near
