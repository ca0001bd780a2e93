"""The public way to use a plan: `with Pipeline.start(model, plan) as pipeline: pipeline.generate(prompts, …)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from pipetune.bench.errors import PlanError
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import Closing, Fleet, GenerationResult, Progress, ScoreResult
from pipetune.bench.memory import check_plan
from pipetune.bench.spec import ModelSpec, Plan, Sampling


class Pipeline(Closing):
    """A model split over devices as a plan says, ready to generate and to score.

    Example:
        >>> plan = Plan.from_layer_counts((17, 13), ("cpu:0", "cpu:1"), micro_batch_size=8)
        >>> with Pipeline.start("smollm2-135m", plan) as pipeline:
        ...     results = pipeline.generate(["The capital of France is"], max_new_tokens=8)
    """

    def __init__(self, fleet: Fleet, plan: Plan) -> None:
        self._fleet = fleet
        self.plan = plan

    @classmethod
    def start(
        cls,
        model: ModelSpec | str,
        plan: Plan,
        *,
        log_dir: Path | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Self:
        """Starts a worker for each stage of the plan.

        Args:
            model: a spec, or a name alone: an HF id, a local folder, or `smollm2-135m`.
            log_dir: where the workers' logs go; by default a temporary folder.

        Raises:
            ModelError: the model cannot be found, read or split.
            PlanError: the plan does not cover the model.
            FleetError: workers that do not start.
        """
        spec = ModelSpec(name=model) if isinstance(model, str) else model
        fleet = Experiment.start(spec, plan.devices, exclusive=False, log_dir=log_dir, on_progress=on_progress).fleet
        try:
            check_plan(fleet.shape, plan)
        except PlanError:
            fleet.close()
            raise
        return cls(fleet, plan)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
    ) -> tuple[GenerationResult, ...]:
        """Generates for every prompt, in the order given.

        Args:
            prompts: strings (where the model has a tokenizer), or lists of token ids.
            max_new_tokens: the most tokens to generate for a prompt.
            ignore_eos: go on after an end-of-sequence token, as measurements do.
            sampling: how tokens are drawn, the same for every plan: draws depend on the seed and on the prompt's place
                among the prompts. None takes the likeliest token.

        Raises:
            ConfigError: prompts that cannot be used.
            PlanError: not even one micro-batch fits under the plan's memory caps.
            FleetError: the workers failed; the next call starts them again.
        """
        return self._fleet.generate(
            self.plan,
            prompts,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            sampling=sampling,
        )

    def score(self, texts: Sequence[str | Sequence[int]]) -> tuple[ScoreResult, ...]:
        """Log-probabilities of the tokens of given texts, each under those before it, in the order given.

        Args:
            texts: strings (where the model has a tokenizer), or lists of token ids.

        Raises:
            ConfigError: texts that cannot be used.
            PlanError: not even one micro-batch fits under the plan's memory caps.
            FleetError: the workers failed; the next call starts them again.
        """
        return self._fleet.score(self.plan, texts)

    def close(self) -> None:
        """Ends the workers."""
        self._fleet.close()
