"""What `doctor` looks at: each check is a name, a verdict and a text; workers are really started."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipetune.bench.errors import ConfigError, FleetError, ModelError, NothingFeasibleError, PipetuneError, UserError
from pipetune.bench.spec import ModelSpec, Plan, Value, device_kind
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.planning.model_fit import ModelFit, Wanted, fit_model
from pipetune.tuner.progress import Reporter
from pipetune.tuner.report.document import GAP, Document, Style, Table, left, rows_of
from pipetune.tuner.report.document import Text as Cell
from pipetune.tuner.report.model_fit import parts_of

if TYPE_CHECKING:
    from pipetune.bench.fleet.experiment import Experiment
    from pipetune.bench.fleet.fleet import Fleet

PACKAGES = ("pipetune", "torch", "transformers", "accelerate", "optuna", "pydantic", "typer")
_LOW_DISK_BYTES = 2 * 2**30
_TINY_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""With a layer for each device: enough to pass tokens through all workers."""


class Check(Value):
    """One thing that was looked at."""

    name: str
    verdict: Literal["ok", "warning", "failed"]
    text: str


class Fitting(Value):
    """How a model is to be fitted onto the devices."""

    micro_batch_size: int | None = None
    """None: one micro-batch a stage, or smaller ones if those do not fit."""
    memory_fraction: float = 0.9


class DoctorResult(Value):
    """All checks, the model if one was named, and the exit code they amount to."""

    checks: tuple[Check, ...]
    model_fit: ModelFit | None = Field(default=None, serialization_alias="anatomy")
    fault_code: int = 0

    @property
    def exit_code(self) -> int:
        """Exit code of the worst check: 0, 2, 3 or 4."""
        return self.fault_code if any(check.verdict == "failed" for check in self.checks) else 0

    def document(self) -> Document:
        """The checks, and the model if one was named, for people."""
        styles: dict[str, Style] = {"ok": "good", "warning": "warning", "failed": "bad"}
        rows = [(check.name, Cell(check.verdict, styles[check.verdict]), check.text) for check in self.checks]
        checks = Table(columns=(left(""), left(""), left("", "prose")), rows=rows_of(rows))
        return Document(parts=(checks, *((GAP, *parts_of(self.model_fit)) if self.model_fit is not None else ())))


@dataclass
class _Findings:
    """What was found so far."""

    checks: list[Check]
    model_fit: ModelFit | None = None
    fault_code: int = 0

    def fail(self, name: str, text: str, code: int) -> None:
        """The first fault decides the exit code."""
        self.checks.append(Check(name=name, verdict="failed", text=text))
        self.fault_code = self.fault_code or code


def run_doctor(config: TuneConfig, fitting: Fitting | None, reporter: Reporter) -> DoctorResult:
    """Looks at software, disk, devices and, with real workers, at what is needed to run.

    Args:
        config: with its devices resolved.
        fitting: None leaves the model out: the workers pass tokens of a tiny one.

    Raises:
        ConfigError: settings that cannot be used at all.
    """
    if fitting is not None and not 0.0 < fitting.memory_fraction <= 1.0:
        raise ConfigError(f"--memory-fraction {fitting.memory_fraction}: must be above 0 and up to 1")
    found = _Findings([*_software(), *_disk()])
    try:
        with reporter, tempfile.TemporaryDirectory(prefix="pipetune-doctor-") as folder:
            if fitting is None:
                _look_at_workers(config, Path(folder), reporter, found)
            else:
                _look_at_model(config, fitting, reporter, found)
    except PipetuneError as error:
        found.fail("model" if isinstance(error, ModelError) else "workers", _reason(error), error.exit_code)
    return DoctorResult(checks=tuple(found.checks), model_fit=found.model_fit, fault_code=found.fault_code)


