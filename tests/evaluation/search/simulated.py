"""Simulated worlds, larger than what can be measured here, with effects that the cost model does not know.

The model knows nominal rates. The simulated machine differs from them by layer, by device and by size of the task,
its links are slower between the halves of the devices, and every task and every run is noisy.
"""

from __future__ import annotations

import datetime as dt
import itertools
import math
import random
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipetune.bench.memory import LayerShape, ModelShape, resolve
from pipetune.bench.profile import TaskKind
from pipetune.bench.record import Iteration, Measurement, Record, StageTrace, TaskShape
from pipetune.bench.schedule import build_schedule, micro_batch_sizes
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, RunSpec, Workload
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.nominal import RATES, NominalCosts, Rates
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.space.build import build_space
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import candidates
from tests.evaluation.search.world import bounds_of
from tests.ideal_schedule import simulate

_LAYER_SD, _DEVICE_SD, _TASK_SD, _RUN_SD = 0.08, 0.12, 0.03, 0.02
_TILE = 96
"""Tokens: prefill costs by whole tiles, which the model takes for smooth."""
_SPEEDS = ("flops_per_s", "bytes_per_s", "head_bytes_per_s")
_SHORTLIST = 400
"""Plans that the machine's own costs like best, of which the best is found by simulation without noise."""


