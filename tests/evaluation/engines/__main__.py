"""The command behind `make bench-engines`: measures the landscape of vLLM's plans, searches it, and tells the rest."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.evaluation.harness import ROOT, exit_code_of, put_between_marks, say

if TYPE_CHECKING:
    from tests.evaluation.engines.world import EngineWorld
    from tests.evaluation.search.replay import Curve

FOLDER = ROOT / "results" / "landscapes"
COMMAND = "bench-engines"
SEEDS, BUDGET = 20, 32


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all that was asked for is there, 3 when time ran out before, else the error's own code."""
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation.engines", description=__doc__)
    parser.add_argument("what", choices=WORK)
    parser.add_argument("--python", type=Path, default=Path(os.environ.get("PIPETUNE_VLLM_PYTHON", "python")))
    parser.add_argument("--max-minutes", type=float, default=60.0, help="for measuring")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each comparison")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--docs", type=Path, help="document whose tables are written; by default none is")
    args = parser.parse_args(arguments)
    # As a virtual environment's Python: a link that is not followed.
    args.python, args.folder = args.python.absolute(), args.folder.absolute()
    os.chdir(ROOT)
    return exit_code_of(lambda: WORK[args.what](args))


def _measure(args: argparse.Namespace) -> int:
    from tests.evaluation.engines.grid import SMOLLM2, measure

    folder = args.folder / SMOLLM2.name
    return 0 if measure(SMOLLM2, folder, args.python, timeout_s=60 * args.max_minutes, say=say) else 3


def _search(args: argparse.Namespace) -> int:
    from tests.evaluation.engines.grid import SMOLLM2
    from tests.evaluation.engines.tables import landscape_table, model_table, searches_table
    from tests.evaluation.engines.world import METHODS, EngineWorld
    from tests.evaluation.search.plots import plot_world

    folder = args.folder / SMOLLM2.name
    world = EngineWorld(folder)
    jobs = [(method, seed) for method in METHODS for seed in range(args.seeds)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        curves = list(pool.map(partial(_search_one, folder), jobs, chunksize=2))
    plot_world(world, curves, list(METHODS), args.folder / "plots" / f"{world.name}.png")
    text = "\n\n".join(
        (
            f"{world.about}; {args.seeds} seeds, {BUDGET} runs at most.",
            landscape_table(world),
            searches_table(curves, list(METHODS)),
            model_table(world),
        )
    )
    if args.docs is not None:
        put_between_marks(args.docs, COMMAND, text)
    sys.stdout.write(text + "\n")
    return 0


def _search_one(folder: Path, job: tuple[str, int]) -> Curve:
    from tests.evaluation.engines.world import METHODS, EngineWorld
    from tests.evaluation.search.replay import search

    method, seed = job
    if folder not in _worlds:
        _worlds[folder] = EngineWorld(folder)
    return search(_worlds[folder], method, seed, BUDGET, METHODS)


def _numbers(args: argparse.Namespace) -> int:
    from tests.evaluation.engines import highest_rates, side_by_side

    work = {"watched": side_by_side.watched, "beside": side_by_side.beside_ours, "where": side_by_side.where}
    work["rates"] = highest_rates.compare
    sys.stdout.write(work.get(args.what, side_by_side.numbers)(args.python, args.rounds, say) + "\n")
    return 0


_worlds: dict[Path, EngineWorld] = {}
"""Landscapes that a worker process has read."""

WORK: dict[str, Callable[[argparse.Namespace], int]] = {"measure": _measure, "search": _search, "numbers": _numbers}
WORK |= dict.fromkeys(("watched", "beside", "where", "rates"), _numbers)
"""What can be asked for: the landscape measured; all searches of it; the engine beside its defaults, itself and ours,
the last two by themselves, and where the time of both goes; and the highest rates of requests of both."""


if __name__ == "__main__":
    sys.exit(main())
