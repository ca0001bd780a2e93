"""The batches that an engine forms step by step from prompts given at once, after vLLM's scheduler, and when they run.

A step takes the sequences that run, one new token each or what is left of their prompts, then waiting ones, until
the token budget is spent or as many run as may. As many steps are under way as there are stages; then the oldest one's
tokens are awaited. So batches follow from counts alone, and not from how long anything takes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.simulation.schedule import Indices, PromptTasks, Timeline


@dataclass(frozen=True, eq=False, slots=True)
class EngineSteps(PromptTasks):
    """What one replica of an engine works through, a step being a task."""

    rows: Indices
    tokens: Indices
    """`[step]`, sequences, and new tokens of all of them."""
    awaits: Indices
    """`[step]`, how many steps' tokens were known when it was formed."""

    def timeline(self, busy_s: Floats, hop_s: Floats, gap_s: float) -> Timeline:
        """When the steps run on many plans of equally many stages: they compute for `busy_s[step, stage, plan]`,
        sampling at the last stage included, begin on the next stage `hop_s[stage - 1]` after their end on one, and on
        the first `gap_s` after known tokens, or a free first stage, let them be formed."""
        _, stages, plans = busy_s.shape
        free, began = np.zeros((stages, plans)), np.zeros((stages, plans))
        first_starts, last_ends = np.empty((len(busy_s), plans)), np.zeros((len(busy_s) + 1, plans))
        for step, busy in enumerate(busy_s):
            ready = np.maximum(last_ends[self.awaits[step]], free[0]) + gap_s
            for stage in range(stages):
                start = np.maximum(ready, free[stage])
                if stage == 0:
                    first_starts[step] = start
                if step == 0:
                    began[stage] = start
                free[stage] = start + busy[stage]
                ready = free[stage] + (hop_s[stage] if stage < stages - 1 else 0.0)
            last_ends[step + 1] = free[-1]
        return Timeline(first_starts_s=first_starts, last_ends_s=last_ends[1:], began_s=began, ended_s=free)


@lru_cache(maxsize=256)
def engine_steps(
    prompt_lens: tuple[int, ...], output_lens: tuple[int, ...], *, budget: int, most_rows: int, room: int, depth: int
) -> EngineSteps:
    """The steps of one replica, `depth` of them under way at once, each of `budget` tokens at most, all together of
    `most_rows` running sequences. One is let into the KV cache's `room` of tokens with all that it will need, and one
    in any case."""
    count = len(prompt_lens)
    known, done, generated = list(prompt_lens), [0] * count, [0] * count
    begins, first_tokens, last_tokens = (np.full(count, -1, dtype=np.intp) for _ in range(3))
    waiting, under_way = deque(range(count)), deque[tuple[int, list[int]]]()
    running: list[int] = []
    steps: list[tuple[int, int, int]] = []
    wanted = [sum(lens) for lens in zip(prompt_lens, output_lens, strict=True)]
    awaited = held = 0
    while waiting or running:
        batch: list[int] = []
        left = budget
        if len(under_way) < depth:
            for one in running:
                left -= _take(one, left, known, done, batch)
            while waiting and left > 0 and len(running) < most_rows:
                one = waiting[0]
                if running and held + wanted[one] > room:
                    break
                held += wanted[one]
                begins[one] = len(steps)
                running.append(waiting.popleft())
                left -= _take(one, left, known, done, batch)
        if batch:
            under_way.append((len(steps), [one for one in batch if done[one] == known[one]]))
            steps.append((len(batch), budget - left, awaited))
            continue
        step, sampled = under_way.popleft()
        awaited += 1
        for one in sampled:
            generated[one] += 1
            known[one] += 1
            if generated[one] == 1:
                first_tokens[one] = step
            if generated[one] == output_lens[one]:
                last_tokens[one] = step
                running.remove(one)
                held -= wanted[one]
    rows, tokens, awaits = np.array(steps, dtype=np.intp).T
    return EngineSteps(
        rows=rows,
        tokens=tokens,
        awaits=awaits,
        begins=begins,
        first_tokens=first_tokens,
        last_tokens=last_tokens,
        output_lens=np.array(output_lens, dtype=np.intp),
    )


def _take(one: int, left: int, known: Sequence[int], done: list[int], batch: list[int]) -> int:
    """Puts what fits of a sequence into the batch; how many tokens that is."""
    new = min(known[one] - done[one], left)
    if new > 0:
        done[one] += new
        batch.append(one)
    return new
