"""One side measured once, in processes of its own that start for it and end with it: a unit of the gate.

It is run through `pipetune bench`, whose flags and record are older than the gate: so another environment's or an old
revision's pipetune can be one of the sides. Metrics are derived here from the raw record, by one set of formulas for
both.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bench import metrics
from bench.record import Failure, FailureKind, Measurement, Outcome, Record
from bench.spec import Value
from tuner.differences import differences
from tuner.gate.interpreter import Interpreter
from tuner.gate.values import Case, Sample, SideName

_START_S = 300.0
"""What starting and loading may take beyond the protocol's own time-out."""
_GOODBYE_S = 10.0
"""What a process that is told to stop has to clean up."""
_TAIL = 2000


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
    """
    longest_s = min(_START_S + 2 * case.protocol.timeout_s, timeout_s or math.inf)
    with tempfile.TemporaryDirectory(prefix="pipetune-gate-") as folder:
        outcome, took_s, started_at = timed(
            lambda: _run(case, name, interpreter, Path(folder), check=check, timeout_s=longest_s)
        )
    return sample_of(outcome, hardware_id=hardware_id, started_at=started_at, wall_s=took_s)


def timed(run: Callable[[], Outcome]) -> tuple[Outcome, float, str]:
    """An outcome, the seconds it took, and when it began."""
    started_at, began = dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), time.monotonic()
    outcome = run()
    return outcome, round(time.monotonic() - began, 3), started_at


def sample_of(outcome: Outcome, *, hardware_id: str | None, started_at: str, wall_s: float) -> Sample:
    """What the gate keeps of a run."""
    common: dict[str, Any] = {"hardware_id": hardware_id, "started_at": started_at, "wall_s": wall_s}
    if isinstance(outcome, Failure):
        return Sample(failure=outcome, **common)
    return Sample(
        metrics=metrics.derive(outcome),
        durations_s=tuple(run.duration_s for run in outcome.iterations),
        steady=outcome.steady,
        disturbances=outcome.telemetry.disturbances,
        **common,
    )


def _run(
    case: Case, name: SideName, interpreter: Interpreter, folder: Path, *, check: bool, timeout_s: float
) -> Outcome:
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
    command = interpreter.command("-m", "tuner", "bench", "--config", str(config), "--plan", str(plan))
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
    return _refusal(done.stdout) or _nothing(done)


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
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_GOODBYE_S)
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


def _nothing(done: subprocess.CompletedProcess[str]) -> Failure:
    said = (done.stderr.strip() or done.stdout.strip())[-_TAIL:]
    last = said.splitlines()[-1] if said else "it said nothing"
    return Failure(
        kind=FailureKind.WORKER_ERROR,
        message=f"pipetune bench ended with exit code {done.returncode} and left no record: {last}",
        detail=said or None,
    )


def _read(output: Path, case: Case, name: SideName) -> Measurement | Failure:
    """The last record: others stand before it where a run was repeated."""
    line = output.read_text(encoding="utf-8").splitlines()[-1]
    try:
        record = Record.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return _foreign(f"its record is of another version than this pipetune reads: {where}: {first['msg']}")
    other = _other_work(record, case, name)
    return (
        _foreign(f"it did other work than it was asked for, by other defaults: {other[0]}") if other else record.result
    )


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


def _foreign(message: str) -> Failure:
    return Failure(kind=FailureKind.WORKER_ERROR, message=message)
