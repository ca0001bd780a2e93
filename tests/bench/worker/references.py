"""References of a tiny model, for the tests of how they are made and compared."""

from __future__ import annotations

from typing import Any

import torch

from pipetune.bench.spec import Protocol, Workload
from pipetune.bench.worker.reference import Reference
from pipetune.bench.worker.unsplit_reference import make_reference
from tests.tiny_models import tiny_prompts

PROMPTS = tiny_prompts(7)
OUTPUT_LEN = 6


def reference_of(model: Any, **workload: Any) -> Reference:
    return make_reference(
        model,
        PROMPTS,
        workload=Workload(num_prompts=len(PROMPTS), output_len=OUTPUT_LEN, **workload),
        protocol=Protocol(),
        dtype=torch.float32,
        pad_token_id=0,
        workload_digest="a digest",
    )
