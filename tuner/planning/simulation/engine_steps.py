"""The batches that an engine forms step by step, after vLLM's scheduler, and when they run.

A step takes the sequences that run, one new token each or what is left of their prompts, then waiting ones, until
the token budget is spent or as many run as may. As many steps are under way as there are stages; then the oldest one's
tokens are awaited. So where all prompts are given at once batches follow from counts alone, and not from how long
anything takes.
"""

from collections import deque
from collections.abc import Callable, Sequence
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


class _Scheduler:
    """Which sequences each batch of a replica takes, by counts alone."""

    def __init__(
        self, prompt_lens: Sequence[int], output_lens: Sequence[int], *, budget: int, most_rows: int, room: int
    ) -> None:
        self.budget, self.most_rows, self.room = budget, most_rows, room
        self.known, self.done, self.generated = list(prompt_lens), [0] * len(prompt_lens), [0] * len(prompt_lens)
        self.output_lens = output_lens
        self.wanted = [sum(lens) for lens in zip(prompt_lens, output_lens, strict=True)]
        self.waiting, self.running, self.held = deque[int](), list[int](), 0

    def form(self) -> tuple[list[int], int, list[int]]:
        """The next batch, empty where nothing can go on, its tokens, and those of its sequences that it ends with a
        new token."""
        batch: list[int] = []
        left = self.budget
        for one in self.running:
            left -= self._take(one, left, batch)
        while self.waiting and left > 0 and len(self.running) < self.most_rows:
            one = self.waiting[0]
            if self.running and self.held + self.wanted[one] > self.room:
                break
            self.held += self.wanted[one]
            self.running.append(self.waiting.popleft())
            left -= self._take(one, left, batch)
        return batch, self.budget - left, [one for one in batch if self.done[one] == self.known[one]]

    def _take(self, one: int, left: int, batch: list[int]) -> int:
        """Puts what fits of a sequence into the batch; how many tokens that is."""
        new = min(self.known[one] - self.done[one], left)
        if new > 0:
            self.done[one] += new
            batch.append(one)
        return new

    def learn(self, one: int) -> int:
        """Takes a sequence's new token, and lets it go with its last one; how many it has now."""
        self.generated[one] += 1
        self.known[one] += 1
        if self.generated[one] == self.output_lens[one]:
            self.running.remove(one)
            self.held -= self.wanted[one]
        return self.generated[one]


@lru_cache(maxsize=256)
def engine_steps(
    prompt_lens: tuple[int, ...], output_lens: tuple[int, ...], *, budget: int, most_rows: int, room: int, depth: int
) -> EngineSteps:
    """The steps of one replica, `depth` of them under way at once, each of `budget` tokens at most, all together of
    `most_rows` running sequences. One is let into the KV cache's `room` of tokens with all that it will need, and one
    in any case."""
    scheduler = _Scheduler(prompt_lens, output_lens, budget=budget, most_rows=most_rows, room=room)
    scheduler.waiting.extend(range(len(prompt_lens)))
    begins, first_tokens, last_tokens = (np.full(len(prompt_lens), -1, dtype=np.intp) for _ in range(3))
    under_way = deque[tuple[int, list[int]]]()
    steps: list[tuple[int, int, int]] = []
    awaited = 0
    while scheduler.waiting or scheduler.running:
        batch, tokens, sampled = scheduler.form() if len(under_way) < depth else ([], 0, [])
        if batch:
            for one in batch:
                begins[one] = len(steps) if begins[one] < 0 else begins[one]
            under_way.append((len(steps), sampled))
            steps.append((len(batch), tokens, awaited))
            continue
        step, sampled = under_way.popleft()
        awaited += 1
        for one in sampled:
            count = scheduler.learn(one)
            if count == 1:
                first_tokens[one] = step
            if count == output_lens[one]:
                last_tokens[one] = step
    rows, new, awaits = np.array(steps, dtype=np.intp).T
    return EngineSteps(
        rows=rows,
        tokens=new,
        awaits=awaits,
        begins=begins,
        first_tokens=first_tokens,
        last_tokens=last_tokens,
        output_lens=np.array(output_lens, dtype=np.intp),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What one replica made of requests that came over time, all in seconds."""

    first_s: list[float]
    last_s: list[float]
    """When the first and the last token of each request were known."""
    busy_s: list[float]
    """Stage by stage."""


def served_steps(
    requests: Sequence[tuple[float, int, int]],
    step_s: Callable[[int, int], Sequence[float]],
    *,
    budget: int,
    most_rows: int,
    room: int,
    depth: int,
    hop_s: float,
    gap_s: float,
) -> Served:
    """The steps of one replica whose requests come over time, each with its arrival and its lengths, in their order;
    `step_s` tells what a step of so many rows and tokens takes on each stage. A request that comes while the oldest
    step is awaited is seen behind it."""
    at_s, prompt_lens, output_lens = ([*column] for column in zip(*requests, strict=True))
    scheduler = _Scheduler(prompt_lens, output_lens, budget=budget, most_rows=most_rows, room=room)
    coming, under_way = deque(range(len(requests))), deque[tuple[float, list[int]]]()
    first_s, last_s, free_s, busy_s = [0.0] * len(requests), [0.0] * len(requests), [0.0] * depth, [0.0] * depth
    now = 0.0
    while coming or scheduler.waiting or scheduler.running:
        while coming and at_s[coming[0]] <= now:
            scheduler.waiting.append(coming.popleft())
        if not (scheduler.waiting or scheduler.running):
            now = at_s[coming[0]]
            continue
        batch, tokens, sampled = scheduler.form() if len(under_way) < depth else ([], 0, [])
        if batch:
            ready = max(now, free_s[0]) + gap_s
            for stage, took in enumerate(step_s(len(batch), tokens)):
                free_s[stage] = max(ready, free_s[stage]) + took
                busy_s[stage] += took
                ready = free_s[stage] + hop_s
            under_way.append((free_s[-1], sampled))
            continue
        ended_s, sampled = under_way.popleft()
        now = max(now, ended_s)
        for one in sampled:
            if scheduler.learn(one) == 1:
                first_s[one] = now
            last_s[one] = now
    return Served(first_s=first_s, last_s=last_s, busy_s=busy_s)
