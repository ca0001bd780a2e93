"""Requests that come over time get the tokens of each prompt alone, in every family that can be split."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from pipetune.bench.errors import ModelError
from pipetune.bench.load.admission import Rules
from pipetune.bench.load.online import OnlineRequest
from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.loop import Edges, StageLoop, Status
from pipetune.bench.runtime.online import Leader, OnlineStage, Sizes, Source
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.spec import ModelSpec
from tests.families.configs import UNBUILDABLE, VOCAB_SIZE, tiny_config
from tests.families.test_families import DEFAULT_SHARD, SHARD_VARIABLE, families_of

FAMILIES = [name for name in families_of(os.environ.get(SHARD_VARIABLE, DEFAULT_SHARD)) if name not in UNBUILDABLE]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_served_right(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_config(family).save_pretrained(tmp_path)
    resolved = resolve_model(ModelSpec(name=str(tmp_path), load_format="dummy"))
    try:
        shape = describe_model(resolved)
    except ModelError:
        pytest.skip("cannot be split")
    stage, device = Stage(resolved, torch.device("cpu")), DeviceContext("cpu:0", num_threads=1)
    stage.assign(0, shape.num_layers, is_first=True, is_last=True)
    with torch.no_grad():
        for parameter in stage.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    source = random.Random(0)
    requests = [
        OnlineRequest(
            number=number,
            prompt=tuple(source.randrange(5, VOCAB_SIZE) for _ in range(source.randint(1, 13))),
            output_len=source.randint(2, 9),
            at_s=0.004 * (number // 2),
        )
        for number in range(10)
    ]
    rules = Rules(slots=2, rows=3, prefill_rows=2, chunk_size=9, joins=shape.joins)
    if shape.whole_slots:
        # Where an indexer's scores tie, as in a tiny model, a chunk chooses otherwise than a whole prompt.
        rules = Rules(slots=2, rows=3, prefill_rows=3, whole_slots=True)
    sizes = Sizes(rules=rules, max_len=22, prompt_len=13)
    online = OnlineStage(stage, device, Status(), Edges(), sizes)
    loop, expected = StageLoop(stage, device, Status()), {}
    for one in requests:
        job = Job(
            prompts=(one.prompt,),
            output_len=one.output_len,
            micro_batch_size=1,
            prefill_size=1,
            in_flight=1,
            pad_token_id=0,
        )
        loop.prepare(job)
        tokens = loop.run(job).tokens
        assert tokens is not None
        expected[one.number] = tokens[0]
    online.rehearse()
    served = Source(requests)
    Leader(online, [], served, sizes).run(online.device.now())
    assert {number: list(one.token_ids) for number, one in served.served.items()} == expected
