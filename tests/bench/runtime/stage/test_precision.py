"""Half-precision compute over float32 weights: split as unsplit, loaded wide, kept narrow where attention reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.memory import stage_bytes
from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.resolve import ResolvedModel, resolve_model
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.bench.runtime.job import MicroBatchInputs
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.runtime.stage.unsplit import load_unsplit
from pipetune.bench.spec import Dtype, EffectivePlan, ModelSpec, Plan, Protocol, RunSpec, Workload
from tests.hooks import break_workers
from tests.tiny_models import save_tiny_model, tiny_prompts

CPU = torch.device("cpu")
STEPS = 4
HALVES: list[Dtype] = ["bfloat16", "float16"]


def mixed(folder: Path, dtype: Dtype) -> ResolvedModel:
    return resolve_model(ModelSpec(name=str(folder), dtype=dtype, storage_dtype="float32"))


def inputs_of(count: int = 5) -> MicroBatchInputs:
    return MicroBatchInputs.build(tiny_prompts(count), output_len=STEPS, pad_token_id=0, device=CPU)


def steps_of(inputs: MicroBatchInputs) -> list[tuple[int, int]]:
    total = inputs.ids.shape[1]
    return [(0, inputs.prompt_len), *((place, place + 1) for place in range(inputs.prompt_len, total))]


def unsplit_logits(model: Any, inputs: MicroBatchInputs) -> torch.Tensor:
    cache, parts = None, []
    takes_positions = "bloom" not in model.config.model_type
    for first, end in steps_of(inputs):
        positions = {"position_ids": inputs.positions[:, first:end]} if takes_positions else {}
        with torch.inference_mode():
            output = model(
                input_ids=inputs.ids[:, first:end],
                attention_mask=inputs.mask[:, :end],
                past_key_values=cache,
                use_cache=True,
                **positions,
            )
        cache = output.past_key_values
        parts.append(output.logits[:, -1])
    return torch.stack(parts, 1)


def split_logits(stages: list[Stage], inputs: MicroBatchInputs) -> torch.Tensor:
    rows, total = inputs.ids.shape
    caches = [stage.new_cache(rows=rows, max_len=total) for stage in stages]
    parts = []
    for first, end in steps_of(inputs):
        message = None
        for stage, cache in zip(stages, caches, strict=True):
            cache.seek(0, rows, first)
            message = stage.forward(
                inputs.ids[:, first:end], inputs.mask[:, :end], inputs.positions[:, first:end], cache, message
            )
            if not stage.is_last:
                assert message.dtype is stage.message_dtype is torch.float32
        assert message is not None
        parts.append(message)
    return torch.stack(parts, 1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bloom", "gemma2", "mixtral"])
def test_a_split_computes_what_the_unsplit_model_does(family: str, dtype: Dtype, tmp_path: Path) -> None:
    resolved = mixed(save_tiny_model(tmp_path / family, family), dtype)
    inputs = inputs_of()
    model = load_unsplit(resolved, ("cpu:0",))
    stages = [Stage(resolved, CPU) for _ in range(3)]
    for index, (first, end) in enumerate([(0, 2), (2, 3), (3, 6)]):
        stages[index].assign(first, end, is_first=index == 0, is_last=index == 2)
    expected = unsplit_logits(model, inputs)
    torch.testing.assert_close(split_logits(stages, inputs), expected, rtol=0, atol=0)
    assert {parameter.dtype for stage in stages for parameter in stage.model.parameters()} == {torch.float32}
    # It is neither of the two plain ways to compute.
    for other in (ModelSpec(name=resolved.spec.name), ModelSpec(name=resolved.spec.name, dtype=dtype)):
        plain = unsplit_logits(load_unsplit(resolve_model(other), ("cpu:0",)), inputs)
        assert not torch.equal(plain.to(expected.dtype), expected)


def test_keys_and_values_are_kept_as_attention_reads_them(tmp_path: Path) -> None:
    resolved = mixed(save_tiny_model(tmp_path / "llama", "llama"), "bfloat16")
    shape, plain = describe_model(resolved), describe_model(resolve_model(ModelSpec(name=resolved.spec.name)))
    assert (shape.dtype_bytes, shape.kept_bytes) == (2, 4)
    assert [layer.weight_bytes for layer in shape.layers] == [layer.weight_bytes for layer in plain.layers]
    stage = Stage(resolved, CPU)
    stage.assign(0, 6, is_first=True, is_last=True)
    inputs = inputs_of()
    rows, total = inputs.ids.shape
    cache = stage.new_cache(rows=rows, max_len=total)
    cache.seek(0, rows, 0)
    prompt = slice(0, inputs.prompt_len)
    stage.forward(inputs.ids[:, prompt], inputs.mask[:, prompt], inputs.positions[:, prompt], cache)
    assert cache.nbytes() == rows * total * sum(layer.kv_bytes_per_token for layer in shape.layers)


@pytest.mark.parametrize(("dtype", "storage_dtype"), [("bfloat16", "float32"), ("float16", None)])
def test_plans_in_half_precision_are_checked_against_a_reference_of_their_own(
    dtype: Dtype, storage_dtype: Dtype | None, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "llama", "llama")
    workload, protocol = Workload(num_prompts=6, input_len=12, output_len=5, random_range_ratio=0.5), Protocol()
    devices = ("cpu:0", "cpu:1")
    with Fleet.start(ModelSpec(name=str(folder), dtype=dtype, storage_dtype=storage_dtype), devices) as fleet:
        for kind in (workload, workload.model_copy(update={"kind": "score"})):
            assert fleet.make_reference(tmp_path / "reference", kind, protocol) is None
            plan = Plan.from_layer_counts((4, 2), devices, 2, prefill_micro_batch_size=1)
            effective = fleet.resolve(plan, kind)
            assert isinstance(effective, EffectivePlan)
            outcome = fleet.measure(RunSpec(model=fleet.model, workload=kind, plan=plan, protocol=protocol), effective)
            assert isinstance(outcome, Measurement), outcome
            assert outcome.check is not None
            assert 0 <= outcome.check.max_logit_error <= outcome.check.tolerance
            assert fleet.shape.kept_bytes == (4 if storage_dtype else 2)
            for index, held in enumerate(outcome.memory):
                wanted = stage_bytes(
                    fleet.shape, plan, index, prompt_len=max(fleet.prompt_lens(kind)), output_len=kind.generated_len
                )
                assert (held.weights_bytes, held.kv_bytes) == (wanted.weights, effective.in_flight * wanted.kv_per_slot)
        baseline = fleet.baseline(workload, protocol, batch_size=3)
        assert isinstance(baseline, Measurement), baseline


def test_a_wrong_stage_of_experts_in_half_precision_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
    forward = module.Stage.forward
    def off(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return output if self.is_last else output.roll(1, -1)
    module.Stage.forward = off
"""
    folder = save_tiny_model(tmp_path / "mixtral", "mixtral")
    workload, protocol = Workload(num_prompts=4, input_len=12, output_len=8), Protocol(num_iters=1)
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.runtime.stage.stage", body=body)
    outcomes = []
    with Fleet.start(ModelSpec(name=str(folder), dtype="bfloat16"), ("cpu:0", "cpu:1")) as fleet:
        assert fleet.make_reference(tmp_path / "reference", workload, protocol) is None
        for counts in ((6,), (3, 3)):
            plan = Plan.from_layer_counts(counts, ("cpu:0", "cpu:1"), 2)
            spec = RunSpec(model=fleet.model, workload=workload, plan=plan, protocol=protocol)
            outcomes.append(fleet.measure(spec, EffectivePlan(plan=plan, in_flight=2)))
    single, split = outcomes
    assert isinstance(single, Measurement), single
    assert isinstance(split, Failure)
    assert split.kind is FailureKind.WRONG_OUTPUT
