"""Search spaces of a small model on a few CPU workers."""

from __future__ import annotations

from typing import Any

from bench.memory import ModelShape
from bench.spec import Workload
from tests.record_factory import make_shape
from tuner.config import SpaceConfig
from tuner.planning.cost import CostModel
from tuner.search.build import build_space
from tuner.search.resolver import Resolver
from tuner.search.space import SearchSpace

SHAPE = make_shape()
GIB = 2**30
MIB = 2**20


def build(
    num_devices: int = 2,
    *,
    num_prompts: int = 32,
    input_len: int = 64,
    kind: str = "generate",
    memory: int = 4 * GIB,
    shape: ModelShape = SHAPE,
    **bounds: Any,
) -> tuple[SearchSpace, CostModel, Resolver]:
    """A space as a study lays it out, with what it was laid out by."""
    devices = tuple(f"cpu:{index}" for index in range(num_devices))
    workload = Workload.model_validate({"kind": kind, "num_prompts": num_prompts, "output_len": 16})
    lens = [input_len] * num_prompts
    cost = CostModel.of_workload(shape, workload, lens)
    resolve = Resolver.of_workload(shape, workload, lens, dict.fromkeys(devices, memory))
    return build_space(SpaceConfig.model_validate(bounds), devices, shape, cost, resolve), cost, resolve
