"""Which plan `bench` is to measure: from a plan file, a device map, or a count of layers per stage."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pipetune.bench.errors import ConfigError, PlanError, explain
from pipetune.bench.memory import ModelShape
from pipetune.bench.spec import EngineName, EngineSettings, Plan, StagePlan
from pipetune.tuner.config.settings import KeyPath, leaves_of
from pipetune.tuner.config.sources import Below
from pipetune.tuner.planning.partition.device_map import device_of, plan_from_map, read_device_map
from pipetune.tuner.study.plan_file import PlanFile, read_plan


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A plan that is not complete before the model and the devices are known."""

    source: str
    """Where it comes from, for messages: the file's path, or `--layers`."""
    plan_file: PlanFile | None = None
    device_map: Mapping[str, Any] | None = None
    layers: tuple[int, ...] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Plan` that flags set, over what the file says."""
    stage_changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of each `StagePlan`."""
    engine: Mapping[str, Any] | None = None
    """Settings of another engine that flags set, where one is to run the plan."""

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Self:
        """From a command's parameters, by their names; what was not given is None or missing. A prefix, as in
        `plan_replicas`, tells fields of a plan from settings of the same name. ConfigError: none or several ways to
        name a plan, or layers that are no counts; PlanError: a file that holds no plan."""
        names = {"--plan": "plan", "--device-map": "device_map", "--layers": "layers"}
        named = {flag: params[name] for flag, name in names.items() if params.get(name) is not None}
        if len(named) != 1:
            raise ConfigError(f"which plan? Give one of {', '.join(names)}, not {' and '.join(named) or 'none'}")
        ((flag, value),) = named.items()
        return cls(
            source=flag if flag == "--layers" else str(value),
            plan_file=read_plan(value) if flag == "--plan" else None,
            device_map=read_device_map(value) if flag == "--device-map" else None,
            layers=_counts(value) if flag == "--layers" else None,
            changes={
                field: params[name]
                for field in Plan.model_fields
                for name in (field, f"plan_{field}")
                if params.get(name) is not None
            },
            stage_changes={name: params[name] for name in StagePlan.model_fields if params.get(name) is not None},
            engine={name: params[name] for name in EngineSettings.model_fields if params.get(name) is not None}
            if params.get("engine_python") is not None
            else None,
        )

    @property
    def engine_name(self) -> EngineName:
        """The engine that is to run the plan, where another than our own runtime is."""
        own = self.plan_file.plan.engine if self.plan_file is not None else None
        return (self.engine or {}).get("name") or (own or EngineSettings()).name

    def settings_below(self) -> Below:
        """Settings that a file brings along, for those that nobody gives: model, workload and devices."""
        values: dict[KeyPath, object] = {}
        if self.device_map is not None:
            values[("devices",)] = self._devices_of(self.device_map)
        if self.plan_file is not None:
            for section in ("model", "workload"):
                if (part := getattr(self.plan_file, section)) is not None:
                    values |= leaves_of(part.model_dump(mode="json"), (section,))
            values[("devices",)] = list(self.plan_file.devices or self.plan_file.plan.devices)
            if (prompts := values.get(("workload", "prompts_file"))) is not None:
                values[("workload", "prompts_file")] = str(Path(self.source).parent / str(prompts))
        return values, self.source

    def complete(
        self, shape: ModelShape, devices: tuple[str, ...], num_prompts: int, device_names: Sequence[str] = ()
    ) -> Plan:
        """The plan itself; each replica's prompts default to as many micro-batches as there are stages. A device map
        calls the devices as `device_names` does, in their order. PlanError: not for that model, or not for those
        devices."""
        if self.plan_file is not None:
            return self._changed(self.plan_file.plan, devices)
        stages = len(self.layers or self._devices_of(self.device_map or {}))
        share = math.ceil(num_prompts / self.changes.get("replicas", 1))
        micro_batch_size = self.changes.get("micro_batch_size", math.ceil(share / stages))
        if self.device_map is not None:
            plan = plan_from_map(self.device_map, shape, micro_batch_size=micro_batch_size, place=self.source)
            meant = dict(zip(device_names, devices, strict=False))
            placed = [one.model_copy(update={"device": meant.get(one.device, one.device)}) for one in plan.stages]
            if unknown := [one.device for one in placed if one.device not in devices]:
                raise PlanError(
                    f"{self.source}: {unknown[0]} is not among the devices {', '.join(devices)}; give it by --devices, "
                    f"or say by --device-names {','.join(plan.devices)} that these are meant, in order"
                )
            return self._changed(plan.model_copy(update={"stages": tuple(placed)}), devices)
        assert self.layers is not None
        try:
            plan = Plan.from_layer_counts(self.layers, devices, micro_batch_size)
        except ValueError as error:
            raise PlanError(f"{self.source}: {explain(error)}") from None
        return self._changed(plan, devices)

    def _devices_of(self, device_map: Mapping[str, Any]) -> list[str]:
        return list(dict.fromkeys(device_of(value, name, self.source) for name, value in device_map.items()))

    def _changed(self, plan: Plan, devices: tuple[str, ...]) -> Plan:
        """The plan, with what flags say instead."""
        follows = {"prefill_micro_batch_size": None} if "micro_batch_size" in self.changes else {}
        values = {**plan.model_dump(), **follows, **self.changes}
        if "lanes" in self.changes:
            values["lanes"] = _lanes(self.changes["lanes"])
        if values["replicas"] != plan.replicas:
            values["replica_devices"] = self._replica_devices(plan, devices, values["replicas"])
        values["stages"] = [stage | self.stage_changes for stage in values["stages"]]
        if self.engine is not None:
            # What our own runtime's plan says beside its split means nothing to it.
            ours = ("prefill_micro_batch_size", "prefill_chunk_size", "max_in_flight")
            values.pop("lanes", None)
            values |= {"micro_batch_size": 1, "compile": False, **dict.fromkeys(ours)}
            values["engine"] = {**(plan.engine.model_dump() if plan.engine else {}), **self.engine}
        try:
            return Plan.model_validate(values)
        except ValueError as error:
            raise PlanError(f"{self.source}: {explain(error)}") from None

    def _replica_devices(self, plan: Plan, devices: tuple[str, ...], replicas: int) -> tuple[tuple[str, ...], ...]:
        """Devices of further replicas: in order, those that the first one leaves."""
        width, further = len(plan.stages), replicas - 1
        left = list(devices)
        for stage in plan.stages:
            if stage.device in left:
                left.remove(stage.device)
        if len(left) < width * further:
            stages = "1 stage" if width == 1 else f"{width} stages"
            raise PlanError(
                f"--replicas {replicas}: so many pipelines of {stages} need {width * (further + 1)} devices; "
                f"given are {len(devices)}: {', '.join(devices)}"
            )
        return tuple(tuple(left[width * index : width * (index + 1)]) for index in range(further))


def _lanes(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f'--lanes: {error}; write JSON, as in [{{"up_to_tokens": 64, "weight": 4}}, {{}}]') from None


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--layers {text!r}: write a count of layers for each stage, as in 17,13") from None
    if min(counts) < 1:
        raise ConfigError(f"--layers {text!r}: every stage holds one layer at least")
    return counts
