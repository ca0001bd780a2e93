"""A pass over prompts: how they are ordered, batched, shared among replicas and padded."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.runtime.job import Job, MicroBatchInputs, margins_of

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def job_of(lengths: list[int], size: int = 3) -> Job:
    prompts = tuple(tuple(range(1, length + 1)) for length in lengths)
    return Job(prompts=prompts, output_len=2, micro_batch_size=size, prefill_size=size, in_flight=2, pad_token_id=0)


@given(lengths=LENGTHS, size=st.integers(1, 5))
def test_longest_prompts_come_first_and_each_micro_batch_is_as_long_as_its_first(lengths: list[int], size: int) -> None:
    job = job_of(lengths, size)
    assert [lengths[index] for index in job.order] == sorted(lengths, reverse=True)
    assert sum(job.sizes) == len(lengths)
    rows = [job.order[first : first + count] for first, count in zip(job.first_rows, job.sizes, strict=True)]
    assert job.prompt_lens == tuple(max(lengths[index] for index in own) for own in rows)
    assert job.longest == max(lengths)
    assert job.most_tokens == max(task.num_rows * task.num_tokens for task in job.tasks()) or size > len(lengths)


@given(lengths=LENGTHS, replicas=st.integers(1, 4))
def test_replicas_share_all_prompts_and_keep_their_numbers(lengths: list[int], replicas: int) -> None:
    job = job_of(lengths)
    shares = [job.share(replica, replicas) for replica in range(replicas)]
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    for share in shares:
        part = job.part(share)
        assert part.numbers == share
        assert part.prompts == tuple(job.prompts[index] for index in share)


def test_inputs_are_padded_on_the_left() -> None:
    inputs = MicroBatchInputs.build([[5, 6, 7], [8]], output_len=2, pad_token_id=0, device=torch.device("cpu"))
    assert inputs.prompt_len == 3
    assert inputs.ids.tolist() == [[5, 6, 7, 0, 0], [0, 0, 8, 0, 0]]
    assert inputs.mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert inputs.positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]


def test_margins_lie_between_the_two_largest() -> None:
    assert margins_of(torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.0, 0.0]])).tolist() == [2.0, 0.0]
