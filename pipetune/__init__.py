"""Finds, by measuring, the best way to split a causal language model over several devices as a pipeline.

The public API is what stands here. `pipetune.bench` measures one plan; `pipetune.tuner` decides what to measure.
"""

from __future__ import annotations

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m` looks first where it is started: a json.py or optuna/ there is the user's own, and comes last.
    sys.path[:] = [*(place for place in sys.path if place != sys.path[0]), sys.path[0]]

import importlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipetune.auto_split import auto_split_model
    from pipetune.bench.fleet.fleet import GenerationResult, ScoreResult
    from pipetune.bench.pipeline import DynamicPipeline, Pipeline
    from pipetune.bench.spec import Lane, ModelSpec, Plan, Sampling, StagePlan

_HOMES = {
    "DynamicPipeline": "bench.pipeline",
    "GenerationResult": "bench.fleet.fleet",
    "Lane": "bench.spec",
    "ModelSpec": "bench.spec",
    "Pipeline": "bench.pipeline",
    "Plan": "bench.spec",
    "Sampling": "bench.spec",
    "ScoreResult": "bench.fleet.fleet",
    "StagePlan": "bench.spec",
    "auto_split_model": "auto_split",
}
__all__ = [
    "DynamicPipeline",
    "GenerationResult",
    "Lane",
    "ModelSpec",
    "Pipeline",
    "Plan",
    "Sampling",
    "ScoreResult",
    "StagePlan",
    "auto_split_model",
]

for _name in ("bench", "tuner"):
    if not Path(__file__).with_name(_name).is_dir():
        raise ImportError(
            f"pipetune/{_name} is a link to ../{_name} and was lost where this tree was copied: "
            f"`ln -sfn ../{_name} pipetune/{_name}` in the checkout makes it anew"
        )


def __getattr__(name: str) -> Any:
    # Loaded when asked for, so that the command line need not wait for it.
    if name in _HOMES:
        try:
            return getattr(importlib.import_module(f"pipetune.{_HOMES[name]}"), name)
        finally:
            if astray := led_astray():
                warnings.warn(astray, RuntimeWarning, stacklevel=2)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def led_astray() -> str | None:
    """Which file Python took for a module of its own, as one beside the script that runs, and what to do; or None."""
    for name in sys.stdlib_module_names & sys.modules.keys():
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.endswith(".py") and not file.startswith((sys.prefix, str(Path(os.__file__).parent))):
            return f"{file} hides Python's own module {name}: rename it"
    return None
