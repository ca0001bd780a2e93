"""What a plan comes to under the memory caps, and when two plans are one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pipetune.bench import memory
from pipetune.bench.memory import ModelShape, StageBytes
from pipetune.bench.record import Failure
from pipetune.bench.spec import EffectivePlan, Plan, Workload
from pipetune.tuner.planning.arrays import remembered


@dataclass(frozen=True, kw_only=True)
class Resolver:
    """Tells what a plan comes to under the memory caps of these devices."""

    shape: ModelShape
    num_prompts: int
    prompt_len: int
    """Longest prompt, tokens."""
    output_len: int
    """Tokens generated for each prompt; 0 where texts are scored."""
    device_bytes: dict[str, int]
    under_arrivals: bool = False

    @classmethod
    def of_workload(
        cls, shape: ModelShape, workload: Workload, prompt_lens: Sequence[int], device_bytes: dict[str, int], **own: Any
    ) -> Self:
        """A resolver for these prompts; `prompt_lens` in tokens, `own` what this kind of resolver has besides."""
        return cls(
            shape=shape,
            num_prompts=workload.num_prompts,
            prompt_len=max(prompt_lens),
            output_len=workload.generated_len,
            device_bytes=device_bytes,
            under_arrivals=workload.arrivals is not None,
            **own,
        )

    @remembered
    def __call__(self, plan: Plan) -> EffectivePlan | Failure:
        """The plan as it fits into memory, or why it does not; each plan is resolved once."""
        lens = {"prompt_len": self.prompt_len, "output_len": self.output_len}
        if self.under_arrivals:
            return memory.resolve_slots(self.shape, plan, **lens, device_bytes=self.device_bytes)
        return memory.resolve(self.shape, plan, num_prompts=self.num_prompts, **lens, device_bytes=self.device_bytes)

    @remembered
    def needed_bytes(self, effective: EffectivePlan) -> dict[str, int]:
        """What the plan is accounted to need on each of its devices; each plan is accounted once."""
        needed: dict[str, int] = {}
        for replica in range(effective.plan.replicas):
            plan = effective.plan.replica(replica)
            for index, stage in enumerate(plan.stages):
                need = self.stage_bytes(plan, index).total(effective.in_flight)
                needed[stage.device] = needed.get(stage.device, 0) + need
        return needed

    def stage_bytes(self, plan: Plan, index: int) -> StageBytes:
        """What one stage of a single pipeline is accounted to need."""
        return memory.stage_bytes(self.shape, plan, index, prompt_len=self.prompt_len, output_len=self.output_len)


def identity(plan: Plan, resolved: EffectivePlan | Failure) -> str:
    """A text that is equal for plans that would run the same way."""
    return resolved.key if isinstance(resolved, EffectivePlan) else f"refused {plan.digest()}"


def overrun(failure: Failure) -> float:
    """How far over its memory a plan is, as a share of what there was; 1 where nobody knows."""
    if failure.bytes_wanted is None or not failure.bytes_had:
        return 1.0
    return max(failure.bytes_wanted / failure.bytes_had - 1.0, 0.01)
