"""A fleet of workers as its users see it: commands in, values out, rebuilt at its next use after a failure.

No torch here: whatever a worker dies of, `bench.fleet.supervisor` turns it into a `Failure` in a driver that lives on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, Unpack

from pydantic import TypeAdapter

from pipetune.bench.errors import ConfigError, FleetError, ModelError, PlanError, StudyError
from pipetune.bench.fleet.supervisor import START_TIMEOUT_S, FleetOptions, Progress, Supervisor
from pipetune.bench.machine.hardware import available_devices, device_bytes, warn_of_cores
from pipetune.bench.machine.telemetry import load_now
from pipetune.bench.memory import ModelShape, resolve_prompts
from pipetune.bench.profile import LinkProfile, Profile, ProfileGrid
from pipetune.bench.prompts.forms import Prompts, prompts_of_call
from pipetune.bench.record import Failure, FailureKind, Machine, Measurement, Outcome, timestamp
from pipetune.bench.spec import (
    EffectivePlan,
    ModelSpec,
    Plan,
    Protocol,
    RunSpec,
    Sampling,
    Value,
    Workload,
    device_kind,
    devices_here,
)

__all__ = [
    "Fleet",
    "GenerationResult",
    "Progress",
    "ScoreResult",
    "available_devices",
    "device_bytes",
    "load_now",
    "warn_of_cores",
]

_OUTCOME: TypeAdapter[Measurement | Failure] = TypeAdapter(Outcome)


class GenerationResult(Value):
    """What one prompt gave."""

    token_ids: tuple[int, ...]
    """Generated tokens, the end-of-sequence token included."""
    text: str | None
    """None where the model has no tokenizer."""
    prompt_token_ids: tuple[int, ...]
    ttft_s: float
    """From the call's prompts to this prompt's first token."""
    e2el_s: float
    """From the call's prompts to this prompt's last token."""
    token_times_s: tuple[float, ...]


class ScoreResult(Value):
    """What the model makes of one text."""

    token_ids: tuple[int, ...]
    """Tokens of the text."""
    logprobs: tuple[float, ...]
    """Natural logarithms of the probabilities of all tokens but the first, which has none; empty for a single token."""
    text: str | None
    """None where the model has no tokenizer."""


class Closing:
    """Something that is closed at the end of its `with` block."""

    def close(self) -> None:
        """Gives back what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Fleet(Closing):
    """One worker process per device, kept over plans; rebuilt by itself after a failure, when next used."""

    def __init__(self, model: ModelSpec, devices: Sequence[str], **options: Unpack[FleetOptions]) -> None:
        self.model = model
        self.devices = tuple(devices)
        self.worker_env = {device: dict(env) for device, env in (options.get("worker_env") or {}).items()}
        self.shape: ModelShape
        self.machine: Machine
        self.device_bytes: dict[str, int]
        self.folder: Path
        """Holds the model's files, on the first host."""
        self._notes = warn_of_cores(self.devices)
        self._supervisor = Supervisor(self.devices, **options)
        self._reference: tuple[Path, Workload] | None = None

    @classmethod
    def start(cls, model: ModelSpec, devices: Sequence[str], **options: Unpack[FleetOptions]) -> Self:
        """Starts one worker per device and waits until the model is known to all.

        Args:
            devices: `cpu:N` or `cuda:N`, one worker each; a GPU named twice gets two.

        Raises:
            ModelError: the model cannot be found, read or split.
            ConfigError: a device that is not there.
            FleetError: workers that do not start.
        """
        fleet = cls(model, devices, **options)
        fleet._check_devices()
        fleet._launch()
        return fleet

    def prompts(self, workload: Workload, *, as_text: bool = False) -> tuple[tuple[int, ...], ...]:
        """Token ids of every prompt, in the order given; `as_text` where the answers will be wanted as text.

        Raises:
            ConfigError: prompts that cannot be used, or a tokenizer that does not load.
            FleetError: the workers failed.
        """
        return tuple(tuple(ids) for ids in self._call("prompts", workload=workload, as_text=as_text)["prompts"])

    def prompt_lens(self, workload: Workload) -> tuple[int, ...]:
        """Length of every prompt in tokens; raises as `prompts` does."""
        return tuple(len(prompt) for prompt in self.prompts(workload))

    def resolve(self, plan: Plan, workload: Workload) -> EffectivePlan | Failure:
        """How many micro-batches the plan's memory caps let be in flight here, or why not even one fits.

        Raises:
            ConfigError: prompts that cannot be used.
            PlanError: the plan does not suit the model, or names a device that is not the fleet's.
        """
        return self._resolve(plan, self.prompt_lens(workload), workload.generated_len)

    def _resolve(self, plan: Plan, prompt_lens: Sequence[int], output_len: int) -> EffectivePlan | Failure:
        return resolve_prompts(self.shape, plan, prompt_lens, output_len=output_len, device_bytes=self.device_bytes)

    def make_reference(self, path: Path, workload: Workload, protocol: Protocol) -> Failure | None:
        """Asks the unsplit model for the truth that plans are checked against, and keeps it in a file."""
        return self._refer("reference", path, workload, workload=workload, protocol=protocol)

    def make_reference_from_plan(self, path: Path, spec: RunSpec, effective: EffectivePlan) -> Failure | None:
        """Takes a plan's own output for the truth, where the unsplit model fits on no device.

        Later plans can be told apart from it; whether it was right itself cannot be told.
        """
        self._check_stages(spec.plan)
        timeout_s = spec.protocol.timeout_s
        return self._refer(
            "reference_from_plan", path, spec.workload, timeout_s=timeout_s, spec=spec, effective=effective
        )

    def use_reference(self, path: Path, workload: Workload) -> None:
        """Takes a reference made earlier, as on a resume.

        Raises:
            StudyError: it cannot be read, or is of another model or workload.
            FleetError: the workers failed.
        """
        self._call("use_reference", path=path.absolute(), workload=workload)
        self._reference = path.absolute(), workload

    def baseline(self, workload: Workload, protocol: Protocol, batch_size: int) -> Measurement | Failure:
        """Measures the model un-pipelined: on one CPU worker's share of cores, or over all GPUs by `device_map`.

        By HF `generate`, or by plain forward passes where texts are scored.
        """
        return self._outcome(
            "baseline", timeout_s=protocol.timeout_s, workload=workload, protocol=protocol, batch_size=batch_size
        )

    def measure(self, spec: RunSpec, effective: EffectivePlan) -> Measurement | Failure:
        """Moves to the plan, checks its output, warms up and measures.

        Raises:
            PlanError: the plan names a device more often than this fleet has workers on it.
        """
        self._check_stages(spec.plan)
        return self._outcome("measure", timeout_s=spec.protocol.timeout_s, spec=spec, effective=effective)

    def profile(self, grid: ProfileGrid, *, packed_weights: bool = True, cuda_graphs: bool = True) -> Profile:
        """Times the model's parts on every device, all of them busy at once, and links; the switches are as in plans.

        Raises:
            FleetError: the workers failed, or not even one layer of each kind fits between embedding and head.
        """
        answer = self._call("profile", grid=grid, packed_weights=packed_weights, cuda_graphs=cuda_graphs)
        if "failure" in answer:
            raise FleetError(Failure.model_validate(answer["failure"]))
        return Profile(
            model=self.model,
            shape=self.shape,
            machine=self.machine,
            device_bytes=self.device_bytes,
            packed_weights=packed_weights,
            cuda_graphs=cuda_graphs,
            scores=grid.scores,
            measured_at=timestamp(),
            **answer | {"notes": (*answer["notes"], *self._notes)},
        )

    def time_links(self) -> tuple[LinkProfile, ...]:
        """Times the links between the devices alone, as a profile does.

        Raises:
            FleetError: the workers failed.
        """
        return tuple(map(LinkProfile.model_validate, self._call("links")["links"]))

    def generate(
        self,
        plan: Plan,
        prompts: Prompts,
        *,
        max_new_tokens: int | Sequence[int],
        in_flight: int | None = None,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
    ) -> tuple[GenerationResult, ...]:
        """Generates for use, as `Pipeline.generate` does, under any plan over the fleet's devices.

        Args:
            in_flight: micro-batches resident at once; by default as many as the plan's memory caps let be.

        Raises:
            TypeError: something else than prompts.
            ConfigError: prompts that cannot be used.
            PlanError: the plan names a device more often than this fleet has workers on it, or not even one micro-batch
                fits under its memory caps.
            FleetError: the workers failed.
        """
        lens = [max_new_tokens] if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if min(lens, default=0) < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        use = self._use(plan, prompts, max(lens), in_flight)
        if not isinstance(max_new_tokens, int) and len(lens) != len(use["prompts"]):
            raise ConfigError(f"max_new_tokens: {len(lens)} numbers for {len(use['prompts'])} prompts")
        answer = self._call(
            "generate",
            **use,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            sampling=sampling,
        )
        return tuple(
            GenerationResult(ttft_s=row["token_times_s"][0], e2el_s=row["token_times_s"][-1], **row)
            for row in answer["results"]
        )

    def score(self, plan: Plan, texts: Prompts, *, in_flight: int | None = None) -> tuple[ScoreResult, ...]:
        """Log-probabilities of the tokens of given texts, each under those before it.

        Args:
            in_flight: micro-batches resident at once; by default as many as the plan's memory caps let be.

        Raises:
            TypeError, PipetuneError: as `generate` does.
        """
        answer = self._call("score", **self._use(plan, texts, 0, in_flight))
        return tuple(
            ScoreResult(token_ids=tuple(row["prompt_token_ids"]), logprobs=tuple(row["logprobs"]), text=row["text"])
            for row in answer["results"]
        )

    def _use(self, plan: Plan, prompts: Prompts, output_len: int, in_flight: int | None) -> dict[str, Any]:
        self._check_stages(plan)
        given = prompts_of_call(prompts)
        if not given:
            raise ConfigError("prompts: there is none; give at least one")
        if in_flight is None:
            # Text has at most about a token a byte.
            lens = [len(prompt) if not isinstance(prompt, str) else len(prompt.encode()) + 2 for prompt in given]
            resolved = self._resolve(plan, lens, output_len)
            if isinstance(resolved, Failure):
                raise PlanError(resolved.message)
            in_flight = resolved.in_flight
        return {"plan": plan, "in_flight": in_flight, "prompts": given}

    def interrupt(self) -> None:
        """Kills the workers at once; the fleet starts anew when it is next used."""
        self._supervisor.kill()

    def close(self) -> None:
        """Ends the workers."""
        self._supervisor.close()

    def _check_devices(self) -> None:
        if not self.devices:
            raise ConfigError("devices: there is none; give cpu:0-1, cuda:0,cuda:1 or auto")
        there = available_devices()
        if missing := [
            name for name in devices_here(self.devices) if device_kind(name) == "cuda" and name not in there
        ]:
            raise ConfigError(
                f"devices: {missing[0]} is not on this machine; there are {', '.join(there)} and any cpu:N"
            )

    def _check_stages(self, plan: Plan) -> None:
        named = list(plan.devices)
        for device in named:
            if named.count(device) > self.devices.count(device):
                raise PlanError(
                    f"plan.stages: {device} holds {named.count(device)} stages, and the fleet has "
                    f"{self.devices.count(device)} workers on it; its devices are {', '.join(self.devices)}"
                )

    def _launch(self) -> None:
        try:
            self._supervisor.start(self.model)
            described = self._supervisor.request("describe", {}, START_TIMEOUT_S)
            self.model = ModelSpec.model_validate(described["model"])
            self.shape = ModelShape.model_validate(described["shape"])
            self.machine = Machine.model_validate(described["machine"])
            self.device_bytes = described["device_bytes"]
            self.folder = Path(described["folder"])
            if self._reference is not None:
                path, workload = self._reference
                self._request("use_reference", {"path": path, "workload": workload}, START_TIMEOUT_S)
        except BaseException as error:
            # Whatever it is, an interrupt among them: nobody else knows of these processes and this folder yet.
            self._supervisor.kill()
            if isinstance(error, FleetError) and error.failure.kind is FailureKind.UNSUPPORTED_MODEL:
                raise ModelError(error.failure.message) from error
            raise

    def _refer(
        self, command: str, path: Path, of: Workload, *, timeout_s: float = START_TIMEOUT_S, **args: Any
    ) -> Failure | None:
        try:
            answer = self._call(command, timeout_s=timeout_s, path=path.absolute(), **args)
        except FleetError as error:
            return error.failure
        if answer.get("failure") is not None:
            return Failure.model_validate(answer["failure"])
        self._reference = path.absolute(), of
        return None

    def _outcome(self, command: str, *, timeout_s: float, **args: Any) -> Measurement | Failure:
        try:
            outcome = _OUTCOME.validate_python(self._call(command, timeout_s=timeout_s, **args)["outcome"])
        except FleetError as error:
            return error.failure
        if isinstance(outcome, Failure):
            return outcome
        return outcome.model_copy(update={"notes": (*outcome.notes, *self._notes)})

    def _call(self, command: str, *, timeout_s: float = START_TIMEOUT_S, **args: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer, on a fleet that is started again if it is down.

        Raises:
            ConfigError: prompts that cannot be used.
            StudyError: a reference that cannot be used.
            FleetError: the workers failed, and were killed.
        """
        if not self._supervisor.is_up:
            self._launch()
        return self._request(command, args, timeout_s)

    def _request(self, command: str, args: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        answer = self._supervisor.request(command, args, timeout_s)
        if "error" in answer:
            raise (StudyError if answer["of_study"] else ConfigError)(answer["error"])
        return answer
