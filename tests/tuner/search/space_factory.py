"""Search spaces of a small model on a few CPU workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipetune.bench.memory import ModelShape
from pipetune.bench.spec import Arrivals, Goodput, Workload
from pipetune.tuner.config.schema import SpaceConfig
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.nominal import RATES, NominalCosts, Rates
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.space.build import build_space
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from tests.record_factory import make_shape

SHAPE = make_shape()
GIB = 2**30
MIB = 2**20


def build(
    num_devices: int = 2,
    *,
    num_prompts: int = 32,
    input_len: int = 64,
    kind: str = "generate",
    memory: int | Sequence[int] = 4 * GIB,
    shape: ModelShape = SHAPE,
    speeds: Sequence[float] | None = None,
    costs: Costs | None = None,
    lens: Sequence[int] | None = None,
    arrivals: Arrivals | None = None,
    goodput: Goodput | None = None,
    **bounds: Any,
) -> tuple[SearchSpace, CostModel, Resolver]:
    """A space as a study lays it out, with what it was laid out by.

    Args:
        memory: of each device.
        speeds: of each device, beside the nominal one.
        costs: in place of nominal ones.
        lens: of prompts, in place of equal ones.
    """
    devices = tuple(f"cpu:{index}" for index in range(num_devices))
    lens = lens or [input_len] * num_prompts
    sizes_ = {"kind": kind, "num_prompts": len(lens), "output_len": 16}
    workload = Workload.model_validate({**sizes_, "arrivals": arrivals, "goodput": goodput})
    if speeds:
        costs = NominalCosts(shape, rates_of(devices, speeds), scores=kind == "score")
    cost = CostModel.of_workload(shape, workload, lens, costs)
    sizes = [memory] * num_devices if isinstance(memory, int) else memory
    resolve = Resolver.of_workload(shape, workload, lens, dict(zip(devices, sizes, strict=True)))
    return build_space(SpaceConfig.model_validate(bounds), devices, shape, cost, resolve), cost, resolve


def rates_of(devices: Sequence[str], speeds: Sequence[float]) -> Mapping[str, Rates]:
    """Rates of unlike devices: each does everything so many times as fast."""
    nominal = RATES["cpu"]
    return {
        device: replace(
            nominal,
            flops_per_s=nominal.flops_per_s * speed,
            bytes_per_s=nominal.bytes_per_s * speed,
            head_bytes_per_s=nominal.head_bytes_per_s * speed,
            layer_overhead_s=nominal.layer_overhead_s / speed,
        )
        for device, speed in zip(devices, speeds, strict=True)
    }
