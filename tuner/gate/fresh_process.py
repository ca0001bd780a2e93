"""One side measured once, in processes of its own that start for it and end with it: a unit of the gate.

It is run through `pipetune bench`, whose flags and record are older than the gate: so another environment's or an old
revision's pipetune can be one of the sides. Metrics are derived here from the raw record, by one set of formulas for
both.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipetune.bench import metrics
from pipetune.bench.errors import PlanError, UserError, explain
from pipetune.bench.record import Failure, FailureKind, Record, timestamp
from pipetune.bench.spec import Value
from pipetune.tuner.gate.python_env import Interpreter, own
from pipetune.tuner.gate.values import Case, Sample, SideName
from pipetune.tuner.study.diff import differences

_START_S = 300.0
"""What starting and loading may take beyond the protocol's own time-out."""
_GOODBYE_S = 10.0
"""What a process that is told to stop has to clean up."""
_TAIL = 2000
_PREFIX, _IN_USE, _OF_PLAN = "pipetune: ", " is in use by ", "plan."
"""How the command line begins a message, what `bench.fleet.locks` says of a GPU that others hold, and how it goes on
where a plan is not for the model."""


@dataclass(frozen=True)
class _NotComparable:
    """A run that says nothing of its side, though the side did not fail."""

    why: str


def run_fresh(
    case: Case,
    name: SideName,
    interpreter: Interpreter,
    *,
    hardware_id: str | None,
    check: bool,
    timeout_s: float | None = None,
) -> Sample:
    """Starts a side, measures it, and ends it.

    Args:
        hardware_id: of the machine as this side sees it.
        check: whether its output is compared with the unsplit model's.
        timeout_s: beyond which it is ended; None is what the protocol lets a run take.

    Raises:
        PlanError: this very pipetune refuses the plan, so that it cannot be for that model whoever runs it.
    """
    longest_s = min(_START_S + 2 * case.protocol.timeout_s, timeout_s or math.inf)
    with tempfile.TemporaryDirectory(prefix="pipetune-gate-") as folder:
        started_at, began = timestamp(), time.monotonic()
        found = _run(case, name, interpreter, Path(folder), check=check, timeout_s=longest_s)
        took_s = round(time.monotonic() - began, 3)
    common: dict[str, Any] = {"hardware_id": hardware_id, "started_at": started_at, "wall_s": took_s}
    if isinstance(found, _NotComparable):
        return Sample(not_comparable=found.why, **common)
    if isinstance(found, Failure):
        return Sample(failure=found, **common)
    return sample_of(found).model_copy(update={**common, "recorded_hardware_id": found.hardware_id})


def sample_of(record: Record) -> Sample:
    """What the gate keeps of a run of this pipetune."""
    common: dict[str, Any] = {
        "hardware_id": record.hardware_id,
        "started_at": record.started_at,
        "wall_s": record.wall_s,
    }
    outcome = record.result
    if isinstance(outcome, Failure):
        return Sample(failure=outcome, **common)
    return Sample(
        metrics=metrics.derive(outcome),
        durations_s=tuple(run.duration_s for run in outcome.iterations),
        steady=outcome.steady,
        disturbances=outcome.telemetry.disturbances,
        checked=outcome.check is not None,
        **common,
    )


def _run(
    case: Case, name: SideName, interpreter: Interpreter, folder: Path, *, check: bool, timeout_s: float
) -> Record | Failure | _NotComparable:
    side = case.side(name)
    config, plan, output = folder / "config.yaml", folder / "plan.json", folder / "records.jsonl"
    model = _given(side.model) | {"name": side.model.name}
    trusted = model.pop("trust_remote_code", False)
    settings = {
        "model": model,
        "workload": _given(case.workload),
        "protocol": _given(case.protocol),
        "devices": list(side.devices),
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    plan.write_text(side.plan.model_dump_json(exclude_defaults=True), encoding="utf-8")
    command = interpreter.command("bench", "--config", str(config), "--plan", str(plan))
    command += ["--check" if check else "--no-check", "--no-progress", "--json", "--output", str(output)]
    command += ["--trust-remote-code"] if trusted else []
    try:
        done = _finish(command, interpreter.environment, timeout_s)
    except subprocess.TimeoutExpired:
        return Failure(kind=FailureKind.TIMEOUT, message=f"its process did not end within {timeout_s:.0f} s")
    except OSError as error:
        return Failure(kind=FailureKind.WORKER_DIED, message=f"its process cannot be started: {error}", phase="start")
    if done.returncode == 130:
        raise KeyboardInterrupt
    if output.exists() and output.stat().st_size:
        return _read(output, case, name)
    return _refusal(done.stdout) or _nothing(done, name, interpreter)


def _finish(command: list[str], environment: dict[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end. Whatever comes between, a Ctrl-C for one, leaves no process behind.

    A session of its own keeps the terminal's Ctrl-C from it, so that it is told once, by us, and can clean up.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            said, complained = process.communicate(timeout=timeout_s)
        except BaseException:
            try:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=_GOODBYE_S)
            finally:
                # Also where a second Ctrl-C ends the waiting.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


def _given(value: Value) -> dict[str, Any]:
    """Without what is at its default, which an old revision may not know."""
    return value.model_dump(mode="json", exclude_defaults=True)


def _refusal(document: str) -> Failure | None:
    """Why a plan did not even start, such as one that does not fit into memory."""
    try:
        return Failure.model_validate(json.loads(document)["failure"])
    except (ValueError, KeyError, TypeError):
        return None


def _nothing(
    done: subprocess.CompletedProcess[str], name: SideName, interpreter: Interpreter
) -> Failure | _NotComparable:
    """What a process says that left no record."""
    said = (done.stderr.strip() or done.stdout.strip())[-_TAIL:]
    last = said.splitlines()[-1] if said else "it said nothing"
    message = last.removeprefix(_PREFIX)
    if done.returncode == UserError.exit_code and _IN_USE in message:
        return _NotComparable(f"it did not get its GPU: {message}")
    ours = interpreter == own(interpreter.env)
    if done.returncode == UserError.exit_code and message.startswith(_OF_PLAN) and ours:
        raise PlanError(f"{name}: {message}")
    return Failure(
        kind=FailureKind.WORKER_ERROR,
        message=f"pipetune bench ended with exit code {done.returncode} and left no record: {last}",
        detail=said or None,
    )


def _read(output: Path, case: Case, name: SideName) -> Record | _NotComparable:
    """The last record: others stand before it where a run was repeated."""
    line = output.read_text(encoding="utf-8").splitlines()[-1]
    try:
        record = Record.model_validate_json(line)
    except ValidationError as error:
        return _NotComparable(
            f"its record is of another version than this pipetune reads: {explain(error)}; compare with a "
            "revision whose records it reads"
        )
    other = _other_work(record, case, name)
    if other:
        return _NotComparable(
            f"it did other work than it was asked for, by other defaults: {other[0]}; give that by a flag or a "
            "--config, as a value that is no default here: both sides are told it then"
        )
    return record


def _other_work(record: Record, case: Case, name: SideName) -> list[str]:
    """What an old revision did otherwise, whose defaults are not ours."""
    assert record.spec is not None, "a plan was measured"
    known = {"prompts_file": None, "prompts_sha256": None}
    alike = {"check_outputs": case.protocol.check_outputs}
    return [
        *differences(case.side(name).plan, record.spec.plan),
        *differences(case.workload.model_copy(update=known), record.spec.workload.model_copy(update=known)),
        *differences(case.protocol, record.spec.protocol.model_copy(update=alike)),
    ]
