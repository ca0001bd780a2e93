"""The section `gate` of a config: the metrics that are compared, and how much worse each may become."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipetune.bench.metrics import metric_names
from pipetune.bench.spec import Value

SHORT_NAMES = {
    "ttft": "mean_ttft_ms",
    "tpot": "mean_tpot_ms",
    "e2el": "mean_e2el_ms",
    "peak_memory": "peak_memory_bytes",
}
"""Names that a gate understands beside those of `bench.metrics`."""


def full_name(metric: str) -> str:
    """The metric's name in records; ValueError where no run of any size yields such a metric."""
    name = SHORT_NAMES.get(metric, metric)
    known = metric_names(10**6, 2, gpu=True, goodput=True, arrivals=True, rates=True)
    if name not in known:
        raise ValueError(f"{metric!r} is no metric; there are {', '.join((*SHORT_NAMES, *known))}")
    return name


class Tolerance(Value):
    """How much worse a metric may become."""

    margin: float = Field(default=0.05, gt=0.0, lt=1.0)
    """OK means: surely not worse by so large a share."""
    least_effect: float = Field(default=0.02, ge=0.0, lt=1.0)
    """A difference below this share never fails, however sure it is; by default no more than the margin."""

    @model_validator(mode="before")
    @classmethod
    def _least_effect_follows(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "least_effect" in values:
            return values
        margin = values.get("margin")
        return values if not isinstance(margin, (int, float)) else {**values, "least_effect": min(0.02, margin)}

    @model_validator(mode="after")
    def _nothing_lies_between(self) -> Self:
        if self.least_effect > self.margin:
            raise ValueError(
                f"least_effect={self.least_effect} is above margin={self.margin}: what lies between could neither fail "
                "nor pass"
            )
        return self


Metrics = dict[Annotated[str, AfterValidator(full_name)], Tolerance]


class GateConfig(Value):
    """The section `gate` of a config."""

    metrics: Metrics = Field(
        default_factory=lambda: dict.fromkeys(
            ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "peak_memory_bytes"), Tolerance()
        )
    )
    """What is compared, and how much worse each may become; those that the workload does not yield by itself (TTFT
    where texts are scored) are left out of the default, and are an error where they are named."""
    noise_floor: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Differences that this machine is known to show between equal sides, beyond what the pairs themselves show."""
    session_noise: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Noise between stored sessions: by how much one session differs from another on this machine (SD of their levels'
    logarithms), used where one session alone is stored. Without it, one session decides nothing."""

    @field_validator("metrics")
    @classmethod
    def _something_is_compared(cls, metrics: Metrics) -> Metrics:
        if not metrics:
            raise ValueError("name one at least, or leave the key out to compare the usual ones")
        return metrics
