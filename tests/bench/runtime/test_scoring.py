"""Drawn tokens and log-probabilities are the same for every plan, in use and in measured runs, over real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipetune.bench.errors import ConfigError
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.metrics import derive
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, RunSpec, Sampling, Workload
from pipetune.bench.worker.reference import Reference
from pipetune.bench.worker.unsplit_reference import make_reference
from tests.bench.runtime.test_loop import DEVICES, OUTPUT_LEN, PLANS, set_eos
from tests.hooks import break_workers
from tests.tiny_models import save_tiny_model, tiny_prompts

PROMPTS = (*tiny_prompts(8), (7,))
SAMPLING = Sampling(temperature=1.3, top_k=60, top_p=0.95, seed=11)
PROTOCOL = Protocol(num_iters=2, num_iters_warmup=1)
SCORED = Workload(kind="score", num_prompts=6, input_len=12, random_range_ratio=0.5)
SAMPLED = Workload(num_prompts=6, input_len=12, output_len=5, random_range_ratio=0.5, sampling=SAMPLING)
MEASURED = [
    Plan.from_layer_counts((4, 2), DEVICES, 2),
    Plan.from_layer_counts((2, 4), DEVICES, 3, prefill_micro_batch_size=1, prefill_chunk_size=5, replicas=2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[Fleet]:
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as started:
        yield started


def reference_of(folder: Path, **workload: Any) -> Reference:
    untyped: Any = AutoModelForCausalLM
    return make_reference(
        untyped.from_pretrained(folder).eval(),
        PROMPTS,
        workload=Workload(num_prompts=len(PROMPTS), output_len=OUTPUT_LEN, **workload),
        protocol=PROTOCOL,
        dtype=torch.float32,
        pad_token_id=0,
        workload_digest="",
    )


def measure(fleet: Fleet, plan: Plan, workload: Workload) -> Measurement | Failure:
    effective = fleet.resolve(plan, workload)
    assert isinstance(effective, EffectivePlan)
    return fleet.measure(RunSpec(model=fleet.model, workload=workload, plan=plan, protocol=PROTOCOL), effective)


def test_every_plan_draws_the_unsplit_models_tokens(folder: Path, fleet: Fleet) -> None:
    expected = reference_of(folder, sampling=SAMPLING).tokens.tolist()
    eos = expected[1][3]
    until_eos = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    assert until_eos != expected
    for in_flight, plan in PLANS:
        results = fleet.generate(
            plan, PROMPTS, max_new_tokens=OUTPUT_LEN, in_flight=in_flight, ignore_eos=True, sampling=SAMPLING
        )
        assert [list(result.token_ids) for result in results] == expected, plan.describe()
    set_eos(folder, eos)
    for in_flight, plan in PLANS[::3]:
        results = fleet.generate(plan, PROMPTS, max_new_tokens=OUTPUT_LEN, in_flight=in_flight, sampling=SAMPLING)
        assert [list(result.token_ids) for result in results] == until_eos, plan.describe()


def test_every_plan_scores_as_the_unsplit_model(folder: Path, fleet: Fleet) -> None:
    reference = reference_of(folder, kind="score")
    assert reference.scores is not None
    for in_flight, plan in PLANS:
        results = fleet.score(plan, PROMPTS, in_flight=in_flight)
        for prompt, result, expected in zip(PROMPTS, results, reference.scores, strict=True):
            assert result.token_ids == prompt
            assert len(result.logprobs) == len(prompt) - 1, "the first token has no probability"
            assert torch.allclose(torch.tensor(result.logprobs), expected, atol=reference.tolerance, rtol=0)


def test_replicas_may_be_without_prompts(fleet: Fleet) -> None:
    alone, idle = Plan.from_layer_counts((6,), DEVICES, 2), Plan.from_layer_counts((6,), DEVICES, 2, replicas=4)
    for prompts in (PROMPTS[:1], PROMPTS[:2]):
        for sampling in (None, SAMPLING):
            for ignore_eos in (True, False):
                one, other = (
                    fleet.generate(plan, prompts, max_new_tokens=4, ignore_eos=ignore_eos, sampling=sampling)
                    for plan in (alone, idle)
                )
                assert [result.token_ids for result in one] == [result.token_ids for result in other]
        for first, second in zip(fleet.score(alone, prompts), fleet.score(idle, prompts), strict=True):
            assert first.logprobs == pytest.approx(second.logprobs, abs=1e-4)


@pytest.mark.parametrize("source", ["unsplit", "plan"])
def test_a_scored_workload_is_measured_and_checked(source: str, fleet: Fleet, tmp_path: Path) -> None:
    if source == "unsplit":
        assert fleet.make_reference(tmp_path / "reference", SCORED, PROTOCOL) is None
    else:
        plan = Plan.from_layer_counts((3, 3), DEVICES, 2)
        spec = RunSpec(model=fleet.model, workload=SCORED, plan=plan, protocol=PROTOCOL)
        effective = EffectivePlan(plan=plan, in_flight=3)
        assert fleet.make_reference_from_plan(tmp_path / "reference", spec, effective) is None
    for plan in MEASURED:
        outcome = measure(fleet, plan, SCORED)
        assert isinstance(outcome, Measurement), outcome
        assert outcome.check is not None
        assert outcome.check.reference == source
        assert outcome.check.tokens_equal is None
        # The checked prompts in every replica, and all of them in both iterations.
        whole = sum(length - 1 for length in outcome.prompt_lens)
        assert outcome.check.compared_logits > 2 * whole
        assert 0 < outcome.check.max_logit_error <= outcome.check.tolerance
        assert outcome.output_len == 0
        values = derive(outcome)
        assert values["total_token_throughput"] > 0
        assert not {"output_throughput", "median_ttft_ms", "median_tpot_ms"} & set(values)


def test_the_baseline_of_a_scored_workload_is_a_forward_pass(fleet: Fleet) -> None:
    outcome = fleet.baseline(SCORED, PROTOCOL, batch_size=4)
    assert isinstance(outcome, Measurement), outcome
    assert (outcome.method, outcome.output_len, outcome.micro_batch_sizes) == ("hf_forward", 0, (4, 2))
    assert all(len(run.token_times_s) == len(outcome.tasks) == 2 for run in outcome.iterations)
    assert "output_throughput" not in derive(outcome)


def test_a_sampled_workload_is_measured_and_checked(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.make_reference(tmp_path / "reference", SAMPLED, PROTOCOL) is None
    for plan in MEASURED:
        outcome = measure(fleet, plan, SAMPLED)
        assert isinstance(outcome, Measurement), outcome
        assert outcome.check is not None
        assert outcome.check.tokens_equal is True
    baseline = fleet.baseline(SAMPLED, PROTOCOL, batch_size=4)
    assert isinstance(baseline, Measurement), baseline
    assert baseline.method == "hf_generate"


def test_texts_without_a_second_token_are_refused_as_a_workload(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match="single token"):
        fleet.prompts(Workload(kind="score", num_prompts=2, input_len=1))
    assert fleet.score(MEASURED[0], [[5]])[0].logprobs == ()
    with pytest.raises(ConfigError, match="there is none"):
        fleet.score(MEASURED[0], [])


def test_wrong_scores_and_draws_are_wrong_output(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first from log-probabilities that are off, the second from a draw at another place of the same logits."""
    body = """
    keep, draw = module._Pass.score, module.draw
    def off(self, task, logits):
        keep(self, task, logits * 1.001)
    module._Pass.score = off
    module.draw = lambda logits, u, sampling: draw(logits, 1.0 - u, sampling)
"""
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.runtime.loop", body=body)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES[:2]) as broken:
        for workload, phase in ((SCORED, "check"), (SAMPLED, "measure")):
            assert broken.make_reference(tmp_path / "reference", workload, PROTOCOL) is None
            outcome = measure(broken, MEASURED[0], workload)
            assert isinstance(outcome, Failure)
            assert (outcome.kind, outcome.phase) == (FailureKind.WRONG_OUTPUT, phase), outcome
