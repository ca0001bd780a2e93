"""The command behind `make bench-peers`: which models and workloads, how long, where to; then the table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipetune.bench.errors import ConfigError
from pipetune.bench.machine.hardware import cpu_cores, read_machine
from pipetune.bench.record import Machine
from tests.evaluation.harness import ROOT, around_marks, exit_code_of, put_between_marks, say
from tests.evaluation.peers import store
from tests.evaluation.peers.budget import START_S, Budget, OutOfTimeError
from tests.evaluation.peers.cells import CellRun
from tests.evaluation.peers.compare import SIDES
from tests.evaluation.peers.losses import losses_table
from tests.evaluation.peers.questions import MIN_PAIRS, MODELS, QUICK_PAIRS, WORKLOADS, Question, read_questions
from tests.evaluation.peers.rig import DEVICES, Rig
from tests.evaluation.peers.table import render
from tests.evaluation.peers.values import Cell

COMMAND = "bench-peers"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; 0 if every cell is complete, 3 if time ran out before, else the error's own code."""
    args = _arguments(arguments)
    return exit_code_of(lambda: WORK[args.what](args))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation.peers", description=__doc__)
    parser.add_argument("what", nargs="?", choices=WORK, default="compare")
    parser.add_argument("--quick", action="store_true", help="one model, smaller workloads, 3 rounds: some minutes")
    parser.add_argument(
        "--models", help=f"of {', '.join(MODELS)}, or folders; folders without weights are given random ones"
    )
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument(
        "--workload", help="another one instead: prompts, tokens in and tokens out, as 4x16x4; named custom"
    )
    parser.add_argument("--sides", help=f"only some, of {', '.join(SIDES)}")
    parser.add_argument("--pairs", type=int, help=f"rounds; {MIN_PAIRS}, or {QUICK_PAIRS} with --quick")
    parser.add_argument("--max-minutes", type=float, help="60, or 8 with --quick")
    parser.add_argument("--seed", type=int, default=0, help="of the order within rounds")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "results" / "peers")
    parser.add_argument("--docs", type=Path, help="document whose table is written; with --quick none by default")
    parser.add_argument("--table-only", action="store_true", help="run nothing, write the table of what is there")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of `kernels`")
    parser.add_argument("--repeats", type=int, default=5, help="of `kernels`")
    return parser.parse_args(arguments)


def _compare(args: argparse.Namespace) -> int:
    if cpu_cores() < len(DEVICES):
        raise ConfigError(f"this needs {len(DEVICES)} cores, one a worker, and there is {cpu_cores()}")
    machine = read_machine()
    questions = read_questions(args, machine)
    docs = args.docs or (None if args.quick else ROOT / "docs" / "performance.md")
    if docs is not None:
        around_marks(docs, COMMAND)
    if not args.table_only:
        budget = Budget(60.0 * (args.max_minutes or (8.0 if args.quick else 60.0)))
        _announce(questions, machine, budget)
        # What a cell did not get done in its share of the time goes on when all have had theirs.
        for is_last in (False, True):
            _sweep(questions, machine, args, budget, is_last=is_last)
    kept = [path for path in sorted(args.output.glob("*/*.json")) if path.stem.endswith("-quick") == args.quick]
    paths = dict.fromkeys([*(question.path for question in questions), *kept])
    quoted = args.output / "quoted.json"
    table = render(
        [cell for cell in map(store.read, paths) if cell is not None],
        json.loads(quoted.read_text(encoding="utf-8")) if quoted.exists() and not args.quick else [],
    )
    sys.stdout.write(table)
    if docs is not None:
        put_between_marks(docs, COMMAND, table)
        say(f"the table is in {docs}")
    say(f"the measurements are in {args.output}")
    left = sum(_left(question, machine) for question in questions)
    if left and not args.table_only:
        say(f"not complete: {left} rounds are missing; the same command goes on")
        return 3
    return 0


def _announce(questions: Sequence[Question], machine: Machine, budget: Budget) -> None:
    todo = [question for question in questions if _left(question, machine)]
    estimates = [question.estimate_s() for question in todo]
    total = sum(one or 0.0 for one in estimates) + START_S * len({question.model_name for question in todo})
    about = "an unknown time" if None in estimates else f"about {total / 60:.0f} min if all start afresh"
    say(f"{len(todo)} of {len(questions)} cells to run: {about}, at most {budget.left_s / 60:.0f} min")


def _left(question: Question, machine: Machine) -> int:
    return question.extent.left(store.load(question.path, identity=question.identity, machine=machine))


def _sweep(
    questions: Sequence[Question],
    machine: Machine,
    args: argparse.Namespace,
    budget: Budget,
    *,
    is_last: bool,
) -> None:
    todo = [question for question in questions if _left(question, machine)]
    for name in dict.fromkeys(question.model_name for question in todo):
        of_model = [question for question in todo if question.model_name == name]
        if budget.left_s <= 0:
            return
        with Rig(of_model[0].model, on_start=say) as rig:
            for question in of_model:
                rest = todo[todo.index(question) :]
                weights = [one.estimate_s() or 1.0 for one in rest]
                part = budget.part(1.0 if is_last else weights[0] / sum(weights))
                _fill(question, rig, machine, args, part)


def _fill(question: Question, rig: Rig, machine: Machine, args: argparse.Namespace, budget: Budget) -> None:
    def tell(text: str) -> None:
        say(f"{question.model_name}, {question.workload_name}: {text}")

    cell = store.load(question.path, identity=question.identity, machine=machine)
    if cell is None:
        cell = Cell(
            identity=question.identity,
            model=question.model.model_copy(update={"name": question.model_name}),
            workload_name=question.workload_name,
            workload=question.workload,
            quick=args.quick,
            seed=args.seed,
            machine=machine,
        )
    try:
        CellRun(cell, question.path, rig, extent=question.extent, budget=budget, say=tell).run()
    except OutOfTimeError:
        tell("its time is used up; what was measured is saved")


def _losses(args: argparse.Namespace) -> int:
    sys.stdout.write(losses_table(store.read(path) for path in sorted(args.output.glob("*/*.json"))))
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from tests.evaluation.peers.kernels import print_speeds

    return print_speeds(args.dtype, args.repeats)


WORK: dict[str, Callable[[argparse.Namespace], int]] = {"compare": _compare, "losses": _losses, "kernels": _kernels}
"""What can be asked for: the comparison, what two stages lose by its rounds, or the speed of packed weights."""


if __name__ == "__main__":
    sys.exit(main())
