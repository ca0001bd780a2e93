"""A fleet of workers as its users see it: commands in, values out, rebuilt at its next use after a failure.

No torch here: whatever a worker dies of, `bench.fleet.supervisor` turns it into a `Failure` in a driver that lives on.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

from pydantic import TypeAdapter

from pipetune.bench import spec as s
from pipetune.bench.errors import ConfigError, FleetError, ModelError, PlanError, StudyError
from pipetune.bench.fleet.queue import Closing, GenerationResult, RequestHandle, RequestQueue
from pipetune.bench.fleet.supervisor import START_TIMEOUT_S, FleetOptions, Progress, Supervisor
from pipetune.bench.load.admission import Rules, rules_of
from pipetune.bench.load.online import OnlineRequest, OnlineRun
from pipetune.bench.machine.hardware import available_devices, device_bytes, warn_of_cores
from pipetune.bench.machine.telemetry import load_now
from pipetune.bench.memory import ModelShape, check_plan, resolve, resolve_slots
from pipetune.bench.profile import LinkProfile, Profile, ProfileGrid
from pipetune.bench.prompts.forms import Prompts, prompts_of_call
from pipetune.bench.record import Failure, FailureKind, Machine, Measurement, Outcome, timestamp

MAX_LEN = 2048
"""Positions of a queue's requests, unless told otherwise."""
_OUTCOME: TypeAdapter[Measurement | Failure] = TypeAdapter(Outcome)


class ScoreResult(s.Value):
    """What the model makes of one text."""

    token_ids: tuple[int, ...]
    """Tokens of the text."""
    logprobs: tuple[float, ...]
    """Natural logarithms of the probabilities of all tokens but the first, which has none; empty for a single token."""
    text: str | None
    """None where the model has no tokenizer."""


