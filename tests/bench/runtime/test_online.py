"""Requests that come and go over time get the tokens that the unsplit model gives each alone, whatever else runs.

Stages are threads here, hidden states go through queues; `tests/bench/worker/test_online.py` has real workers.
"""

from __future__ import annotations

import itertools
import queue
import random
import socket
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipetune.bench.load.admission import Rules
from pipetune.bench.load.online import OnlineRequest, ServedRequest
from pipetune.bench.load.slots import Edit, Task
from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.loop import Edges, StageLoop, Status
from pipetune.bench.runtime.online import Leader, Mail, OnlineStage, Sizes, Source
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.spec import Lane, ModelSpec, Sampling
from tests.tiny_models import save_tiny_model, tiny_prompts, unsplit_tokens

FAMILIES = ("llama", "mistral", "gemma3", "bloom", "gpt2")
CPU = torch.device("cpu")
CUTS = ((6,), (2, 4), (1, 3, 2))
UNLIKE_LANES = (
    Lane(up_to_tokens=3, slots=1, weight=8),
    Lane(up_to_tokens=7, prefill_chunk_size=3, prefills_per_decode=1),
    Lane(prefill_chunk_size=4, prefill_micro_batch_size=1),
)


class Edge:
    """Hidden states between two threads; a receive must have been posted for each, of its shape."""

    depth = 2

    def __init__(self) -> None:
        self._queue: queue.Queue[torch.Tensor] = queue.Queue()
        self._posted: deque[tuple[int, ...]] = deque()

    def post(self, shape: tuple[int, ...]) -> None:
        self._posted.append(shape)
        assert len(self._posted) <= self.depth

    def take(self) -> torch.Tensor:
        tensor = self._queue.get(timeout=60)
        assert tuple(tensor.shape) == self._posted.popleft()
        return tensor

    def consumed(self) -> None: ...

    def send(self, tensor: torch.Tensor) -> None:
        self._queue.put(tensor.clone())

    def drain(self) -> None: ...


class Recording(OnlineStage):
    """A stage that keeps what it was told to copy."""

    edits: list[Edit]

    def run(self, edits: Sequence[Edit], task: Task, hidden: torch.Tensor | None) -> list[int] | None:
        self.edits += edits
        return super().run(edits, task, hidden)


def stages_of(folder: Path, counts: Sequence[int]) -> list[Stage]:
    """Stages of a saved model, in this process."""
    resolved = resolve_model(ModelSpec(name=str(folder)))
    ends = list(itertools.accumulate(counts))
    stages = []
    for end, count in zip(ends, counts, strict=True):
        stages.append(Stage(resolved, CPU))
        stages[-1].assign(end - count, end, is_first=end == count, is_last=end == ends[-1])
    return stages


def serve(
    stages: Sequence[Stage], source: Source, sizes: Sizes, *, sampling: Sampling | None = None, **options: Any
) -> tuple[Leader, Recording]:
    """A whole run, every stage but the first in a thread of its own."""
    edges: list[Any] = [Edge() for _ in stages[1:]]
    pairs = [line() for _ in stages[1:]]
    online = [
        Recording(
            stage,
            DeviceContext("cpu:0", num_threads=1),
            Status(),
            Edges(
                hidden_in=edges[index - 1] if index else None,
                hidden_out=edges[index] if index < len(edges) else None,
            ),
            sizes,
            sampling=sampling,
        )
        for index, stage in enumerate(stages)
    ]
    for one in online:
        one.edits = []
        one.rehearse()
    leader = Leader(online[0], [ours for ours, _ in pairs], source, sizes, **options)
    threads = [
        threading.Thread(target=one.follow, args=(theirs,), daemon=True)
        for one, (_, theirs) in zip(online[1:], pairs, strict=True)
    ]
    for thread in threads:
        thread.start()
    leader.run(online[0].device.now())
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for end in itertools.chain(*pairs):
        end.close()
    traces = [one.timeline.resolve().trace(0.0) for one in online]
    assert all(len(trace.compute_start_s) == len(leader.tasks) for trace in traces)
    assert all(one.edits == online[0].edits for one in online)
    return leader, online[0]


