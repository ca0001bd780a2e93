"""An analytic cost of plans: good for the order in which to try them, never for a claim.

A task is one forward pass of a stage over some rows. Every layer costs

    overhead + bytes / bandwidth + 2 · active parameters · tokens / compute

where the bytes are its weights, read once a task, and the KV cache of its rows. Prefill meets many tokens a task and
is bound by the last term, so pieces may be small; decode meets one token a row and is bound by the middle one, so
its micro-batches want to be large. The head runs on the last stage: on one position a row, or on all of them where
texts are scored.

Rates are nominal. Their ratios decide the order, so they need not be those of the machine; measured stages can
replace them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from bench.memory import ModelShape
from bench.spec import Plan, Workload, device_kind


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second."""

    flops_per_s: float
    bytes_per_s: float
    """Of a layer's weights, at the batch sizes where decode is bound by them."""
    head_bytes_per_s: float
    """Of the head's: one wide matrix is read faster than a layer's many."""
    layer_overhead_s: float
    """What one layer costs however small it is: launches from Python."""
    hop_s: float
    """A message to the next stage."""


RATES = {
    "cpu": Rates(flops_per_s=9e10, bytes_per_s=3e9, head_bytes_per_s=1e10, layer_overhead_s=6e-4, hop_s=1.5e-3),
    "cuda": Rates(flops_per_s=2e14, bytes_per_s=2e12, head_bytes_per_s=2e12, layer_overhead_s=1.5e-4, hop_s=5e-5),
}


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Predicts how long a workload takes under a plan.

    Compilation, CUDA graphs and packed weights speed every plan up alike, as far as this model knows.

    Args:
        prompt_len: mean length of the prompts, tokens.
    """

    shape: ModelShape
    num_prompts: int
    prompt_len: float
    output_len: int
    """Tokens generated for each prompt; 0 where texts are scored."""

    @classmethod
    def of_workload(cls, shape: ModelShape, workload: Workload, prompt_lens: Sequence[int]) -> CostModel:
        """A model for these prompts; `prompt_lens` in tokens."""
        return cls(
            shape=shape,
            num_prompts=workload.num_prompts,
            prompt_len=sum(prompt_lens) / len(prompt_lens),
            output_len=workload.generated_len,
        )

    @cached_property
    def _params_before(self) -> tuple[int, ...]:
        return (0, *itertools.accumulate(layer.active_params for layer in self.shape.layers))

    @cached_property
    def _kv_bytes_before(self) -> tuple[int, ...]:
        return (0, *itertools.accumulate(layer.kv_bytes_per_token for layer in self.shape.layers))

    @cached_property
    def _weight_bytes_before(self) -> dict[float, tuple[float, ...]]:
        return {}

    def _weight_bytes(self, first: int, end: int, tokens: float) -> float:
        """Weights that one task reads: of routed experts no more than its tokens choose."""
        before = self._weight_bytes_before.get(tokens)
        if before is None:
            each = (
                min(layer.weight_bytes, tokens * layer.active_params * self.shape.kept_bytes)
                for layer in self.shape.layers
            )
            before = self._weight_bytes_before[tokens] = (0, *itertools.accumulate(each))
        return before[end] - before[first]

    def task_s(
        self, device: str, first: int, end: int, *, rows: float, tokens_a_row: float, context: float, heads: float = 1.0
    ) -> float:
        """Time of one task of the layers `[first, end)`; the head is counted where `end` is the last layer.

        Args:
            tokens_a_row: new positions of each row: the prompt's or the chunk's in prefill, 1 in decode.
            context: positions whose KV each row reads.
            heads: share of such tasks that need the head: of the chunks of a prompt the last alone.
        """
        rates = RATES[device_kind(device)]
        tokens = rows * tokens_a_row
        params = self._params_before[end] - self._params_before[first]
        kv = self._kv_bytes_before[end] - self._kv_bytes_before[first]
        seconds = (end - first) * rates.layer_overhead_s
        seconds += (self._weight_bytes(first, end, tokens) + rows * context * kv) / rates.bytes_per_s
        seconds += 2 * params * tokens / rates.flops_per_s
        if end == self.shape.num_layers:
            head = self.shape.hidden_size * self.shape.vocab_size
            positions = rows if self.output_len else tokens
            read_s = head * self.shape.kept_bytes / rates.head_bytes_per_s
            seconds += heads * (read_s + 2 * head * positions / rates.flops_per_s)
        return seconds

    def duration_s(self, plan: Plan, in_flight: int | None = None) -> float:
        """Time of the whole workload.

        Prefill is a pipe of pieces, cut by rows and by chunks: the slowest stage sets its beat, the others add their
        fill. Decode goes round the micro-batches in flight: a round takes as long as the slowest stage needs for all
        of them, but no less than one of them needs to pass all stages and come back. Replicas share the prompts out
        and do not disturb each other.

        Args:
            in_flight: micro-batches resident at once in each replica; None means all.
        """
        bounds = [(stage.device, stage.first_layer, stage.end_layer) for stage in plan.stages]
        prompts = math.ceil(self.num_prompts / plan.replicas)
        rows = min(plan.micro_batch_size, prompts)
        prefill_s = self.prefill_s(
            bounds, rows, min(plan.prefill_size, rows), chunk=plan.prefill_chunk_size, prompts=prompts
        )
        return prefill_s + self.decode_s(bounds, rows, in_flight, prompts=prompts)

    def prefill_s(
        self,
        bounds: Sequence[tuple[str, int, int]],
        rows: int,
        piece: int,
        *,
        chunk: int | None = None,
        prompts: int | None = None,
    ) -> float:
        """Time until all prompts are prefilled, in pieces of micro-batches of `rows`.

        Args:
            bounds: stages as `(device, first layer, end layer)`.
            chunk: tokens prefilled at once; None prefills whole prompts.
            prompts: how many; None means all.
        """
        chunks = math.ceil(self.prompt_len / chunk) if chunk else 1
        tasks = (prompts or self.num_prompts) / rows * math.ceil(rows / piece) * chunks
        # Over the chunks of a prompt, as over its tokens, the mean of what is attended to is half of it.
        times = [
            self.task_s(
                *bound,
                rows=piece,
                tokens_a_row=self.prompt_len / chunks,
                context=self.prompt_len / 2,
                heads=1 / chunks if self.output_len else 1.0,
            )
            for bound in bounds
        ]
        hops = sum(RATES[device_kind(device)].hop_s for device, _, _ in bounds[1:])
        return max(tasks - 1, 0.0) * max(times) + sum(times) + hops

    def decode_s(
        self,
        bounds: Sequence[tuple[str, int, int]],
        rows: int,
        in_flight: int | None = None,
        *,
        prompts: int | None = None,
    ) -> float:
        """Time of all decode steps in micro-batches of `rows`; none where texts are scored."""
        micro_batches = math.ceil((prompts or self.num_prompts) / rows)
        resident = min(in_flight or micro_batches, micro_batches)
        context = self.prompt_len + self.output_len / 2
        times = [self.task_s(*bound, rows=rows, tokens_a_row=1, context=context) for bound in bounds]
        hops = sum(RATES[device_kind(device)].hop_s for device, _, _ in bounds) if len(bounds) > 1 else 0.0
        round_s = max(resident * max(times), sum(times) + hops)
        return micro_batches / resident * max(self.output_len - 1, 0) * round_s
