"""What `doctor` looks at: each check is a name, a verdict and a text; workers are really started."""

import importlib.metadata
import json
import platform
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from pipetune.bench.errors import FleetError, ModelError, NothingFeasibleError, PipetuneError, UserError
from pipetune.bench.files import scratch_folder
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import Fleet, available_devices, load_now, warn_of_cores
from pipetune.bench.spec import ModelSpec, Plan, Value
from pipetune.tuner.commands.plan import Known, model_flags
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.planning.costs.described import DescribedDevices
from pipetune.tuner.planning.model_fit import ModelFit, Wanted, fit_model
from pipetune.tuner.progress import Reporter
from pipetune.tuner.report.document import GAP, Code, Document, Style, Table, left, rows_of
from pipetune.tuner.report.document import Text as Cell
from pipetune.tuner.report.model_fit import parts_of

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
Fitting = Mapping[str, Any]
"""Fields of `Wanted` that were given."""
Verdict = Literal["ok", "warning", "failed"]
_STYLES: dict[Verdict, Style] = {"ok": "good", "warning": "warning", "failed": "bad"}


class Check(Value):
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    text: str


class DoctorResult(BaseModel):
    """All checks, and the model if one was named; it grows as they are made."""

    checks: list[Check] = Field(default_factory=list)
    model_fit: ModelFit | None = Field(default=None, serialization_alias="anatomy")
    fault_code: int = 0
    """Exit code of the first fault: 0, 2, 3 or 4."""
    next_command: str = "pipetune demo"
    """What to type where all is well."""

    def add(self, name: str, text: str, verdict: Verdict = "ok") -> None:
        """Adds a check."""
        self.checks.append(Check(name=name, verdict=verdict, text=text))

    def fail(self, name: str, text: str, code: int) -> None:
        """Adds a fault; the first one decides the exit code."""
        self.add(name, text, "failed")
        self.fault_code = self.fault_code or code

    def document(self) -> Document:
        """The checks, and the model if one was named, for people."""
        rows = [(check.name, Cell(check.verdict, _STYLES[check.verdict]), check.text) for check in self.checks]
        checks = Table(columns=(left(""), left(""), left("", "prose")), rows=rows_of(rows))
        fit = (GAP, *parts_of(self.model_fit)) if self.model_fit is not None else ()
        worst: Verdict = max((check.verdict for check in self.checks), key=list(_STYLES).index)
        told = [check for check in self.checks if check.verdict == worst] if worst != "ok" else []
        verdict = {"ok": "ready", "warning": "ready, with warnings", "failed": "not ready"}[worst]
        names = f": {', '.join(check.name for check in told)}" if told else ""
        next_one = () if self.fault_code else (Code(self.next_command),)
        return Document(parts=(checks, *fit, GAP, Cell(f"Verdict: {verdict}{names}", _STYLES[worst]), *next_one))


def run_doctor(
    config: TuneConfig, fitting: Fitting | None, reporter: Reporter, described: DescribedDevices | None = None
) -> DoctorResult:
    """Looks at software, disk, devices (the config's are resolved) and, with real workers, at what is needed to run.
    Without a fitting the workers pass tokens of a tiny model. Described devices are fitted onto in place of this
    machine's, and then start no workers."""
    found = DoctorResult()
    _look_at_host(found)
    try:
        with reporter:
            if fitting is None:
                _look_at_workers(config, reporter, found)
            else:
                _look_at_model(config, fitting, reporter, found, described)
    except PipetuneError as error:
        text = str(error)
        if isinstance(error, FleetError) and error.failure.detail:
            text += f"; the last it said: {error.failure.detail.strip().splitlines()[-1]}"
        found.fail("model" if isinstance(error, ModelError) else "workers", text, error.exit_code)
    if fitting is not None:
        verb, file = ("tune", "") if described is None else ("plan", f" --device-file {shlex.quote(described.place)}")
        found.next_command = f"pipetune {verb} {model_flags(config)}{file}"
    return found