def _software() -> Iterator[Check]:
    yield Check(name="python", verdict="ok", text=f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            yield Check(name=package, verdict="ok", text=importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            # A checkout that is run in place has no version of its own.
            verdict: Literal["warning", "failed"] = "warning" if package == "pipetune" else "failed"
            yield Check(name=package, verdict=verdict, text="not installed")


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    verdict: Literal["ok", "warning"] = "ok" if free >= _LOW_DISK_BYTES else "warning"
    yield Check(name="disk", verdict=verdict, text=f"{free / 2**30:.1f} GiB free here")


def _devices() -> Check:
    from pipetune.bench.fleet.fleet import available_devices

    return Check(name="devices", verdict="ok", text=f"auto takes {', '.join(available_devices())}")


def _look_at_workers(config: TuneConfig, folder: Path, reporter: Reporter, found: _Findings) -> None:
    """Starts workers on a model with a layer for each."""
    from pipetune.bench.fleet.experiment import Experiment

    found.checks.append(_devices())
    devices = config.concrete_devices
    values = {**_TINY_MODEL, "num_hidden_layers": len(devices)}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tiny = ModelSpec(name=str(folder), load_format="dummy", dtype=config.model.dtype)
    reporter.begin(f"starting {len(devices)} workers")
    with Experiment.start(tiny, devices, exclusive=False, on_progress=reporter.fleet) as experiment:
        found.checks += _machine(experiment.fleet)
        found.checks.append(_talk(experiment.fleet))


def _look_at_model(config: TuneConfig, fitting: Fitting, reporter: Reporter, found: _Findings) -> None:
    """Starts workers on the model, which describe it; no weights are loaded."""
    found.checks.append(_devices())
    with _start(config, reporter, found) as experiment:
        fleet = experiment.fleet
        found.checks += _machine(fleet)
        found.checks.append(_model(fleet))
        lens: tuple[int, ...] = (config.workload.input_len,)
        try:
            lens = fleet.prompt_lens(config.workload)
        except UserError as error:
            found.fail("workload", str(error), error.exit_code)
        wanted = Wanted(
            workload=config.workload,
            prompt_lens=lens,
            devices=fleet.devices,
            device_bytes=fleet.device_bytes,
            micro_batch_size=fitting.micro_batch_size,
            memory_fraction=fitting.memory_fraction,
        )
        found.model_fit = fit_model(fleet.shape, wanted)
    if found.model_fit.remedy is not None:
        text = f"not even one micro-batch fits: {found.model_fit.remedy}"
        found.fail("fit", text, NothingFeasibleError.exit_code)


def _start(config: TuneConfig, reporter: Reporter, found: _Findings) -> Experiment:
    """The model's fleet; where only its config is at hand, that is a fault, and the model is described all the same.

    Raises:
        ModelError: the model cannot be found, read or split.
        FleetError: workers that do not start.
    """
    from pipetune.bench.fleet.experiment import Experiment

    model, devices = config.model, config.concrete_devices
    reporter.begin(f"starting {len(devices)} workers")
    try:
        return Experiment.start(model, devices, exclusive=False, on_progress=reporter.fleet)
    except ModelError as error:
        if model.load_format == "dummy" or not (Path(model.name).expanduser() / "config.json").is_file():
            raise
        try:
            dummy = model.model_copy(update={"load_format": "dummy"})
            experiment = Experiment.start(dummy, devices, exclusive=False, on_progress=reporter.fleet)
        except ModelError as without_weights:
            if str(without_weights) == str(error):
                raise error from None
            found.fail("weights", str(error), error.exit_code)
            raise
        found.fail("weights", str(error), error.exit_code)
        return experiment


def _machine(fleet: Fleet) -> Iterator[Check]:
    hardware, software = fleet.machine.hardware, fleet.machine.software
    yield Check(
        name="cpu",
        verdict="ok",
        text=f"{hardware.cpu_model}, {hardware.cpu_cores} cores, {hardware.memory_bytes / 2**30:.0f} GiB",
    )
    for index, gpu in enumerate(hardware.gpus):
        yield Check(name=f"cuda:{index}", verdict="ok", text=f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB")
    if hardware.gpus:
        versions = {"driver": software.driver, "CUDA": software.cuda, "NCCL": software.nccl}
        text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        yield Check(name="gpu software", verdict="ok", text=text or "unknown")
        if hardware.links:
            yield Check(name="links", verdict="ok", text=", ".join(hardware.links))
    shares = ", ".join(f"{device} {size / 2**30:.1f} GiB" for device, size in fleet.device_bytes.items())
    yield Check(name="memory", verdict="ok", text=shares)
    cpus = sum(device_kind(device) == "cpu" for device in fleet.devices)
    crowded = cpus > hardware.cpu_cores
    yield Check(
        name="workers",
        verdict="warning" if crowded else "ok",
        text=f"{len(fleet.devices)} started"
        + (f"; {cpus} CPU workers share {hardware.cpu_cores} cores, times will mean little" if crowded else ""),
    )


def _model(fleet: Fleet) -> Check:
    shape = fleet.shape
    weights = shape.embedding_bytes + shape.head_bytes + shape.other_bytes
    weights += sum(layer.weight_bytes for layer in shape.layers)
    cuts = shape.num_layers - 1 - len(set(shape.forbidden_cuts))
    return Check(
        name="model",
        verdict="ok",
        text=f"{shape.architecture}, {shape.num_layers} layers at {shape.layers_prefix}, {cuts} places to cut, "
        f"{shape.num_parameters / 1e6:.0f} M parameters, {weights / 2**20:.0f} MiB"
        + (", head tied to the embedding" if shape.tied else ""),
    )


def _talk(fleet: Fleet) -> Check:
    """Passes tokens of the tiny model through all workers."""
    plan = Plan.from_layer_counts((1,) * len(fleet.devices), fleet.devices, 1)
    results = fleet.generate(plan, [[5, 6, 7], [8, 9]], max_new_tokens=4, ignore_eos=True)
    assert all(len(result.token_ids) == 4 for result in results)
    return Check(name="pipeline", verdict="ok", text=f"tokens went through {len(fleet.devices)} stages and back")


def _reason(error: PipetuneError) -> str:
    if isinstance(error, FleetError) and error.failure.detail:
        return f"{error}; the last it said: {error.failure.detail.strip().splitlines()[-1]}"
    return str(error)
