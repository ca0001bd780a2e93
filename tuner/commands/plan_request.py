"""Which plan `bench` is to measure: from a plan file, a device map, or a count of layers per stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipetune.bench.errors import ConfigError, PlanError, explain
from pipetune.bench.memory import ModelShape
from pipetune.bench.spec import Plan
from pipetune.tuner.config.settings import KeyPath, leaves_of
from pipetune.tuner.planning.partition.device_map import device_of, plan_from_map, read_device_map
from pipetune.tuner.study.plan_file import PlanFile, read_plan


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A plan that is not complete before the model and the devices are known."""

    source: str
    """Where it comes from, for messages."""
    plan_file: PlanFile | None = None
    plan_folder: Path | None = None
    device_map: Mapping[str, Any] | None = None
    layers: tuple[int, ...] | None = None
    micro_batch_size: int | None = None
    prefill_micro_batch_size: int | None = None
    prefill_chunk_size: int | None = None
    replicas: int | None = None
    switches: Mapping[str, bool] = field(default_factory=dict)
    """Those of `Plan` that are given: `compile`, `cuda_graphs`, `packed_weights`."""
    memory_fraction: float | None = None

    @classmethod
    def of(
        cls,
        *,
        plan: Path | None,
        device_map: Path | None,
        layers: str | None,
        micro_batch_size: int | None,
        prefill_micro_batch_size: int | None,
        prefill_chunk_size: int | None = None,
        replicas: int | None = None,
        switches: Mapping[str, bool | None] | None = None,
        memory_fraction: float | None,
    ) -> PlanRequest:
        """From flags.

        Raises:
            ConfigError: none or several ways to name a plan, or layers that are no counts.
            PlanError: a file that holds no plan.
        """
        named = {"--plan": plan, "--device-map": device_map, "--layers": layers}
        used = [flag for flag, value in named.items() if value is not None]
        if len(used) != 1:
            raise ConfigError(f"which plan? Give one of {', '.join(named)}, not {' and '.join(used) or 'none'}")
        if memory_fraction is not None and not 0.0 < memory_fraction <= 1.0:
            raise ConfigError(f"--memory-fraction {memory_fraction}: must be above 0 and up to 1")
        return cls(
            source=used[0] if layers is not None else str(plan or device_map),
            plan_file=read_plan(plan) if plan is not None else None,
            plan_folder=plan.parent if plan is not None else None,
            device_map=read_device_map(device_map) if device_map is not None else None,
            layers=_counts(layers) if layers is not None else None,
            micro_batch_size=micro_batch_size,
            prefill_micro_batch_size=prefill_micro_batch_size,
            prefill_chunk_size=prefill_chunk_size,
            replicas=replicas,
            switches={name: value for name, value in (switches or {}).items() if value is not None},
            memory_fraction=memory_fraction,
        )

    def settings_below(self) -> tuple[dict[KeyPath, object], str]:
        """Settings that a file brings along, for those that nobody gives: model, workload and devices."""
        values: dict[KeyPath, object] = {}
        if self.device_map is not None:
            named = dict.fromkeys(device_of(value, name, self.source) for name, value in self.device_map.items())
            values[("devices",)] = list(named)
        if self.plan_file is not None:
            for section in ("model", "workload"):
                part = getattr(self.plan_file, section)
                if part is not None:
                    values |= leaves_of(part.model_dump(mode="json"), (section,))
            devices = self.plan_file.devices or self.plan_file.plan.devices
            values[("devices",)] = list(devices)
            prompts = values.get(("workload", "prompts_file"))
            if prompts is not None:
                assert self.plan_folder is not None
                values[("workload", "prompts_file")] = str(self.plan_folder / str(prompts))
        return values, self.source

    def complete(self, shape: ModelShape, devices: tuple[str, ...], num_prompts: int) -> Plan:
        """The plan itself; each replica's prompts default to as many micro-batches as there are stages.

        Raises:
            PlanError: it does not describe the model, or does not go with the devices.
        """
        if self.plan_file is not None:
            return self._changed(self.plan_file.plan, devices)
        share = math.ceil(num_prompts / (self.replicas or 1))
        if self.device_map is not None:
            stages = len({device_of(value, name, self.source) for name, value in self.device_map.items()})
            micro_batch_size = self.micro_batch_size or math.ceil(share / stages)
            plan = plan_from_map(self.device_map, shape, micro_batch_size=micro_batch_size, place=self.source)
            return self._changed(plan, devices)
        assert self.layers is not None
        try:
            plan = Plan.from_layer_counts(
                self.layers, devices, self.micro_batch_size or math.ceil(share / len(self.layers))
            )
        except ValueError as error:
            raise PlanError(f"{self.source}: {explain(error)}") from None
        return self._changed(plan, devices)

    def _changed(self, plan: Plan, devices: tuple[str, ...]) -> Plan:
        """The plan, with what flags say instead."""
        values = plan.model_dump()
        if self.micro_batch_size is not None:
            values |= {"micro_batch_size": self.micro_batch_size, "prefill_micro_batch_size": None}
        if self.prefill_micro_batch_size is not None:
            values["prefill_micro_batch_size"] = self.prefill_micro_batch_size
        if self.prefill_chunk_size is not None:
            values["prefill_chunk_size"] = self.prefill_chunk_size
        if self.replicas is not None and self.replicas != plan.replicas:
            values |= {"replicas": self.replicas, "replica_devices": self._replica_devices(plan, devices)}
        values |= self.switches
        if self.memory_fraction is not None:
            for stage in values["stages"]:
                stage["memory_fraction"] = self.memory_fraction
        try:
            return Plan.model_validate(values)
        except ValueError as error:
            raise PlanError(f"{self.source}: {explain(error)}") from None

    def _replica_devices(self, plan: Plan, devices: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """Devices of further replicas: in order, those that the first one leaves."""
        width, further = len(plan.stages), (self.replicas or 1) - 1
        left = list(devices)
        for stage in plan.stages:
            if stage.device in left:
                left.remove(stage.device)
        if len(left) < width * further:
            stages = "1 stage" if width == 1 else f"{width} stages"
            raise PlanError(
                f"--replicas {self.replicas}: so many pipelines of {stages} need {width * (further + 1)} devices; "
                f"given are {len(devices)}: {', '.join(devices)}"
            )
        return tuple(tuple(left[width * index : width * (index + 1)]) for index in range(further))


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--layers {text!r}: write a count of layers for each stage, as in 17,13") from None
    if min(counts) < 1:
        raise ConfigError(f"--layers {text!r}: every stage holds one layer at least")
    return counts
