"""Worth of the plan recommended against runs, a line for each method, a plot for each landscape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipetune.tuner.report.render.plot import (
    BLUE,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    SKY,
    VERMILION,
    new_figure,
    to_png,
)
from tests.evaluation.search.methods import OURS
from tests.evaluation.search.replay import Curve
from tests.evaluation.search.world import World

_COLOURS = (BLUE, VERMILION, ORANGE, GREY, SKY, GREEN)
_BANDS = (OURS, "TPE, default")
_TRIALS, _SHARES = (1, 2, 4, 8, 16, 32, 64), (0, 1, 2, 5, 10, 20, 50)


def plot_world(world: World, curves: Sequence[Curve], methods: Sequence[str], path: Path) -> None:
    """Medians over seeds; of two methods also the range from the tenth to the ninetieth percentile.

    A search that ended stays where it was. Distances are drawn to scale up to 2 %, and by their logarithm beyond.
    """
    title = f"{world.name}{' (simulated)' if world.simulated else ''}: how far behind the best plan"
    figure, axes = new_figure(title, LIGHT, size=(8.0, 4.8))
    most = max(len(curve.scores) for curve in curves if curve.world == world.name)
    trials = np.arange(1, most + 1)
    for colour, method in zip(_COLOURS, methods, strict=False):
        own = [curve for curve in curves if curve.world == world.name and curve.method == method]
        if not own:
            continue
        level = np.array([[*curve.scores, *[curve.scores[-1]] * (most - len(curve.scores))] for curve in own])
        low, middle, high = np.maximum(np.percentile(100 * (1 - level), [10, 50, 90], axis=0), 0.0)
        axes.step(trials, middle, where="post", color=colour, label=method, linewidth=2.4 if method == OURS else 1.5)
        if method in _BANDS:
            axes.fill_between(trials, low, high, step="post", color=colour, alpha=0.13, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=2.0, linscale=0.8)
    axes.set_xticks(_TRIALS, [str(count) for count in _TRIALS])
    axes.set_yticks(_SHARES, [f"{share} %" for share in _SHARES])
    axes.minorticks_off()
    axes.set_xlim(1, most)
    axes.set_ylim(0, 70)
    axes.set_xlabel("runs")
    axes.set_ylabel("behind the best plan")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, labelcolor=LIGHT.ink, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(figure))