class Fleet(Closing):
    """One worker process per device, kept over plans; rebuilt by itself after a failure, when next used.

    Whatever it is asked raises FleetError where the workers failed, and were killed; ConfigError for prompts that
    cannot be used, or while a queue of requests is open.
    """

    def __init__(self, model: s.ModelSpec, devices: Sequence[str], **options: Unpack[FleetOptions]) -> None:
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
        self._reference: tuple[Path, s.Workload] | None = None
        self._queue: RequestQueue | None = None

    @classmethod
    def start(cls, model: s.ModelSpec, devices: Sequence[str], **options: Unpack[FleetOptions]) -> Self:
        """Starts one worker per device, `cpu:N` or `cuda:N`, and waits until the model is known to all; a GPU named
        twice gets two.

        ModelError where the model cannot be found, read or split; ConfigError for a device that is not there;
        FleetError for workers that do not start.
        """
        fleet = cls(model, devices, **options)
        fleet._check_devices()
        fleet._launch()
        return fleet

    def prompts(self, workload: s.Workload, *, as_text: bool = False) -> tuple[tuple[int, ...], ...]:
        """Token ids of every prompt, in the order given; `as_text` where the answers will be wanted as text."""
        return tuple(tuple(ids) for ids in self._call("prompts", workload=workload, as_text=as_text)["prompts"])

    def prompt_lens(self, workload: s.Workload) -> tuple[int, ...]:
        """Length of every prompt in tokens."""
        return tuple(len(prompt) for prompt in self.prompts(workload))

    def resolve(self, plan: s.Plan, workload: s.Workload) -> s.EffectivePlan | Failure:
        """How many micro-batches the plan's memory caps let be in flight here, or why not even one fits. PlanError for
        a plan that does not suit the model, or names a device that is not the fleet's."""
        if workload.arrivals is None:
            return self._resolve(plan, self.prompt_lens(workload), workload.generated_len)
        self._check_online(plan)
        lens = {"prompt_len": max(self.prompt_lens(workload)), "output_len": workload.generated_len}
        return resolve_slots(self.shape, plan, **lens, device_bytes=self.device_bytes)

    def _resolve(self, plan: s.Plan, prompt_lens: Sequence[int], output_len: int) -> s.EffectivePlan | Failure:
        lens = {"num_prompts": len(prompt_lens), "prompt_len": max(prompt_lens), "output_len": output_len}
        return resolve(self.shape, plan, **lens, device_bytes=self.device_bytes)

    def make_reference(self, path: Path, workload: s.Workload, protocol: s.Protocol) -> Failure | None:
        """Asks the unsplit model for the truth that plans are checked against, and keeps it in a file."""
        return self._refer("reference", path, workload, workload=workload, protocol=protocol)

    def make_reference_from_plan(self, path: Path, spec: s.RunSpec, effective: s.EffectivePlan) -> Failure | None:
        """Takes a plan's own output for the truth, where the unsplit model fits on no device. Later plans can be told
        apart from it; whether it was right itself cannot be told."""
        self._check_stages(spec.plan)
        how: dict[str, Any] = {"timeout_s": spec.protocol.timeout_s, "spec": spec, "effective": effective}
        return self._refer("reference_from_plan", path, spec.workload, **how)

    def use_reference(self, path: Path, workload: s.Workload) -> None:
        """Takes a reference made earlier, as on a resume; StudyError if it cannot be read, or is of other work."""
        self._call("use_reference", path=path.absolute(), workload=workload)
        self._reference = path.absolute(), workload

    def baseline(self, workload: s.Workload, protocol: s.Protocol, batch_size: int) -> Measurement | Failure:
        """Measures the model un-pipelined: on one CPU worker's share of cores, or over all GPUs by `device_map`. By HF
        `generate`, or by plain forward passes where texts are scored."""
        return self._outcome(
            "baseline", timeout_s=protocol.timeout_s, workload=workload, protocol=protocol, batch_size=batch_size
        )

    def measure(self, spec: s.RunSpec, effective: s.EffectivePlan) -> Measurement | Failure:
        """Moves to the plan, checks its output, warms up and measures; PlanError for devices that are not there."""
        self._check_stages(spec.plan)
        return self._outcome("measure", timeout_s=spec.protocol.timeout_s, spec=spec, effective=effective)

    def profile(self, grid: ProfileGrid, *, packed_weights: bool = True, cuda_graphs: bool = True) -> Profile:
        """Times the model's parts on every device, all of them busy at once, and links; the switches are as in plans.
        FleetError as well where not even one layer of each kind fits between embedding and head."""
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
        """Times the links between the devices alone, as a profile does."""
        return tuple(map(LinkProfile.model_validate, self._call("links")["links"]))

    def generate(
        self,
        plan: s.Plan,
        prompts: Prompts,
        *,
        max_new_tokens: int | Sequence[int],
        in_flight: int | None = None,
        ignore_eos: bool = False,
        sampling: s.Sampling | None = None,
    ) -> tuple[GenerationResult, ...]:
        """Generates for use, as `Pipeline.generate` does, under any plan over the fleet's devices; raises as that.

        By default as many micro-batches are in flight as the plan's memory caps let be. PlanError also where the plan
        names a device more often than this fleet has workers on it.
        """
        lens = [max_new_tokens] if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if min(lens, default=0) < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        use = self._use(plan, prompts, max(lens), in_flight)
        if not isinstance(max_new_tokens, int) and len(lens) != len(use["prompts"]):
            raise ConfigError(f"max_new_tokens: {len(lens)} numbers for {len(use['prompts'])} prompts")
        answer = self._call("generate", **use, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos, sampling=sampling)
        return tuple(
            GenerationResult(ttft_s=row["token_times_s"][0], e2el_s=row["token_times_s"][-1], **row)
            for row in answer["results"]
        )

    def score(self, plan: s.Plan, texts: Prompts, *, in_flight: int | None = None) -> tuple[ScoreResult, ...]:
        """Log-probabilities of the tokens of given texts, each under those before it; all else is as in `generate`."""
        answer = self._call("score", **self._use(plan, texts, 0, in_flight))
        return tuple(
            ScoreResult(token_ids=tuple(row["prompt_token_ids"]), logprobs=tuple(row["logprobs"]), text=row["text"])
            for row in answer["results"]
        )

    def run_trace(
        self,
        plan: s.Plan,
        requests: Sequence[OnlineRequest],
        *,
        in_flight: int | None = None,
        max_concurrency: int | None = None,
        sampling: s.Sampling | None = None,
        instrument: bool = True,
        timeout_s: float = START_TIMEOUT_S,
    ) -> OnlineRun:
        """Serves requests as they arrive over time, each at its own; decode steps run eagerly, on GPUs as well.

        Requests have numbers of their own; those without a time are there from the start. Replicas get them in turn.
        `in_flight` counts slots of each, by default as many as the plan's memory caps let be, at most two a stage, and
        one of a stage alone. At most `max_concurrency` requests are in the system at once; others wait before it, and
        their latencies count that. `sampling` draws tokens by the requests' numbers; None takes the likeliest token.
        `instrument` keeps what every stage did and when.

        PlanError for a plan that cannot be run so: with compiled layers, stages on several hosts, or more slots of
        lanes than there are.
        """
        if not requests or len({one.number for one in requests}) < len(requests):
            raise ConfigError(f"requests: {len(requests)} are given; give at least one, each with a number of its own")
        self._check_online(plan)
        prompt_len, output_len = max(len(one.prompt) for one in requests), max(one.output_len for one in requests)
        in_flight = in_flight or self._slots(plan, prompt_len=prompt_len, output_len=output_len)
        how: dict[str, Any] = {"max_concurrency": max_concurrency, "sampling": sampling, "instrument": instrument}
        rules = rules_of(plan, in_flight, joins=self.shape.joins, whole_slots=self.shape.whole_slots)
        answer = self._call("run_trace", timeout_s=timeout_s, plan=plan, rules=rules, requests=requests, **how)
        return OnlineRun.model_validate(answer["run"])

    def open_queue(
        self,
        plan: s.Plan,
        *,
        max_len: int | None = None,
        in_flight: int | None = None,
        sampling: s.Sampling | None = None,
    ) -> RequestQueue:
        """A queue for requests that are served as they are given; until it is closed the fleet does nothing else.

        All is as in `Pipeline.open_queue`, and `in_flight` as in `run_trace`. ConfigError also where `max_len` is
        beyond the model's positions.
        """
        self._check_online(plan)
        max_len = max_len or min(self.shape.max_positions or MAX_LEN, MAX_LEN)
        limit = self.shape.max_positions or max_len
        if not 2 <= max_len <= limit:
            raise ConfigError(f"max_len={max_len}: must hold a prompt and a token, and at most {limit} positions")
        in_flight = in_flight or self._slots(plan, prompt_len=max_len - 1, output_len=1)
        rules = rules_of(plan, in_flight, joins=self.shape.joins, whole_slots=self.shape.whole_slots)
        self._wake()
        args = {"plan": plan, "rules": rules, "max_len": max_len, "sampling": sampling}
        serve = partial(self._request, "open_queue", args, math.inf)
        self._queue = RequestQueue(self._supervisor, serve, max_len, plan.replicas)
        return self._queue

    def _slots(self, plan: s.Plan, *, prompt_len: int, output_len: int) -> int:
        lens = {"prompt_len": prompt_len, "output_len": output_len}
        return _in_flight(resolve_slots(self.shape, plan, **lens, device_bytes=self.device_bytes))

    def _check_online(self, plan: s.Plan) -> None:
        self._check_stages(plan)
        check_plan(self.shape, plan)
        refused = {
            "plan.compile: its graphs are made for whole batches; leave it out": plan.compile,
            "plan.stages: orders do not travel between hosts yet; use one host's": len(s.hosts_of(plan.devices)) > 1,
        }
        if why := next((text for text, applies in refused.items() if applies), None):
            raise PlanError(f"requests over time: {why}")

    def _use(self, plan: s.Plan, prompts: Prompts, output_len: int, in_flight: int | None) -> dict[str, Any]:
        self._check_stages(plan)
        given = prompts_of_call(prompts)
        if not given:
            raise ConfigError("prompts: there is none; give at least one")
        if in_flight is None:
            # Text has at most about a token a byte.
            lens = [len(prompt) if not isinstance(prompt, str) else len(prompt.encode()) + 2 for prompt in given]
            in_flight = _in_flight(self._resolve(plan, lens, output_len))
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
        there, gpus = available_devices(), [one for one in s.devices_here(self.devices) if s.device_kind(one) == "cuda"]
        if missing := next((gpu for gpu in gpus if gpu not in there), None):
            raise ConfigError(f"devices: {missing} is not on this machine; there are {', '.join(there)} and any cpu:N")

    def _check_stages(self, plan: s.Plan) -> None:
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
            self.model = s.ModelSpec.model_validate(described["model"])
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

    def _refer(self, command: str, path: Path, of: s.Workload, **args: Any) -> Failure | None:
        try:
            answer = self._call(command, path=path.absolute(), **args)
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
        """Sends a command and waits for its answer, on a fleet that is started again if it is down."""
        self._wake()
        return self._request(command, args, timeout_s)

    def _wake(self) -> None:
        if self._queue is not None and self._queue.is_open:
            raise ConfigError("the fleet serves a queue of requests; close that first")
        if not self._supervisor.is_up:
            self._launch()

    def _request(self, command: str, args: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        answer = self._supervisor.request(command, args, timeout_s)
        if "error" in answer:
            raise (StudyError if answer["of_study"] else ConfigError)(answer["error"])
        return answer


def _in_flight(resolved: s.EffectivePlan | Failure) -> int:
    if isinstance(resolved, Failure):
        raise PlanError(resolved.message)
    return resolved.in_flight
