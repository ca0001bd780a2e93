"""The command behind `make bench-search` and `make landscapes`: measure, profile, search, and write the tables."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tests.evaluation.harness import ROOT, exit_code_of, put_between_marks, say
from tests.evaluation.search.questions import MEASURED

if TYPE_CHECKING:
    from tests.evaluation.search.replay import Curve
    from tests.evaluation.search.world import World

FOLDER = ROOT / "results" / "landscapes"
SEEDS, BUDGET = 24, 64
COMMAND = "bench-search"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all that was asked for is there, 3 when time ran out before, else the error's own code."""
    args = _arguments(arguments)
    os.chdir(ROOT)  # models of the landscapes are named from here
    return exit_code_of(lambda: WORK[args.what](args))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation.search", description=__doc__)
    parser.add_argument("what", choices=WORK)
    parser.add_argument("names", nargs="*", help=f"landscapes; of {', '.join(MEASURED)}; none means all")
    parser.add_argument("--max-minutes", type=float, default=120.0, help="for measuring")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--budget", type=int, default=BUDGET, help="trials of a search")
    parser.add_argument("--no-simulated", action="store_true", help="leave the simulated landscapes out")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--docs", type=Path, help="document whose tables are written; by default none is")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.names) - set(MEASURED))
    if unknown:
        parser.error(f"{unknown[0]} is no landscape; there are {', '.join(MEASURED)}")
    args.names = args.names or list(MEASURED)
    args.folder = args.folder.absolute()
    return args


def _measure(args: argparse.Namespace) -> int:
    from tests.evaluation.search.measure import measure_landscape, profile_landscape

    deadline = time.monotonic() + 60 * args.max_minutes
    complete = True
    for name in args.names:
        left_s = deadline - time.monotonic()
        complete &= left_s > 0 and measure_landscape(MEASURED[name], args.folder / name, timeout_s=left_s, say=say)
        if complete and not (args.folder / name / "profile.json").exists():
            profile_landscape(MEASURED[name], args.folder / name, say=say)
    return 0 if complete else 3


def _profile(args: argparse.Namespace) -> int:
    from tests.evaluation.search.measure import profile_landscape

    for name in args.names:
        profile_landscape(MEASURED[name], args.folder / name, say=say)
    return 0


def _search(args: argparse.Namespace) -> int:
    from tests.evaluation.search.methods import METHODS
    from tests.evaluation.search.model_error import error_table
    from tests.evaluation.search.plots import plot_world
    from tests.evaluation.search.simulated import simulated_worlds
    from tests.evaluation.search.table import first_plan_table, judging_table, searches_table
    from tests.evaluation.search.world import MeasuredWorld

    measured = [MeasuredWorld(args.folder / name) for name in args.names]
    worlds: list[World] = [*measured, *([] if args.no_simulated else simulated_worlds())]
    methods = list(METHODS)
    jobs = [
        (args.folder, world.name, world.simulated, method, seed, args.budget)
        for world in worlds
        for method in methods
        if world.auto_counts is not None or "device_map" not in method
        for seed in range(args.seeds)
    ]
    say(f"{len(jobs)} searches of {len(worlds)} landscapes by {len(methods)} methods")
    curves: list[Curve] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for curve in pool.map(_search_one, jobs, chunksize=4):
            curves.append(curve)
            if len(curves) % 100 == 0:
                say(f"{len(curves)} of {len(jobs)}")
    for world in worlds:
        plot_world(world, curves, methods, args.folder / "plots" / f"{world.name}.png")
    text = "\n\n".join(
        (
            f"{args.seeds} seeds, {args.budget} trials at most; landscapes: "
            + "; ".join(f"**{world.name}**: {world.about}" for world in worlds)
            + ".",
            judging_table(measured),
            searches_table(worlds, curves, methods),
            first_plan_table(worlds, curves),
            error_table([(world.name, args.folder / world.name) for world in measured]),
        )
    )
    document = {"schema_version": 1, "curves": [curve.model_dump(mode="json") for curve in curves]}
    with (
        (args.folder / "searches.json.gz").open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file,
    ):
        file.write(json.dumps(document).encode())
    if args.docs is not None:
        put_between_marks(args.docs, COMMAND, text)
    sys.stdout.write(text + "\n")
    return 0


def _search_one(job: tuple[Path, str, bool, str, int, int]) -> Curve:
    from tests.evaluation.search.replay import search
    from tests.evaluation.search.simulated import simulated_worlds
    from tests.evaluation.search.world import MeasuredWorld

    folder, name, simulated, method, seed, budget = job
    if name not in _worlds:
        _worlds[name] = (
            next(world for world in simulated_worlds() if world.name == name)
            if simulated
            else MeasuredWorld(folder / name)
        )
    return search(_worlds[name], method, seed, budget)


def _memory(args: argparse.Namespace) -> int:
    from tests.evaluation.search.landscape import LandscapeFolder
    from tests.evaluation.search.memory_error import describe, memory_errors

    for name in args.names:
        folder = LandscapeFolder(args.folder / name)
        sys.stdout.write(f"{name}\n\n{describe(memory_errors(folder.read().shape, folder.records()))}\n\n")
    return 0


def _model(args: argparse.Namespace) -> int:
    from tests.evaluation.search.model_error import error_table

    sys.stdout.write(error_table([(name, args.folder / name) for name in args.names]) + "\n")
    return 0


_worlds: dict[str, World] = {}
"""Landscapes that a worker process has read."""

WORK: dict[str, Callable[[argparse.Namespace], int]] = {
    "measure": _measure,
    "profile": _profile,
    "search": _search,
    "model": _model,
    "memory": _memory,
}
"""What can be asked for: landscapes measured, their profiles, all searches; or the cost model's errors alone."""


if __name__ == "__main__":
    sys.exit(main())