def line() -> tuple[Mail, Mail]:
    """Both ends of a line."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Mail(ours), Mail(theirs)


def requests_of(prompts: Sequence[tuple[int, ...]], *, begin_s: float = 0.0) -> list[OnlineRequest]:
    """Requests of unlike lengths that come within a few milliseconds of one another."""
    source = random.Random(0)
    at_s, requests = begin_s, []
    for number, prompt in enumerate(prompts):
        requests.append(OnlineRequest(number=number, prompt=prompt, output_len=source.randint(1, 12), at_s=at_s))
        at_s += source.choice((0.0, 0.002, 0.03))
    return requests


def sizes_of(requests: Sequence[OnlineRequest], **rules: Any) -> Sizes:
    return Sizes(
        rules=Rules(**rules),
        max_len=max(len(one.prompt) + one.output_len for one in requests),
        prompt_len=max(len(one.prompt) for one in requests),
    )


def check(served: dict[int, ServedRequest], expected: dict[int, list[int]]) -> None:
    """Tokens and times of requests that were served whole."""
    assert {number: list(one.token_ids) for number, one in served.items()} == expected
    for one in served.values():
        assert one.began_s is not None
        times = [one.arrived_s, one.noticed_s, one.began_s, *one.token_times_s]
        assert times == sorted(times)
        assert len(one.token_times_s) == len(one.token_ids)


def is_empty(leader: Leader) -> bool:
    """Whether no request, no row and no cache for prompts is left taken."""
    slots = leader.slots
    return (len(leader.admission), len(slots.rows), len(slots.free)) == (0, 0, leader.admission.rules.slots + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_those_of_each_prompt_alone(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / family, family)
    # Three of one token and a long output, one for each slot, whose clocks the fourth is too long for.
    firsts = [(one, 24) for one in ((5,), (6,), (7,))] + [(tuple(range(5, 25)), 2)]
    requests = [
        OnlineRequest(number=100 + index, prompt=prompt, output_len=output_len, at_s=0.004 * (index == 3))
        for index, (prompt, output_len) in enumerate(firsts)
    ]
    requests += requests_of(tiny_prompts(20), begin_s=0.01)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    expected = {one.number: unsplit_tokens(model, [one.prompt], output_len=one.output_len)[0] for one in requests}
    assert len({tuple(row[:1]) for row in expected.values()}) > 3, "the model repeats itself"
    seen: set[str] = set()
    ways: list[dict[str, Any]] = [
        {"slots": 2, "rows": 3, "prefill_rows": 2},
        {"slots": 3, "rows": 4, "prefill_rows": 1, "chunk_size": 5, "lanes": (Lane(up_to_tokens=4), Lane())},
        {"slots": 3, "rows": 2, "prefill_rows": 2, "chunk_size": 7, "lanes": (Lane(prefills_per_decode=1),)},
        {"slots": 3, "rows": 2, "prefill_rows": 2, "lanes": UNLIKE_LANES},
    ]
    joins = describe_model(resolve_model(ModelSpec(name=str(folder)))).joins
    assert joins == (family != "bloom")
    for (counts, rules), joined in itertools.product(zip((*CUTS, CUTS[1]), ways, strict=True), {False, joins}):
        source = Source(requests)
        leader, first = serve(stages_of(folder, counts), source, sizes_of(requests, **rules, joins=joined))
        check(source.served, expected)
        assert is_empty(leader)
        assert any(task.decode_rows for task in leader.tasks) == joined
        for edit in first.edits:
            shifted = "left" if edit.to_first < edit.first else "right" if edit.to_first > edit.first else "no"
            seen.add("join" if edit.source != edit.target else f"{shifted} shift")
    assert seen == {"join", "left shift", "right shift", "no shift"}


def test_end_of_sequence_and_concurrency(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "llama", "llama")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompts = tiny_prompts(10)
    whole = {number: unsplit_tokens(model, [prompt], output_len=9)[0] for number, prompt in enumerate(prompts)}
    ends = (whole[0][3], whole[1][0])
    requests = [
        OnlineRequest(number=number, prompt=prompt, output_len=9, eos_token_ids=ends)
        for number, prompt in enumerate(prompts)
    ]
    expected = {}
    for number, row in whole.items():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        expected[number] = row[: stop + 1]
    source = Source(requests)
    sizes = sizes_of(requests, slots=2, rows=4, prefill_rows=2)
    leader, _ = serve(stages_of(folder, (3, 3)), source, sizes, max_concurrency=2)
    check(source.served, expected)
    assert is_empty(leader)
    spans = sorted((one.began_s or 0.0, one.token_times_s[-1]) for one in source.served.values())
    for moment, _ in spans:
        assert sum(begin <= moment < end for begin, end in spans) <= 2


def test_draws_depend_on_the_number_alone(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "llama", "llama")
    sampling = Sampling(temperature=0.9, top_k=40, seed=3)
    prompts = tiny_prompts(8)
    (stage,) = stages_of(folder, (6,))
    loop = StageLoop(stage, DeviceContext("cpu:0", num_threads=1), Status())
    job = Job(
        prompts=prompts,
        output_len=6,
        micro_batch_size=3,
        prefill_size=2,
        in_flight=2,
        pad_token_id=0,
        sampling=sampling,
    )
    loop.prepare(job)
    expected = loop.run(job).tokens
    assert expected is not None
    for counts, order in (
        ((6,), list(range(8))),
        ((2, 4), list(range(7, -1, -1))),
        ((1, 3, 2), [3, 1, 7, 0, 2, 6, 4, 5]),
    ):
        requests = [
            OnlineRequest(number=number, prompt=prompts[number], output_len=6, at_s=0.004 * place)
            for place, number in enumerate(order)
        ]
        source = Source(requests)
        sizes = sizes_of(requests, slots=len(counts), rows=2, prefill_rows=1, joins=len(counts) != 2)
        serve(stages_of(folder, counts), source, sizes, sampling=sampling)
        check(source.served, expected)


class Cancelling(Source):
    """Cancels requests once they have so many tokens; with -1, at the same time as they come."""

    def __init__(self, requests: Sequence[OnlineRequest], after: dict[int, int]) -> None:
        super().__init__(requests)
        self._after, self._now = after, [number for number, count in after.items() if count < 0]
        self._counts: dict[int, int] = {}

    def told(self, tokens: Sequence[tuple[int, int]]) -> None:
        for number, _ in tokens:
            self._counts[number] = self._counts.get(number, 0) + 1
            if self._counts[number] == self._after.get(number):
                self._now.append(number)

    def cancelled(self) -> Sequence[int]:
        found, self._now = self._now, []
        return found


@pytest.mark.parametrize("counts", CUTS[:2])
def test_cancelled_requests_leave_nothing_behind(counts: tuple[int, ...], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "llama", "llama")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    requests = [one.model_copy(update={"at_s": 0.0, "output_len": 8}) for one in requests_of(tiny_prompts(16))]
    after = {0: 1, 1: 3, 4: 2, 5: -1, 14: -1, 15: -1, 9: 7}
    source = Cancelling(requests, after)
    leader, _ = serve(stages_of(folder, counts), source, sizes_of(requests, slots=2, rows=3, prefill_rows=2))
    assert is_empty(leader)
    assert sorted(source.served) == list(range(16))
    for one in requests:
        served = source.served[one.number]
        assert served.is_cancelled == (one.number in after)
        tokens = unsplit_tokens(model, [one.prompt], output_len=8)[0]
        assert list(served.token_ids) == tokens[: max(after.get(one.number, 8), 0)]


def test_spans_without_a_request(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "llama", "llama")
    requests = [OnlineRequest(number=one, prompt=(5, 6), output_len=2, at_s=0.5 * one + 0.1) for one in range(2)]
    source = Source(requests)
    leader, _ = serve(stages_of(folder, (6,)), source, sizes_of(requests, slots=1, rows=1, prefill_rows=1))
    first = source.served[0]
    assert leader.idle_s == [(0.0, 0.1), (first.token_times_s[-1], 0.6)]


def test_long_messages_and_closed_lines() -> None:
    ours, theirs = line()
    value = [list(range(15_000)), (1.5, None)]
    assert theirs.receive(wait=False) is None
    ours.send(value)
    ours.send(())
    assert theirs.receive() == value
    assert theirs.receive(wait=False) == ()
    ours.close()
    with pytest.raises(RuntimeError, match="closed by peer"):
        theirs.receive()
    with pytest.raises(RuntimeError, match="closed by peer"):
        theirs.send(())
    theirs.close()
