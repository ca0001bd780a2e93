"""What a study asks for: objectives to make better and constraints to keep, parsed from text and checked by name."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from bench.errors import ConfigError
from bench.metrics import HIGHER_IS_BETTER, PERCENTILES, metric_names, samples_needed
from bench.spec import Value

_CONSTRAINT = re.compile(r"\s*([A-Za-z0-9_]+)\s*(<=|>=)\s*(\S+)\s*")


class Objective(Value):
    """One metric to make better."""

    metric: str

    @property
    def higher_is_better(self) -> bool:
        return self.metric in HIGHER_IS_BETTER

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """As Optuna spells it."""
        return "maximize" if self.higher_is_better else "minimize"

    def cost(self, value: float) -> float:
        """The value turned so that less is better."""
        return -value if self.higher_is_better else value

    def gain(self, ours: float, theirs: float) -> float | None:
        """How many times better `ours` is than `theirs`; None where a zero or a sign makes that meaningless."""
        over, under = (ours, theirs) if self.higher_is_better else (theirs, ours)
        return over / under if over > 0 and under > 0 else None

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        place: str = "objective",
        num_prompts: int | None = None,
        output_len: int | None = None,
        gpu: bool = True,
    ) -> Self:
        """Reads a metric's name.

        Args:
            text: such as `output_throughput` or `p90_ttft_ms`.
            place: where the text stood, for the message: a flag or a key.
            num_prompts: of the workload; percentiles that it cannot yield are refused. None takes any name.
            output_len: of the workload, tokens.
            gpu: whether GPU sensors will be there.

        Raises:
            ConfigError: no such metric, or none that this workload yields.
        """
        name = text.strip()
        check_metric(name, place=place, num_prompts=num_prompts, output_len=output_len, gpu=gpu)
        return cls(metric=name)

    def __str__(self) -> str:
        return self.metric


class Constraint(Value):
    """A limit that a measured metric must keep."""

    metric: str
    operator: Literal["<=", ">="]
    limit: float

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        place: str = "constraint",
        num_prompts: int | None = None,
        output_len: int | None = None,
        gpu: bool = True,
    ) -> Self:
        """Reads `p90_ttft_ms<=500`; arguments as `Objective.parse`.

        Raises:
            ConfigError: not of that form, the limit is no finite number, or the metric is not to be had.
        """
        match = _CONSTRAINT.fullmatch(text)
        if not match:
            raise ConfigError(f"{place}: {text!r} is not a constraint; write METRIC<=NUMBER or METRIC>=NUMBER")
        metric, operator, number = match.groups()
        check_metric(metric, place=place, num_prompts=num_prompts, output_len=output_len, gpu=gpu)
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not math.isfinite(limit):
            raise ConfigError(f"{place}: the limit {number!r} in {text!r} is not a number; write {metric}{operator}500")
        return cls.model_validate({"metric": metric, "operator": operator, "limit": limit})

    def violation(self, value: float) -> float:
        """Graded distance from the limit as a share of it: above 0 when broken, otherwise at or below 0."""
        scale = abs(self.limit) or 1.0
        return (value - self.limit) / scale if self.operator == "<=" else (self.limit - value) / scale

    def why_broken(self, values: Mapping[str, float]) -> str | None:
        """None when the values keep the constraint, else why not; a metric that was not measured keeps nothing."""
        if self.metric not in values:
            return f"{self.metric} was not measured"
        value = values[self.metric]
        return (
            None if self.violation(value) <= 0 else f"{self.metric} is {value:.4g}, not {self.operator} {self.limit:g}"
        )

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.limit:g}"


def check_metric(
    name: str, *, place: str, num_prompts: int | None = None, output_len: int | None = None, gpu: bool = True
) -> None:
    """Refuses a metric that does not exist or that the workload cannot yield; arguments as `Objective.parse`.

    Raises:
        ConfigError: says the nearest names, or what the workload lacks.
    """
    every = metric_names(sys.maxsize, sys.maxsize, gpu=True)
    if name not in every:
        raise ConfigError(f"{place}: no metric is called {name!r}; {_nearest(name, every)}")
    num_prompts = sys.maxsize if num_prompts is None else num_prompts
    output_len = sys.maxsize if output_len is None else output_len
    if name in metric_names(num_prompts, output_len, gpu=gpu):
        return
    if name not in metric_names(sys.maxsize, sys.maxsize, gpu=gpu):
        raise ConfigError(f"{place}: {name} needs a GPU's sensors, and the devices are CPU workers")
    if name not in metric_names(sys.maxsize, output_len, gpu=gpu):
        raise ConfigError(f"{place}: {name} needs an output of 2 tokens at least, and output_len is {output_len}")
    needed = samples_needed(PERCENTILES[name.partition("_")[0]])
    raise ConfigError(
        f"{place}: {name} needs {needed} prompts at least and the workload has {num_prompts}; "
        f"take more prompts, or mean_{name.partition('_')[2]}"
    )


def _nearest(name: str, every: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, every, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(every)}"
