"""Nominal rates: which way costs move, and what they are made of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipetune.bench.profile import TaskKind
from pipetune.tuner.planning.costs.nominal import RATES, NominalCosts
from tests.record_factory import make_shape

SHAPE = make_shape()
DECODE, PREFILL = TaskKind(8, 1, 64), TaskKind(8, 64, 0)


def layers_s(costs: NominalCosts, kind: TaskKind, device: str = "cpu:0") -> float:
    return float(costs.layers_s(device, kind).sum())


def test_decode_reads_and_prefill_computes() -> None:
    costs = NominalCosts(SHAPE)
    # Twice the rows cost decode little as long as they are few, and prefill nearly twice.
    assert layers_s(costs, DECODE._replace(rows=2)) < 1.2 * layers_s(costs, DECODE._replace(rows=1))
    assert layers_s(costs, PREFILL._replace(rows=16)) > 1.7 * layers_s(costs, PREFILL)
    assert layers_s(costs, DECODE._replace(past_tokens=4096)) > layers_s(costs, DECODE)
    assert layers_s(costs, PREFILL._replace(past_tokens=64)) > layers_s(costs, PREFILL)


def test_routed_experts_are_read_as_far_as_tokens_choose_them() -> None:
    layer = SHAPE.layers[0]
    sparse = layer.model_copy(update={"active_params": layer.active_params // 8})
    mixed = SHAPE.model_copy(update={"layers": (sparse, *SHAPE.layers[1:])})
    each = NominalCosts(mixed).layers_s("cpu:0", TaskKind(1, 1, 8))
    assert each[0] < 0.6 * each[1]
    assert np.allclose(each[1:], each[1])
    # Eight tokens choose all of them: what differs is the work.
    rates = RATES["cpu"]
    many = NominalCosts(mixed).layers_s("cpu:0", TaskKind(8, 1, 8))
    assert many[1] - many[0] == pytest.approx(2 * 8 * 7 / 8 * layer.active_params / rates.flops_per_s, rel=1e-3)


def test_the_head_runs_last_where_tokens_are_sampled_or_on_all_positions_where_texts_are_scored() -> None:
    generates, scores = NominalCosts(SHAPE), NominalCosts(SHAPE, scores=True)

    def head_s(costs: NominalCosts, kind: TaskKind) -> float:
        return costs.ends_s("cpu:0", kind, is_first=False, is_last=True)

    assert generates.ends_s("cpu:0", PREFILL, is_first=True, is_last=False) == 0.0
    assert head_s(generates, PREFILL._replace(samples=False)) == 0.0
    assert head_s(generates, PREFILL) == head_s(generates, DECODE) > 0
    assert head_s(scores, PREFILL) > head_s(generates, PREFILL)


def test_devices_have_their_own_rates_or_those_of_their_kind() -> None:
    fast = dataclasses.replace(RATES["cuda"], flops_per_s=2 * RATES["cuda"].flops_per_s, hop_latency_s=1e-5)
    costs = NominalCosts(SHAPE, {"cuda": RATES["cuda"], "cuda:1": fast})
    large = TaskKind(64, 1024, 0)
    assert layers_s(costs, large, "cuda:1") < 0.6 * layers_s(costs, large, "cuda:0")
    with pytest.raises(KeyError):
        costs.layers_s("cpu:0", large)
    # A message is as slow as the slower end.
    assert costs.hop_s("cuda:0", "cuda:1", 0) == costs.hop_s("cuda:1", "cuda:0", 0) == RATES["cuda"].hop_latency_s
    more = costs.hop_s("cuda:0", "cuda:1", 10**9) - costs.hop_s("cuda:0", "cuda:1", 0)
    assert more == pytest.approx(10**9 / RATES["cuda"].hop_bytes_per_s)


def test_what_lies_between_gpus_decides_where_it_is_known() -> None:
    costs = NominalCosts(SHAPE, links=("0-1:NV18", "0-2:PIX+p2p", "0-3:NODE", "1-3:SYS", "1-2:not known"))

    def gb_per_s(source: str, target: str) -> float:
        return 1 / (costs.hop_s(source, target, 10**9) - costs.hop_s(source, target, 0))

    assert gb_per_s("cuda:1", "cuda:0") == pytest.approx(18 * 20)
    assert [gb_per_s("cuda:0", "cuda:2"), gb_per_s("cuda:3", "cuda:0")] == pytest.approx([12, 12])
    assert gb_per_s("cuda:1", "cuda:3") == pytest.approx(6)
    usual = pytest.approx(RATES["cuda"].hop_bytes_per_s / 1e9)
    assert gb_per_s("cuda:1", "cuda:2") == usual
    assert gb_per_s("cpu:0", "cpu:1") == pytest.approx(RATES["cpu"].hop_bytes_per_s / 1e9)


def test_what_was_asked_for_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        NominalCosts(SHAPE).layers_s("cpu:0", DECODE)[0] = 1.0
