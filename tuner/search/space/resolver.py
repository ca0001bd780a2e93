"""What a plan comes to under the memory caps, and when two plans are one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from pipetune.bench import memory
from pipetune.bench.memory import ModelShape, StageBytes
from pipetune.bench.record import Failure
from pipetune.bench.spec import EffectivePlan, Plan, Workload


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
    _known: dict[Plan, EffectivePlan | Failure] = field(default_factory=dict, compare=False)
    _needed: dict[str, dict[str, int]] = field(default_factory=dict, compare=False)

    @classmethod
    def of_workload(
        cls, shape: ModelShape, workload: Workload, prompt_lens: Sequence[int], device_bytes: dict[str, int]
    ) -> Self:
        """A resolver for these prompts; `prompt_lens` in tokens."""
        return cls(
            shape=shape,
            num_prompts=workload.num_prompts,
            prompt_len=max(prompt_lens),
            output_len=workload.generated_len,
            device_bytes=device_bytes,
            under_arrivals=workload.arrivals is not None,
        )

    def __call__(self, plan: Plan) -> EffectivePlan | Failure:
        """The plan as it fits into memory, or why it does not; each plan is resolved once."""
        if plan not in self._known:
            lens = {"prompt_len": self.prompt_len, "output_len": self.output_len}
            if self.under_arrivals:
                known = memory.resolve_slots(self.shape, plan, **lens, device_bytes=self.device_bytes)
            else:
                known = memory.resolve(
                    self.shape, plan, num_prompts=self.num_prompts, **lens, device_bytes=self.device_bytes
                )
            self._known[plan] = known
        return self._known[plan]

    def needed_bytes(self, effective: EffectivePlan) -> dict[str, int]:
        """What the plan is accounted to need on each of its devices; each plan is accounted once."""
        if effective.key in self._needed:
            return self._needed[effective.key]
        needed = self._needed[effective.key] = {}
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
