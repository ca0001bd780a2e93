"""The public way to use a plan gives what the unsplit model gives, for text-like prompts of any length."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipetune.bench.errors import ConfigError, FleetError, PlanError
from pipetune.bench.fleet.fleet import Fleet, warn_of_cores
from pipetune.bench.pipeline import DynamicPipeline, Pipeline
from pipetune.bench.spec import Lane, Plan, Sampling
from tests.hooks import break_workers
from tests.record_factory import make_failure
from tests.tiny_models import save_tiny_model, tiny_prompts, unsplit_tokens

DEVICES = ("cpu:0", "cpu:1")
PROMPTS = tiny_prompts(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def test_two_replicas_generate_draw_and_score(folder: Path) -> None:
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_pretrained(folder).eval()
    plan = Plan.from_layer_counts((6,), DEVICES, 2, replicas=2, prefill_chunk_size=4)
    with Pipeline.start(str(folder), plan) as pipeline:
        greedy = pipeline.generate(PROMPTS, max_new_tokens=4, ignore_eos=True)
        drawn, again, other = (
            pipeline.generate(PROMPTS, max_new_tokens=4, ignore_eos=True, sampling=Sampling(seed=seed))
            for seed in (1, 1, 2)
        )
        scored = pipeline.score(PROMPTS)
        with pytest.raises(ConfigError, match="at least 1"):
            pipeline.generate(PROMPTS, max_new_tokens=0)
        with pytest.raises(ConfigError, match="tokenizer"):
            pipeline.score(["a text"])
    assert [list(result.token_ids) for result in greedy] == unsplit_tokens(model, PROMPTS, output_len=4)
    assert [result.token_ids for result in drawn] == [result.token_ids for result in again]
    assert [result.token_ids for result in drawn] != [result.token_ids for result in other]
    for prompt, result in zip(PROMPTS, scored, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            expected = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert list(result.logprobs) == pytest.approx(expected.tolist(), abs=1e-4)
        assert result.text is None


def test_each_length_has_a_lane_and_the_unsplit_models_tokens(folder: Path) -> None:
    lanes = (Lane(up_to_tokens=4, weight=4), Lane(prefill_chunk_size=4))
    plan = Plan.from_layer_counts((2, 4), DEVICES, 2).model_copy(update={"lanes": lanes})
    untyped: Any = AutoModelForCausalLM
    expected = unsplit_tokens(untyped.from_pretrained(folder).eval(), PROMPTS, output_len=4)
    with Pipeline.start(str(folder), plan) as pipeline:
        dynamic = DynamicPipeline(pipeline)
        assert [dynamic.adjust_pipeline(length) for length in (1, 4, 5, 900)] == [*lanes[:1] * 2, *lanes[1:] * 2]
        assert {dynamic.adjust_pipeline(len(prompt)) for prompt in PROMPTS} == {*lanes}
        with pipeline.open_queue(max_len=64) as requests:
            handles = [requests.submit(prompt, max_new_tokens=4, ignore_eos=True) for prompt in PROMPTS]
            assert [list(one) for one in handles] == expected
        # Lanes are of requests over time.
        batch = pipeline.generate(PROMPTS, max_new_tokens=4, ignore_eos=True)
    assert [list(one.token_ids) for one in batch] == expected


# A worker of cpu:1 dies in its first tasks, as often as there are lines left in a file.
DIES = """
    import os, pathlib, signal, sys
    run = module.Stage.forward
    def forward(*args, **kwargs):
        left = pathlib.Path({left!r})
        lines = left.read_text().splitlines()
        if "--rank" in sys.argv and sys.argv[sys.argv.index("--rank") + 1] == "1" and lines:
            left.write_text("\\n".join(lines[1:]))
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args, **kwargs)
    module.Stage.forward = forward
"""


@pytest.mark.parametrize(("deaths", "devices"), [(1, DEVICES), (2, DEVICES[:1])])
def test_generation_survives_the_loss_of_a_worker_with_the_same_tokens(
    deaths: int, devices: tuple[str, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untyped: Any = AutoModelForCausalLM
    expected = unsplit_tokens(untyped.from_pretrained(folder).eval(), PROMPTS, output_len=4)
    left = tmp_path / "left"
    left.write_text("\n".join("x" * deaths))
    hook = DIES.format(left=str(left))
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.runtime.stage.stage", body=hook)
    with Pipeline.start(str(folder), Plan.from_layer_counts((3, 3), DEVICES, 2)) as pipeline:
        with pytest.warns(RuntimeWarning) as said:
            results = pipeline.generate(PROMPTS, max_new_tokens=4, ignore_eos=True)
        assert pipeline.plan.devices == devices
    assert [list(result.token_ids) for result in results] == expected
    texts = [str(one.message) for one in said if one.category is RuntimeWarning]
    assert len(texts) == deaths
    assert "cpu:1 was killed by SIGKILL" in texts[0]
    assert deaths == 1 or "run again without it" in texts[1]


def test_a_plan_that_does_not_cover_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match="layer 4 is missing"):
        Pipeline.start(str(folder), Plan.from_layer_counts((2, 2), DEVICES, 2))


def test_more_workers_than_cores_are_said_before_they_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cores = len(os.sched_getaffinity(0))
    devices = tuple(f"cpu:{index}" for index in range(cores + 1))
    # It is said once of the same devices; the workers would start one by one for long, and come behind it.
    warn_of_cores.cache_clear()
    monkeypatch.setattr(Fleet, "_launch", lambda fleet: (_ for _ in ()).throw(FleetError(make_failure())))
    with pytest.raises(FleetError):
        Pipeline.start(str(folder), Plan.from_layer_counts((1,) * len(devices), devices, 2))
    assert [text for text in caplog.messages if f"cores: {cores + 1} workers may use" in text]
