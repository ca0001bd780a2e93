"""What a profile repeats: rows that are unlike, as in a real batch."""

from __future__ import annotations

import pytest
import torch

from pipetune.bench.profile import ProfileGrid, TaskKind
from pipetune.bench.runtime.job import MicroBatchInputs
from pipetune.bench.worker.profiling.repeats import repeat
from pipetune.bench.worker.profiling.scope import DECODE_STEPS
from tests.record_factory import make_shape


@pytest.mark.parametrize("kind", [TaskKind(16, 1, 24), TaskKind(16, 24, 0), TaskKind(16, 8, 16)])
@pytest.mark.parametrize("recurrent", [False, True])
def test_no_two_rows_need_work_on_the_same_tokens(kind: TaskKind, recurrent: bool) -> None:
    if recurrent and kind.past_tokens and not kind.is_decode:
        pytest.skip("what keeps states is prefilled whole")
    shape = make_shape().model_copy(update={"recurrent": recurrent})
    grid = ProfileGrid.model_construct(padded=0, scores=False, sampling=None)
    job = repeat(kind, 1, grid, shape, pad_token_id=0)
    inputs = MicroBatchInputs.build(job.prompts, output_len=job.output_len, pad_token_id=0, device=torch.device("cpu"))
    task = job.tasks()[-1]
    ids = inputs.ids[:, task.first_token : task.end_token]
    assert ids.shape == (16, kind.new_tokens)
    assert len({tuple(row) for row in ids.tolist()}) > 12
    # What a step gives is written behind the prompts, where there is room for it.
    assert inputs.prompt_len + task.step < inputs.ids.shape[1]
    assert inputs.prompt_len >= task.end_token + (DECODE_STEPS - 1 if kind.is_decode else 0)
