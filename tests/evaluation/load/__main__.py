"""The command behind `make bench-load`: the parts that are asked for, each kept in a file; then the table of all.

python -m tests.evaluation.load --only 1 --docs docs/performance.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import write_durably
from pipetune.bench.machine.hardware import cpu_cores, read_machine
from pipetune.bench.metrics import percentile
from pipetune.bench.record import Machine, timestamp
from pipetune.bench.spec import Goodput
from tests.evaluation.harness import ROOT, around_marks, exit_code_of, put_between_marks, say
from tests.evaluation.load import lanes, predicted, runs_needed, versus
from tests.evaluation.load.estimates import Limits, interval
from tests.evaluation.load.lab import DUMMY, FULL, QUICK, SUBJECTS, Extent, Lab
from tests.evaluation.load.table import render
from tests.evaluation.load.values import Part, Row
from tests.evaluation.online import against_batch, order_cost
from tests.evaluation.peers.group import PeerError
from tests.evaluation.peers.rig import DEVICES
from tests.evaluation.peers.store import folder_of

COMMAND = "bench-load"
AIM_BATCH, AIM_ORDER_US = 0.98, 50.0

Measured = tuple[list[Row], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all parts that were asked for are there, 3 when one of them failed, else the error's own code."""
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation.load", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one round: does it run to the end?")
    parser.add_argument("--only", type=int, action="append", choices=PARTS, metavar="NUMBER", help="a part, or several")
    parser.add_argument("--models", help=f"of {', '.join(SUBJECTS)}; all, or {DUMMY} with --quick")
    parser.add_argument("--rounds", type=int, help=f"{FULL.rounds} by default")
    parser.add_argument("--requests", type=int, help="of a trace; by default some hundreds, by the model")
    parser.add_argument("--goodput", nargs="+", help="limits as ttft:500 tpot:50, in place of those that are found")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "results" / "load")
    parser.add_argument("--docs", type=Path, help="document whose table is written; by default none is")
    parser.add_argument("--table-only", action="store_true", help="run nothing, write the table of what is there")
    args = parser.parse_args(arguments)
    return exit_code_of(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> int:
    if cpu_cores() < len(DEVICES):
        raise ConfigError(f"this needs {len(DEVICES)} cores, one a worker, and there is {cpu_cores()}")
    if args.docs is not None:
        around_marks(args.docs, COMMAND)
    names = args.models.split(",") if args.models else ([DUMMY] if args.quick else list(SUBJECTS))
    if unknown := [name for name in names if name not in SUBJECTS]:
        raise ConfigError(f"--models: {unknown[0]!r} is none of {', '.join(SUBJECTS)}")
    _limits(args.goodput)
    failed = []
    for number in () if args.table_only else args.only or tuple(PARTS):
        try:
            _measure(number, names, args)
        except PeerError as error:
            say(f"part {number}: {error}")
            failed.append(number)
    kept = sorted(args.output.glob("*/*.json"))
    text = render([part for path in kept if (part := _read(path)) is not None and (args.quick or not part.quick)])
    sys.stdout.write(text)
    if args.docs is not None:
        put_between_marks(args.docs, COMMAND, text)
    return 3 if failed else 0


def _measure(number: int, names: Sequence[str], args: argparse.Namespace) -> None:
    title, work = PARTS[number]
    machine = read_machine()
    say(f"part {number}: {title}, on {machine.hardware.cpu_model}")
    started_at, began, before = timestamp(), time.monotonic(), os.getloadavg()[0]
    rows, raw, settings = work(names, args)
    part = Part(
        number=number,
        title=title,
        machine=machine,
        started_at=started_at,
        took_s=time.monotonic() - began,
        load_before=before,
        load_after=os.getloadavg()[0],
        quick=args.quick,
        settings=settings,
        rows=tuple(rows),
        raw=raw,
    )
    path = _path(number, machine, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, part.model_dump_json(indent=1) + "\n")
    say(f"part {number} is in {path}")


def _read(path: Path) -> Part | None:
    try:
        return Part.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        say(f"{path}: left out, it is no part that can be read")
        return None


def _limits(given: Sequence[str] | None) -> Limits | None:
    if given is None:
        return None
    try:
        limits = Goodput.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"--goodput: {error.errors()[0]['msg']}") from error
    if limits.ttft is None or limits.tpot is None:
        raise ConfigError("--goodput: give a limit for ttft and one for tpot, as ttft:500 tpot:50")
    return Limits(ttft=limits.ttft, tpot=limits.tpot)


def _extent(args: argparse.Namespace) -> Extent:
    from dataclasses import replace

    extent = QUICK if args.quick else FULL
    return replace(extent, rounds=args.rounds) if args.rounds else extent


def _lab(name: str, args: argparse.Namespace, *, finds_limits: bool = False) -> Lab:
    extent = _extent(args)
    given, origin = _limits(args.goodput), "given"
    if given is None and not finds_limits:
        given, origin = _kept_limits(name, args), "as in part 1"
    return Lab(
        subject=SUBJECTS[name],
        extent=extent,
        requests=args.requests or extent.requests[name],
        given=given,
        origin=origin,
    )


def _kept_limits(name: str, args: argparse.Namespace) -> Limits | None:
    """Those of part 1, if it ran on this machine."""
    for path in sorted(folder_of(args.output, read_machine()).glob("1*.json")):
        part = _read(path)
        if part is not None and part.quick == args.quick and "limits" in part.raw.get(name, {}):
            return Limits(**part.raw[name]["limits"])
    return None


