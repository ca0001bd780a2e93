"""The public way to use a plan: `with Pipeline.start(model, plan) as pipeline: pipeline.generate(prompts, …)`."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

from pipetune.bench.errors import FleetError, PlanError
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import Closing, Fleet, GenerationResult, Progress, RequestQueue, ScoreResult
from pipetune.bench.memory import check_plan
from pipetune.bench.prompts.forms import Prompts
from pipetune.bench.record import TRANSIENT
from pipetune.bench.spec import Lane, ModelSpec, Plan, Sampling, device_kind

_T = TypeVar("_T")


class Pipeline(Closing):
    """A model split over devices as a plan says, ready to generate and to score.

    Example:
        >>> plan = Plan.from_layer_counts((17, 13), ("cpu:0", "cpu:1"), micro_batch_size=8)
        >>> with Pipeline.start("smollm2-135m", plan) as pipeline:
        ...     results = pipeline.generate(["The capital of France is"], max_new_tokens=8)
    """

    def __init__(self, start: Callable[[Plan], Fleet], plan: Plan) -> None:
        self._start, self._fleet = start, start(plan)
        self.plan = plan
        """Another one than it was started with once a device was lost for good."""

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

        The model is a spec, or a name alone: an HF id, a local folder, or `smollm2-135m`; on GPUs in the checkpoint's
        own dtype, else in float32. The workers' logs go to `log_dir`, by default a temporary folder. ModelError where
        the model cannot be found, read or split; PlanError where the plan does not cover it; FleetError for workers
        that do not start.
        """
        if isinstance(model, str):
            on_gpus = all(device_kind(device) == "cuda" for device in plan.devices)
            model = ModelSpec(name=model, dtype="auto") if on_gpus else ModelSpec(name=model)
        spec = model

        def start(plan: Plan) -> Fleet:
            experiment = Experiment.start(spec, plan.devices, exclusive=False, log_dir=log_dir, on_progress=on_progress)
            try:
                check_plan(experiment.fleet.shape, plan)
            except PlanError:
                experiment.close()
                raise
            return experiment.fleet

        return cls(start, plan)

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int | Sequence[int],
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
    ) -> tuple[GenerationResult, ...]:
        """Generates for every prompt, in the order given, at most `max_new_tokens`, for all or for each.

        Prompts are one or several, each as text (where the model has a tokenizer) or as a list of token ids; arrays and
        tensors of ids that are not padded will do. `ignore_eos` goes on after an end-of-sequence token, as measurements
        do. `sampling` draws tokens, the same for every plan: draws depend on the seed and on the prompt's place among
        the prompts. None takes the likeliest token.

        TypeError for something else than prompts; ConfigError for prompts that cannot be used; PlanError where not even
        one micro-batch fits under the plan's memory caps; FleetError where the workers failed; the next call starts
        them again. A worker that died, hung or was cut off costs a warning and the time to run the prompts again, with
        the same tokens: on the same devices, then without the one that was lost twice, until none is left.
        """
        return self._surviving(
            lambda: self._fleet.generate(
                self.plan, prompts, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos, sampling=sampling
            )
        )

    def score(self, texts: Prompts) -> tuple[ScoreResult, ...]:
        """Log-probabilities of the tokens of given texts, each under those before it, in the order given. Texts are
        given as prompts are to `generate`, and it raises what that does."""
        return self._surviving(lambda: self._fleet.score(self.plan, texts))

    def open_queue(self, *, max_len: int | None = None, sampling: Sampling | None = None) -> RequestQueue:
        """A queue for requests that are served as they are given, each by its lane, and join and leave micro-batches as
        they go.

        Until it is closed the pipeline does nothing else. Requests of workers that were lost are not run again.
        `max_len` counts tokens of the longest prompt with its output, by default the model's positions, at most 2048.
        `sampling` draws tokens by the order in which requests are given; None takes the likeliest token. PlanError
        where the plan cannot be run so, or has no room for it; FleetError where the workers failed.
        """
        return self._fleet.open_queue(self.plan, max_len=max_len, sampling=sampling)

    def _surviving(self, work: Callable[[], _T]) -> _T:
        """What the work gives, done again where workers were lost."""
        lost: Counter[str | None] = Counter()
        while True:
            try:
                return work()
            except FleetError as error:
                if error.failure.kind not in TRANSIENT:
                    raise
                device = error.failure.lost_device
                lost[device] += 1
                if lost[device] == 1:
                    warnings.warn(f"{error}; the prompts are run again", RuntimeWarning, stacklevel=3)
                    continue
                left = self.plan.without(device) if device is not None else None
                if left is None:
                    raise
                told = f"{device} was lost twice; the prompts are run again without it, by {left.describe()}"
                warnings.warn(told, RuntimeWarning, stacklevel=3)
                self._fleet.close()
                self._fleet, self.plan = self._start(left), left

    def close(self) -> None:
        """Ends the workers."""
        self._fleet.close()


class DynamicPipeline:
    """A pipeline whose plan has lanes by the length of prompts: what changes with that, no weight moves for.

    Example:
        >>> lanes = (Lane(up_to_tokens=64, weight=4), Lane(prefill_chunk_size=64))
        >>> with Pipeline.start("smollm2-135m", plan.model_copy(update={"lanes": lanes})) as pipeline:
        ...     lane = DynamicPipeline(pipeline).adjust_pipeline(input_length=512)
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def adjust_pipeline(self, input_length: int) -> Lane:
        """The lane for prompts of so many tokens: requests of `open_queue` take theirs by themselves."""
        return self.pipeline.plan.lane_of(input_length)
