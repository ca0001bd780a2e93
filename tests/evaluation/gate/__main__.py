"""The command behind `make bench-gate`: real gates with a known answer, then simulated ones, and both tables.

python -m tests.evaluation.gate --max-minutes 60 --docs docs/performance.md
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.evaluation.gate import power, real_gates
from tests.evaluation.harness import exit_code_of, put_between_marks

COMMAND = "bench-gate"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all gates are there, 3 when time ran out before, else the error's own code."""
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation.gate", description=__doc__)
    parser.add_argument("--max-minutes", type=float, default=180.0, help="for real gates; 0 takes those that are there")
    parser.add_argument("--repetitions", type=int, default=2000, help="simulated gates of a cell and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=real_gates.FOLDER)
    parser.add_argument("--docs", type=Path, help="document whose tables are written; by default none is")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(arguments)
    return exit_code_of(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="pipetune-hooks-") as hooks:
        complete = real_gates.measure(args.folder, Path(hooks), max_minutes=args.max_minutes)
    simulated = power.table(repetitions=args.repetitions, seeds=args.seeds, jobs=args.jobs)
    real = real_gates.table(args.folder) or "No real gate has run yet."
    text = f"Simulated: {simulated}\n\nOn the real thing (raw results in `results/gates`):\n\n{real}"
    if args.docs is not None:
        put_between_marks(args.docs, COMMAND, text)
    sys.stdout.write(f"{text}\n")
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
