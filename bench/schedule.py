"""The pipeline's schedule: one pure function from sizes to the order in which every stage works.

Every stage runs the same tasks in the same order, each as soon as its input is there. A task is one
prefill micro-batch or one decode step of a micro-batch. Two stages, three micro-batches (`m`), two tokens:

    stage 0  m0.0 m1.0 m2.0 m0.1 m1.1 m2.1
    stage 1       m0.0 m1.0 m2.0 m0.1 m1.1 m2.1

`m0.1` on stage 0 needs the token that stage 1 sampled in `m0.0`: while at least as many micro-batches
are in flight as there are stages, it is there in time, and no stage waits.

Prefill may be cut by rows, into prefill micro-batches, and by tokens, into chunks whose KV is kept: a chunk needs the
one before it on its own stage alone, so that a single long prompt fills the stages as well as many short ones do.

With fewer slots than micro-batches a finished micro-batch hands its slot to the next that waits, in
the middle of a round, so that the pipeline never drains in between.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One forward pass of a stage.

    Step 0 is prefill, for the rows `[first_row, end_row)` of the micro-batch and the positions
    `[first_token, end_token)` of its padded prompts; step t > 0 decodes token t for all rows.
    `slot` is the KV slot that the micro-batch occupies.
    """

    micro_batch: int
    step: int
    slot: int
    first_row: int
    end_row: int
    first_token: int
    end_token: int
    samples: bool
    """Whether tokens come of it: not of a chunk of the prompt that is not the last."""

    @property
    def is_prefill(self) -> bool:
        """Whether it works on the prompts."""
        return self.step == 0

    @property
    def num_rows(self) -> int:
        """Sequences worked on."""
        return self.end_row - self.first_row

    @property
    def num_tokens(self) -> int:
        """Positions of each row."""
        return self.end_token - self.first_token


def micro_batch_sizes(num_prompts: int, micro_batch_size: int) -> tuple[int, ...]:
    """Sizes of the micro-batches: all full but perhaps the last."""
    full, rest = divmod(num_prompts, micro_batch_size)
    return (micro_batch_size,) * full + ((rest,) if rest else ())


def build_schedule(
    sizes: Sequence[int],
    *,
    prompt_lens: Sequence[int],
    output_len: int | Sequence[int],
    in_flight: int,
    prefill_size: int | None = None,
    chunk_size: int | None = None,
) -> tuple[Task, ...]:
    """The order in which every stage works: each micro-batch has its prefill first, one prefill micro-batch after the
    other and in each chunk by chunk, then a step for each further token.

    `sizes` are rows of each micro-batch, `prompt_lens` tokens of each one's padded prompts, `output_len` the most
    tokens to generate for a row, of all micro-batches or of each, at least 1; the first comes from prefill. `in_flight`
    micro-batches are resident at once, which is the number of KV slots. `prefill_size` rows are prefilled together,
    None: a micro-batch at once; so are `chunk_size` tokens of a prompt, None: whole prompts. ValueError where a size, a
    length or the number in flight is below 1.
    """
    steps = (output_len,) * len(sizes) if isinstance(output_len, int) else output_len
    if in_flight < 1 or any(size < 1 for size in (*sizes, *prompt_lens, *steps)):
        raise ValueError(
            f"sizes={tuple(sizes)}, prompt_lens={tuple(prompt_lens)}, output_len={output_len}, "
            f"in_flight={in_flight}: all must be ≥ 1"
        )
    if (prefill_size is not None and prefill_size < 1) or (chunk_size is not None and chunk_size < 1):
        raise ValueError(f"prefill_size={prefill_size}, chunk_size={chunk_size}: both must be ≥ 1")
    waiting = deque(range(len(sizes)))
    slots: list[tuple[int, int] | None] = [None] * min(in_flight, len(sizes))
    tasks: list[Task] = []
    while waiting or any(entry is not None for entry in slots):
        for slot, entry in enumerate(slots):
            if entry is None:
                if not waiting:
                    continue
                entry = (waiting.popleft(), 0)
            micro_batch, step = entry
            rows, length = sizes[micro_batch], prompt_lens[micro_batch]
            if step == 0:
                tasks += _tasks(*entry, slot, rows, prefill_size or rows, range(0, length, chunk_size or length))
            else:
                tasks += _tasks(*entry, slot, rows, rows, range(length + step - 1, length + step))
            slots[slot] = (micro_batch, step + 1) if step + 1 < steps[micro_batch] else None
    return tuple(tasks)


def _tasks(micro_batch: int, step: int, slot: int, rows: int, row_size: int, tokens: range) -> Iterator[Task]:
    """One step of a micro-batch, by so many rows and by the positions from one of `tokens` to the next."""
    for first_row in range(0, rows, row_size):
        for first_token in tokens:
            end_token = min(first_token + tokens.step, tokens.stop)
            yield Task(
                micro_batch=micro_batch,
                step=step,
                slot=slot,
                first_row=first_row,
                end_row=min(first_row + row_size, rows),
                first_token=first_token,
                end_token=end_token,
                samples=end_token == tokens.stop,
            )