def _path(number: int, machine: Machine, args: argparse.Namespace) -> Path:
    """A part of some models has a file of its own: each takes up to an hour."""
    models = f"-{args.models.replace(',', '+')}" if args.models else ""
    return folder_of(args.output, machine) / f"{number}{models}{'-quick' if args.quick else ''}.json"


def _in_labs(
    names: Sequence[str],
    args: argparse.Namespace,
    work: Callable[[Lab, str], Measured],
    *,
    finds_limits: bool = False,
) -> tuple[list[Row], dict[str, Any], str]:
    rows, raw, told = [], {}, []
    for name in names:
        with _lab(name, args, finds_limits=finds_limits) as lab:
            found, raw[name] = work(lab, name)
            rows += found
            told.append(f"{lab.describe()}{'' if found else '; no side sustained any rate that was tried'}.")
    return rows, raw, " ".join(told)


def _versus(names: Sequence[str], args: argparse.Namespace) -> tuple[list[Row], dict[str, Any], str]:
    return _in_labs(names, args, versus.compare, finds_limits=True)


def _against_batch(names: Sequence[str], args: argparse.Namespace) -> tuple[list[Row], dict[str, Any], str]:
    rows, raw = [], {}
    for name in names:
        with _lab(name, args) as lab:
            setting = lab.subject.pair
            count = 8 if args.quick else 2 * setting.rows * setting.slots
            workload = lab.subject.workload(count, ratio=0.0)
            fleet = lab.rig.experiment("2-stages", setting.devices).fleet
            prompts, length = fleet.prompts(workload), workload.output_len
            ratios = against_batch.measure(
                fleet, setting.plan, prompts, length, in_flight=setting.slots, rounds=lab.extent.rounds
            )
            low, high = interval(ratios)
            rows.append(
                Row(
                    name="all at once: served over time / as a batch",
                    value=statistics.median(ratios),
                    low=low,
                    high=high,
                    n=len(ratios),
                    of="rounds",
                    aim=AIM_BATCH,
                    note=f"{name}; {setting.name}, {count} requests of {workload.input_len} in, {length} out",
                )
            )
            raw[name] = ratios
    return rows, raw, ""


def _order_cost(names: Sequence[str], args: argparse.Namespace) -> tuple[list[Row], dict[str, Any], str]:
    steps, size = (500 if args.quick else 5000), 16
    line = order_cost.start()
    try:
        parts = order_cost.measure([line], size, steps)
    finally:
        line.send(())
    told = list(zip(parts["announce"], parts["wake"], strict=True))
    own = list(zip(parts["decide"], parts["announce"], parts["learn"], strict=True))
    rows = [
        _in_us("order, from the decision until another stage has read it: p90", [sum(one) for one in told], aimed=True),
        _in_us("deciding, telling and learning on the first stage: p90", [sum(one) for one in own], aimed=True),
        *(_in_us(f"{name}: p90", spans, aimed=False) for name, spans in parts.items()),
    ]
    return rows, {}, f"{size} rows, one other stage; {steps} steps, a wait of 1 ms before each."


def _in_us(name: str, spans: Sequence[float], *, aimed: bool) -> Row:
    def p90(values: Sequence[float]) -> float:
        return percentile(values, 0.9)

    low, high = interval([1e6 * one for one in spans], p90)
    return Row(
        name=name,
        value=1e6 * p90(spans),
        low=low,
        high=high,
        n=len(spans),
        of="steps",
        aim=AIM_ORDER_US if aimed else None,
        at_least=False,
        unit="µs",
    )


def _predicted(names: Sequence[str], args: argparse.Namespace) -> tuple[list[Row], dict[str, Any], str]:
    return _in_labs([DUMMY], args, predicted.compare)


def _runs_needed(names: Sequence[str], args: argparse.Namespace) -> tuple[list[Row], dict[str, Any], str]:
    rows, raw = runs_needed.compare(SUBJECTS[DUMMY], DUMMY, quick=args.quick)
    told = (
        f"Simulated with nominal costs; runs differ in speed as noted, guesses are wrong by {runs_needed.GUESS_SD:.0%} "
        "(standard deviations)."
    )
    return rows, raw, told


def _null(names: Sequence[str], args: argparse.Namespace) -> tuple[list[Row], dict[str, Any], str]:
    return _in_labs([DUMMY], args, versus.null)


def _lanes(names: Sequence[str], args: argparse.Namespace) -> tuple[list[Row], dict[str, Any], str]:
    with _lab(DUMMY, args) as lab:
        return lanes.compare(lab, DUMMY)


PARTS: dict[int, tuple[str, Callable[[Sequence[str], argparse.Namespace], tuple[list[Row], dict[str, Any], str]]]] = {
    1: ("highest sustained rate beside continuous batching", _versus),
    2: ("online against the offline schedule, all at once", _against_batch),
    3: ("the cost of an order", _order_cost),
    4: ("predicted against measured", _predicted),
    5: ("runs to find the highest rate", _runs_needed),
    6: ("null: one plan as both sides", _null),
    7: ("lanes, where prompts are of two lengths", _lanes),
}


if __name__ == "__main__":
    sys.exit(main())