class MachineCosts:
    """What tasks really take on the simulated machine, noise apart."""

    def __init__(self, known: Costs, devices: tuple[str, ...], num_layers: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._known = known
        self._layers: npt.NDArray[np.float64] = np.exp(rng.normal(0.0, _LAYER_SD, num_layers))
        self._devices = {name: float(np.exp(rng.normal(0.0, _DEVICE_SD))) for name in devices}
        self._half = set(devices[: len(devices) // 2])

    def layers_s(self, device: str, kind: TaskKind) -> npt.NDArray[np.float64]:
        factor = self._devices[device] * _size_effect(kind)
        return self._known.layers_s(device, kind) * self._layers * factor

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        return 1.2 * self._devices[device] * self._known.ends_s(device, kind, is_first=is_first, is_last=is_last)

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        crosses = (source in self._half) != (target in self._half)
        factor = 4.0 if crosses else 1.5
        return factor * self._known.hop_s(source, target, num_bytes)


def _size_effect(kind: TaskKind) -> float:
    if kind.is_decode:
        return 1.0 + 0.12 * math.sin(3.0 * math.log2(kind.rows))
    tokens = kind.rows * kind.new_tokens
    return math.ceil(tokens / _TILE) * _TILE / tokens


class SimulatedWorld:
    """A model, devices and a workload that exist only as numbers."""

    simulated: bool = True
    profile_s: float = 0.0
    auto_counts: tuple[int, ...] | None = None

    def __init__(
        self,
        name: str,
        about: str,
        *,
        shape: ModelShape,
        rates: dict[str, Rates],
        workload: Workload,
        sizes: tuple[int, ...],
        has_orders: bool = False,
        machine_seed: int = 1,
    ) -> None:
        self.name, self.about, self.shape, self.workload = name, about, shape, workload
        self.prompt_lens = (workload.input_len,) * workload.num_prompts
        self.devices = tuple(rates)
        self.device_bytes = dict.fromkeys(self.devices, 1 << 37)
        self.micro_batch_sizes = sizes
        self.has_orders = has_orders
        self.costs: Costs = NominalCosts(shape, rates)
        self._machine = MachineCosts(self.costs, self.devices, shape.num_layers, machine_seed)
        self.num_plans = math.comb(shape.num_layers - 1, len(self.devices) - 1) * len(sizes)
        self._durations: dict[str, float] = {}

    def resolve(self, plan: Plan) -> EffectivePlan:
        lens = {"prompt_len": max(self.prompt_lens), "output_len": self.workload.generated_len}
        resolved = resolve(self.shape, plan, num_prompts=len(self.prompt_lens), **lens, device_bytes=self.device_bytes)
        assert isinstance(resolved, EffectivePlan), resolved
        return resolved

    def run(self, plan: Plan, visit: int, seed: int) -> Record:
        effective = self.resolve(plan)
        rng = np.random.default_rng([seed, visit, *plan.layer_counts, plan.micro_batch_size])
        measurement = self._simulate(effective, rng)
        return Record(
            number=0,
            role="trial",
            spec=RunSpec(
                model=ModelSpec(name=self.name, load_format="dummy"),
                workload=self.workload,
                plan=plan,
                protocol=Protocol(num_iters=1),
            ),
            effective=effective,
            hardware_id="simulated",
            started_at=dt.datetime(2000, 1, 1, tzinfo=dt.UTC).isoformat(),
            wall_s=round(3.0 + 2.0 * measurement.iterations[0].duration_s, 3),
            result=measurement,
        )

    def score(self, plan: Plan, seed: int) -> float:
        return self._best_s / self._duration_s(self.resolve(plan))

    @cached_property
    def _best_s(self) -> float:
        """Of all plans, by the machine's own costs."""
        truth = CostModel.of_workload(self.shape, self.workload, self.prompt_lens, self._machine)
        resolve_ = Resolver.of_workload(self.shape, self.workload, self.prompt_lens, self.device_bytes)
        space = build_space(bounds_of(self), self.devices, self.shape, truth, resolve_)
        found = candidates(space, resolve_)
        predicted = truth.predict_many([(one.effective.plan, one.effective.in_flight) for one in found])
        ranked = sorted(range(len(found)), key=lambda index: predicted[index].duration_s)
        return min(self._duration_s(found[index].effective) for index in ranked[:_SHORTLIST])

    def _duration_s(self, effective: EffectivePlan) -> float:
        if effective.key not in self._durations:
            self._durations[effective.key] = self._simulate(effective, None).iterations[0].duration_s
        return self._durations[effective.key]

    def _simulate(self, effective: EffectivePlan, rng: np.random.Generator | None) -> Measurement:
        """A run of the plan; without a generator one without noise."""
        plan, workload = effective.plan, self.workload
        sizes = micro_batch_sizes(workload.num_prompts, plan.micro_batch_size)
        tasks = build_schedule(
            sizes,
            prompt_lens=[workload.input_len] * len(sizes),
            output_len=workload.output_len,
            in_flight=effective.in_flight,
            prefill_size=plan.prefill_size,
        )
        drift = 1.0 if rng is None else float(np.exp(rng.normal(0.0, _RUN_SD)))
        durations = []
        for index, stage in enumerate(plan.stages):
            each = np.array(
                [
                    float(self._machine.layers_s(stage.device, kind)[stage.first_layer : stage.end_layer].sum())
                    + self._machine.ends_s(
                        stage.device, kind, is_first=index == 0, is_last=index == len(plan.stages) - 1
                    )
                    for kind in (
                        TaskKind(task.num_rows, task.end_token - task.first_token, task.first_token, task.samples)
                        for task in tasks
                    )
                ]
            )
            noise = 1.0 if rng is None else np.exp(rng.normal(0.0, _TASK_SD, len(tasks)))
            durations.append(each * noise * drift)
        devices = [stage.device for stage in plan.stages]
        row_bytes = plan.micro_batch_size * self.shape.crossing_bytes
        hops = [self._machine.hop_s(one, other, row_bytes) for one, other in itertools.pairwise(devices)]
        hop_s = sum(hops) / len(hops)
        starts = simulate(tasks, [list(row) for row in durations], hop_s=hop_s)
        ends = [
            [start + took for start, took in zip(*rows, strict=True)] for rows in zip(starts, durations, strict=True)
        ]
        return Measurement(
            prompt_lens=self.prompt_lens,
            order=tuple(range(workload.num_prompts)),
            output_len=workload.output_len,
            micro_batch_sizes=sizes,
            tasks=tuple(TaskShape.of(task, first_micro_batch=0, chunked=False) for task in tasks),
            iterations=(
                Iteration(
                    duration_s=float(max(ends[-1])),
                    token_times_s=tuple(float(value) for value in ends[-1]),
                    stages=tuple(
                        StageTrace(
                            compute_start_s=tuple(float(value) for value in row),
                            compute_end_s=tuple(float(value) for value in end),
                            recv_wait_s=_waits(row, end),
                            send_wait_s=(0.0,) * len(tasks),
                        )
                        for row, end in zip(starts, ends, strict=True)
                    ),
                    host_gap_s=(0.0,) * len(plan.stages),
                ),
            ),
        )


def _waits(starts: tuple[float, ...], ends: list[float]) -> tuple[float, ...]:
    return tuple(max(0.0, float(start - before)) for start, before in zip(starts, [0.0, *ends[:-1]], strict=True))


def llama_like(num_layers: int, hidden: int, *, moe_from: int | None = None) -> ModelShape:
    """The shape of a half-precision llama; from layer `moe_from` on with eight experts, of which two are chosen."""
    inner, vocab = 4 * hidden * 2 // 3, 32_000
    attention, mlp = 4 * hidden * hidden, 3 * hidden * inner

    def layer(index: int) -> LayerShape:
        sparse = moe_from is not None and index >= moe_from
        return LayerShape(
            weight_bytes=2 * (attention + (4 if sparse else 1) * mlp),
            active_params=attention + mlp,
            kv_bytes_per_token=4 * hidden,
            kind="sparse" if sparse else "full_attention",
        )

    layers = tuple(layer(index) for index in range(num_layers))
    return ModelShape(
        architecture="LlamaForCausalLM",
        num_parameters=sum(one.weight_bytes for one in layers) // 2 + 2 * vocab * hidden,
        layers_prefix="model.layers",
        first_modules=("model.embed_tokens",),
        last_modules=("model.norm", "lm_head"),
        embedding_bytes=2 * vocab * hidden,
        head_bytes=2 * vocab * hidden,
        other_bytes=2 * hidden,
        tied=False,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=hidden // 128,
        vocab_size=vocab,
        dtype_bytes=2,
        layers=layers,
    )


def simulated_worlds() -> tuple[SimulatedWorld, ...]:
    """Four and eight stages, 32 to 80 layers, equal and unlike devices, equal and unlike layers."""
    fast = RATES["cuda"]
    slow = replace(fast, **{name: 0.55 * getattr(fast, name) for name in _SPEEDS})
    gpus = [f"cuda:{index}" for index in range(8)]
    rng = random.Random(0)
    mixed = [fast if rng.random() < 0.5 else slow for _ in gpus]
    return (
        SimulatedWorld(
            "sim-32-layers-4-stages",
            "simulated: 32 layers of 4096 over 4 equal GPUs, 64 prompts of 512 tokens, 32 out",
            shape=llama_like(32, 4096),
            rates=dict.fromkeys(gpus[:4], fast),
            workload=Workload(num_prompts=64, input_len=512, output_len=32),
            sizes=(1, 2, 4, 8, 16),
        ),
        SimulatedWorld(
            "sim-48-layers-unlike-4-stages",
            "simulated: 16 dense layers before 32 sparse ones over 4 equal GPUs, 64 prompts of 128 tokens, 64 out",
            shape=llama_like(48, 4096, moe_from=16),
            rates=dict.fromkeys(gpus[:4], fast),
            workload=Workload(num_prompts=64, input_len=128, output_len=64),
            sizes=(2, 4, 8, 16, 32),
            machine_seed=2,
        ),
        SimulatedWorld(
            "sim-80-layers-8-unlike-stages",
            "simulated: 80 layers of 8192 over 8 GPUs of two speeds in a given order, 64 prompts of 512 tokens, 16 out",
            shape=llama_like(80, 8192),
            rates=dict(zip(gpus, mixed, strict=True)),
            workload=Workload(num_prompts=64, input_len=512, output_len=16),
            sizes=(1, 2, 4, 8),
            machine_seed=3,
        ),
    )
