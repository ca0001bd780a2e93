"""Time: what the comparison will take, and when to stop. A clock that says no before a pass begins, never after."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pipetune.bench.spec import ModelSpec, Workload

FLOPS_PER_CORE_S = 57e9
"""What `generate` reached in fp32 on one core of the machine of docs/performance.md."""
PASSES_OF_SEARCH = 12.5
PASSES_OF_ROUND = 5.2
PASSES_OF_EXTRAS = 11.0
"""What a cell's search, one of its rounds and its extras take, in passes of `generate` on one worker: reckoned, not
measured, from what a pass of each side should take beside it; to announce a time and to share it out, nothing more."""
START_S = 70.0
"""For the processes of one model."""
_KNOWN = {"smollm2-135m": (106e6, 28e6)}
"""Parameters of all layers, and of the head, where no config lies in a folder."""


class OutOfTimeError(Exception):
    """What comes next would not be done in time."""


class Budget:
    """A deadline; those of the parts are nested in that of the whole."""

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self._ends_at - time.monotonic()

    def part(self, share: float) -> Budget:
        """A share of what is left."""
        return Budget(self.left_s * share)

    def demand(self, seconds: float) -> None:
        """Asks for time.

        Raises:
            OutOfTimeError: less is left.
        """
        if seconds > self.left_s:
            raise OutOfTimeError


def pass_s(model: ModelSpec, workload: Workload) -> float | None:
    """Estimate of one pass of `generate` on one worker; None where the model's size is not known beforehand."""
    sizes = _KNOWN.get(model.name) or _sizes(Path(model.name) / "config.json")
    if sizes is None:
        return None
    layers, head = sizes
    through_layers = workload.input_len + workload.output_len - 1
    return 2.0 * workload.num_prompts * (layers * through_layers + head * workload.output_len) / FLOPS_PER_CORE_S


def cell_s(model: ModelSpec, workload: Workload, *, rounds: int, extras: bool) -> float | None:
    """Estimate of a whole cell; None where the model's size is not known beforehand."""
    one = pass_s(model, workload)
    if one is None:
        return None
    return one * (PASSES_OF_SEARCH + PASSES_OF_ROUND * rounds + PASSES_OF_EXTRAS * extras)


def _sizes(path: Path) -> tuple[float, float] | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        width = config.get("head_dim") or hidden // heads
        attention = 2 * hidden * width * (heads + config.get("num_key_value_heads", heads))
        layer = attention + 3 * hidden * config["intermediate_size"]
        return float(layer * config["num_hidden_layers"]), float(hidden * config["vocab_size"])
    except (OSError, ValueError, KeyError):
        return None
