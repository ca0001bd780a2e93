"""What tasks take in the records of `tests.record_factory`, as costs; and costs that get it wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipetune.bench.memory import ModelShape
from pipetune.bench.profile import TaskKind
from pipetune.tuner.planning.simulation.model import CostModel
from tests.record_factory import (
    DECODE_LAYER_ROW_S,
    DECODE_LAYER_S,
    HEAD_LAYERS,
    NUM_LAYERS,
    PREFILL_LAYER_ROW_S,
    WORKLOAD,
    make_prompt_lens,
    make_shape,
)

HOP_S = 1.5e-3


@dataclass(frozen=True, kw_only=True)
class FactoryCosts:
    """The factory's costs, each part off by a factor."""

    prefill: float = 1.0
    decode: float = 1.0
    head: float = 1.0
    per_row: float = 1.0
    """Of what grows with the rows."""
    hop: float = 1.0

    def layers_s(self, device: str, kind: TaskKind) -> npt.NDArray[np.float64]:
        return np.full(NUM_LAYERS, self._layer_s(kind))

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        return self.head * HEAD_LAYERS * self._layer_s(kind) if is_last else 0.0

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        return self.hop * HOP_S

    def _layer_s(self, kind: TaskKind) -> float:
        if kind.is_decode:
            return self.decode * (DECODE_LAYER_S + self.per_row * DECODE_LAYER_ROW_S * kind.rows)
        return self.prefill * (self.per_row * PREFILL_LAYER_ROW_S * kind.rows * kind.new_tokens / 64 + 2e-3)


def make_model(costs: FactoryCosts | None = None, *, shape: ModelShape | None = None) -> CostModel:
    """A model of the factory's workload; without costs it is right but for noise."""
    return CostModel(
        shape=shape or make_shape(),
        prompt_lens=make_prompt_lens(WORKLOAD),
        output_lens=WORKLOAD.generated_lens,
        costs=costs or FactoryCosts(),
        gaps_s={},
        stalls_s={},
    )
