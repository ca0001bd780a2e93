"""Best so far against trials, a line for each method, a plot for each landscape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from tuner.proof.replay import Curve
from tuner.proof.world import World

mpl.use("agg")
_COLOURS = ("#0b6e4f", "#c1440e", "#e0a030", "#777777", "#3b6fb6", "#8e5ea2")


def plot_world(world: World, curves: Sequence[Curve], methods: Sequence[str], path: Path) -> None:
    """Medians over seeds with the range from the tenth to the ninetieth percentile; ends of searches stay level."""
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.subplots()
    most = max(len(curve.scores) for curve in curves if curve.world == world.name)
    for colour, method in zip(_COLOURS, methods, strict=False):
        own = [curve for curve in curves if curve.world == world.name and curve.method == method]
        if not own:
            continue
        level = np.array([[*curve.scores, *[curve.scores[-1]] * (most - len(curve.scores))] for curve in own])
        trials = np.arange(1, most + 1)
        low, middle, high = np.percentile(100 * (1 - level), [10, 50, 90], axis=0)
        axes.plot(trials, np.maximum(middle, 0.05), color=colour, label=method, linewidth=1.8)
        axes.fill_between(trials, np.maximum(low, 0.05), np.maximum(high, 0.05), color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [str(count) for count in (1, 2, 4, 8, 16, 32, 64)])
    axes.set_yticks([0.1, 0.5, 1, 2, 5, 10, 20, 50], ["0.1 %", "0.5 %", "1 %", "2 %", "5 %", "10 %", "20 %", "50 %"])
    axes.set_ylim(0.05, None)
    for worth in (1, 2):
        axes.axhline(worth, color="#bbbbbb", linewidth=0.8, linestyle=":")
    axes.set_xlabel("trials")
    axes.set_ylabel("below the best plan")
    title = world.name + (" (simulated)" if world.simulated else "")
    axes.set_title(title, parse_math=False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