def _look_at_host(found: DoctorResult) -> None:
    found.add("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            found.add(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            # A checkout that is run in place has no version of its own.
            found.add(package, "not installed", "warning" if package == "pipetune" else "failed")
    free = shutil.disk_usage(Path.cwd()).free
    found.add("disk", f"{free / 2**30:.1f} GiB free here", "ok" if free >= _LOW_DISK_BYTES else "warning")
    found.add("devices", f"auto takes {', '.join(available_devices())}")
    busy = load_now(available_devices())
    found.add("load", "; ".join(busy) or "others take little", "warning" if busy else "ok")
    system = Path("/sys/devices/system")
    lists = sorted(system.glob("node/node*/cpulist"))
    nodes = [f"{path.parent.name} has cores {path.read_text().strip()}" for path in lists]
    if len(nodes) > 1:
        found.add("NUMA", "; ".join(nodes))
    if governors := {path.read_text().strip() for path in system.glob("cpu/cpu*/cpufreq/scaling_governor")}:
        steady = governors <= {"performance"}
        slow = ": clocks follow the load, and times with them; `cpupower frequency-set -g performance`"
        found.add("governor", ", ".join(sorted(governors)) + ("" if steady else slow), "ok" if steady else "warning")


def _look_at_workers(config: TuneConfig, reporter: Reporter, found: DoctorResult) -> None:
    """Starts workers on a model with a layer for each, and passes tokens through them."""
    devices = config.concrete_devices
    with scratch_folder() as folder:
        values = {**_TINY_MODEL, "num_hidden_layers": len(devices)}
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
        tiny = ModelSpec(name=str(folder), load_format="dummy", dtype=config.model.dtype)
        reporter.begin(f"starting {len(devices)} workers")
        with _start(tiny, devices, reporter) as experiment:
            fleet = experiment.fleet
            _look_at_machine(fleet, found)
            plan = Plan.from_layer_counts((1,) * len(devices), fleet.devices, 1)
            results = fleet.generate(plan, [[5, 6, 7], [8, 9]], max_new_tokens=4, ignore_eos=True)
            assert all(len(result.token_ids) == 4 for result in results)
            found.add("pipeline", f"tokens went through {len(devices)} stages and back")


def _look_at_model(
    config: TuneConfig, fitting: Fitting, reporter: Reporter, found: DoctorResult, described: DescribedDevices | None
) -> None:
    """Starts workers on the model, or one for devices that are only described; no weights are loaded."""
    devices, costs = config.concrete_devices, None
    lens: tuple[int, ...] = (config.workload.input_len,)
    if described is not None:
        known = Known(config, reporter, described)
        shape, lens, sizes = known.shape, known.prompt_lens, known.device_bytes
        costs = described.costs(shape, scores=config.workload.kind == "score")
        found.add("described", f"{', '.join(devices)}, by {described.place}")
    else:
        reporter.begin(f"starting {len(devices)} workers")
        with _start_or_describe(config.model, devices, reporter, found) as experiment:
            shape, sizes = experiment.fleet.shape, experiment.fleet.device_bytes
            _look_at_machine(experiment.fleet, found)
            try:
                lens = experiment.fleet.prompt_lens(config.workload)
            except UserError as error:
                found.fail("workload", str(error), error.exit_code)
    weights = shape.embedding_bytes + shape.head_bytes + shape.other_bytes
    weights += sum(layer.weight_bytes for layer in shape.layers)
    cuts = shape.num_layers - 1 - len(set(shape.forbidden_cuts))
    tied = ", head tied to the embedding" if shape.tied else ""
    found.add(
        "model",
        f"{shape.architecture}, {shape.num_layers} layers at {shape.layers_prefix}, {cuts} places to cut, "
        f"{shape.num_parameters / 1e6:.0f} M parameters, {weights / 2**20:.0f} MiB{tied}",
    )
    wanted = Wanted(
        workload=config.workload,
        prompt_lens=lens,
        devices=devices,
        device_bytes=sizes,
        max_memory_bytes=config.space.max_memory_per_device,
        costs=costs,
        **fitting,
    )
    found.model_fit = fit_model(shape, wanted)
    if found.model_fit.remedy is not None:
        found.fail("fit", f"not even one micro-batch fits: {found.model_fit.remedy}", NothingFeasibleError.exit_code)


def _start(model: ModelSpec, devices: Sequence[str], reporter: Reporter) -> Experiment:
    return Experiment.start(model, devices, exclusive=False, on_progress=reporter.fleet)


def _start_or_describe(model: ModelSpec, devices: Sequence[str], reporter: Reporter, found: DoctorResult) -> Experiment:
    """The model's fleet; where only its config is at hand, that is a fault, and the model is described all the same."""
    try:
        return _start(model, devices, reporter)
    except ModelError as error:
        if model.load_format == "dummy" or not (Path(model.name).expanduser() / "config.json").is_file():
            raise
        dummy = model.model_copy(update={"load_format": "dummy"})
        try:
            experiment = _start(dummy, devices, reporter)
        except ModelError as without_weights:
            if str(without_weights) != str(error):
                found.fail("weights", str(error), error.exit_code)
            raise
        found.fail("weights", str(error), error.exit_code)
        return experiment


def _look_at_machine(fleet: Fleet, found: DoctorResult) -> None:
    hardware, software = fleet.machine.hardware, fleet.machine.software
    memory = f"{hardware.memory_bytes / 2**30:.0f} GiB"
    found.add("cpu", f"{hardware.cpu_model}, {hardware.cpu_cores} cores, {memory}")
    for index, gpu in enumerate(hardware.gpus):
        memory = "memory not known" if gpu.memory_bytes is None else f"{gpu.memory_bytes / 2**30:.0f} GiB"
        found.add(f"cuda:{index}", f"{gpu.name}, {memory}")
    if hardware.gpus:
        versions = {"driver": software.driver, "CUDA": software.cuda, "NCCL": software.nccl}
        text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        found.add("gpu software", text or "unknown")
        if hardware.links:
            found.add("links", ", ".join(hardware.links))
    found.add("memory", ", ".join(f"{device} {size / 2**30:.1f} GiB" for device, size in fleet.device_bytes.items()))
    notes = warn_of_cores(fleet.devices)
    found.add("workers", "; ".join((f"{len(fleet.devices)} started", *notes)), "warning" if notes else "ok")
