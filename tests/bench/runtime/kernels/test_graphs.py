"""Static decode steps, which are what is captured, give what eager ones give, slot by slot on the real stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3TextConfig

from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.job import Job, MicroBatchInputs
from pipetune.bench.runtime.kernels.graphs import DecodeGraphs, kv_length, outside_bytes, steps_of
from pipetune.bench.runtime.kernels.static_step import StaticStep, StepKey, disagreement
from pipetune.bench.runtime.sampling import draw
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.schedule import build_schedule
from pipetune.bench.spec import ModelSpec, Sampling
from tests.bench.models.model_configs import model_config
from tests.tiny_models import COMMON, save_tiny_model, tiny_config, tiny_prompts

FAMILIES = ["llama", "qwen3", "gpt2", "bloom", "gemma2", "mixtral"]
CUTS = [(0, 6), (0, 2, 6)]


def job_of(output_len: int = 9) -> Job:
    """Three micro-batches in two slots, the last one smaller; prompts of unequal length, windows exceeded."""
    return Job(
        prompts=tiny_prompts(7),
        output_len=output_len,
        micro_batch_size=3,
        prefill_size=2,
        in_flight=2,
        pad_token_id=0,
    )


def stages_of(folder: Path, cuts: tuple[int, ...], device: DeviceContext, **spec: Any) -> list[Stage]:
    resolved = resolve_model(ModelSpec(name=str(folder), **spec))
    stages = []
    for first, end in itertools.pairwise(cuts):
        stage = Stage(resolved, device.torch_device)
        stage.assign(first, end, is_first=first == 0, is_last=end == cuts[-1])
        stages.append(stage)
    return stages


def outputs_of(
    stages: list[Stage], job: Job, device: DeviceContext, graphs: list[DecodeGraphs] | None, max_len: int
) -> Iterator[torch.Tensor]:
    """What every stage gives for every task, in order, greedy tokens fed back; decode by `graphs` where given."""
    slots = [[stage.new_cache(rows=4, max_len=max_len) for _ in range(job.in_flight)] for stage in stages]
    for one, own in zip(graphs or [], slots, strict=False):
        one.prepare(own, job.tasks())
        assert one.notes == ()
    rows = [job.prompts[index] for index in job.order]
    inputs = [
        MicroBatchInputs.build(
            rows[first : first + size], output_len=job.output_len, pad_token_id=0, device=device.torch_device
        )
        for first, size in zip(job.first_rows, job.sizes, strict=True)
    ]
    for task in job.tasks():
        batch, hidden = inputs[task.micro_batch], None
        part, span = slice(task.first_row, task.end_row), slice(task.first_token, task.end_token)
        for index, stage in enumerate(stages):
            output = graphs[index].run(task, batch, hidden) if graphs is not None else None
            assert (output is not None) == (graphs is not None and not task.is_prefill)
            if output is None:
                slots[index][task.slot].seek(task.first_row, task.end_row, task.first_token)
                output = stage.forward(
                    batch.ids[part, span],
                    batch.mask[part, : task.end_token],
                    batch.positions[part, span],
                    slots[index][task.slot],
                    hidden,
                )
            yield output.float().cpu()
            hidden = output
        assert hidden is not None
        if task.end_token < batch.ids.shape[1]:
            batch.ids[part, task.end_token] = hidden.argmax(-1)


def folder_of(tmp_path: Path, family: str) -> Path:
    if family != "gemma3":
        return save_tiny_model(tmp_path / family, family)
    kinds = ["sliding_attention", "full_attention"] * 3
    config = Gemma3TextConfig(num_hidden_layers=6, head_dim=16, sliding_window=8, layer_types=kinds, **COMMON)
    config.save_pretrained(tmp_path / family)
    return tmp_path / family


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_static_steps_give_what_eager_ones_give(family: str, tmp_path: Path) -> None:
    cpu = DeviceContext("cpu:0", num_threads=1)
    load_format = "dummy" if family == "gemma3" else "auto"
    folder, job = folder_of(tmp_path, family), job_of()
    for cuts in CUTS:
        stages = stages_of(folder, cuts, cpu, load_format=load_format)
        graphs = [DecodeGraphs(stage, cpu, capture=False) for stage in stages]
        eager = list(outputs_of(stages, job, cpu, None, max_len=40))
        # A second pass over the same slots finds what the first one left there.
        for _ in range(2):
            static = list(outputs_of(stages, job, cpu, graphs, max_len=40))
            for one, other in zip(eager, static, strict=True):
                assert (one - other).abs().max().item() <= 1e-4 * max(1.0, one.abs().max().item())


def test_what_another_memory_held_does_not_leak_in(tmp_path: Path) -> None:
    cpu = DeviceContext("cpu:0", num_threads=1)
    (stage,) = stages_of(save_tiny_model(tmp_path / "llama", "llama"), (0, 6), cpu)
    slot = stage.new_cache(rows=3, max_len=30)
    graphs = DecodeGraphs(stage, cpu, capture=False)
    with torch.inference_mode():
        slot.seek(0, 1, 0)
        one = torch.ones((1, 1), dtype=torch.long)
        stage.forward(one, one, one * 0, slot)
        layers: Any = slot.layers
        for layer in layers:
            layer.keys[:, :, 1:] = 3e38
            layer.values[:, :, 1:] = torch.nan
    job = Job(prompts=tiny_prompts(3), output_len=4, micro_batch_size=3, prefill_size=3, in_flight=1, pad_token_id=0)
    graphs.prepare([slot], job.tasks())
    assert graphs.notes == ()


def test_recurrent_states_are_left_to_eager_steps_and_said_so(tmp_path: Path) -> None:
    cpu = DeviceContext("cpu:0", num_threads=1)
    model_config("mamba").save_pretrained(tmp_path / "mamba")
    (stage,) = stages_of(tmp_path / "mamba", (0, 4), cpu, load_format="dummy")
    slot = stage.new_cache(rows=3, max_len=30)
    graphs = DecodeGraphs(stage, cpu, where="stage 1", capture=False)
    job = Job(prompts=tiny_prompts(3), output_len=4, micro_batch_size=3, prefill_size=3, in_flight=1, pad_token_id=0)
    graphs.prepare([slot], job.tasks())
    assert len(graphs.notes) == 1
    assert graphs.notes[0].startswith("cuda_graphs: eager on stage 1: layer 0 keeps a ")
    decode = next(task for task in job.tasks() if not task.is_prefill)
    inputs = MicroBatchInputs.build(job.prompts, output_len=4, pad_token_id=0, device=cpu.torch_device)
    assert graphs.run(decode, inputs, None) is None


def test_a_model_that_fails_on_static_shapes_is_left_to_eager_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = DeviceContext("cpu:0", num_threads=1)
    (stage,) = stages_of(save_tiny_model(tmp_path / "llama", "llama"), (0, 6), cpu)
    forward = Stage.forward

    def broken(self: Stage, ids: torch.Tensor, mask: torch.Tensor, *args: Any) -> torch.Tensor:
        return forward(self, ids, mask, *args) * (1.0 if mask.shape[1] < 30 else 1.5)

    monkeypatch.setattr(Stage, "forward", broken)
    graphs = DecodeGraphs(stage, cpu, capture=False)
    slots = [stage.new_cache(rows=3, max_len=30) for _ in range(2)]
    graphs.prepare(slots, job_of().tasks())
    assert graphs.notes == (
        "cuda_graphs: eager on this stage: a static step differs from an eager one by 0.5 of its size",
    )

    def raising(self: Stage, ids: torch.Tensor, mask: torch.Tensor, *args: Any) -> torch.Tensor:
        if mask.shape[1] == 30:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")
        return forward(self, ids, mask, *args)

    monkeypatch.setattr(Stage, "forward", raising)
    graphs = DecodeGraphs(stage, cpu, where="stage 0", capture=False)
    graphs.prepare(slots, job_of().tasks())
    assert graphs.notes == ("cuda_graphs: eager on stage 0: called a synchronizing CUDA operation",)
    assert graphs.report.graphs == 0


def test_a_near_tie_in_a_few_rows_does_not_refuse_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = DeviceContext("cpu:0", num_threads=1)
    (stage,) = stages_of(save_tiny_model(tmp_path / "mixtral", "mixtral"), (0, 6), cpu)
    forward, tied = Stage.forward, list[bool]()

    def tying(self: Stage, ids: torch.Tensor, mask: torch.Tensor, *args: Any) -> torch.Tensor:
        output = forward(self, ids, mask, *args)
        if mask.shape[1] == 30 and ids.shape[0] == 3 and not tied:
            # Two of three rows chose another expert, this once.
            tied.append(True)
            output = output * torch.tensor([[2.0], [2.0], [1.0]])
        return output

    monkeypatch.setattr(Stage, "forward", tying)
    graphs = DecodeGraphs(stage, cpu, capture=False)
    graphs.prepare([stage.new_cache(rows=3, max_len=30) for _ in range(2)], job_of().tasks())
    assert tied
    assert graphs.notes == ()


def test_nothing_is_prefilled_to_compare_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = DeviceContext("cpu:0", num_threads=1)
    (stage,) = stages_of(save_tiny_model(tmp_path / "llama", "llama"), (0, 6), cpu)
    forward, lengths = Stage.forward, set[int]()

    def counting(self: Stage, ids: torch.Tensor, *args: Any) -> torch.Tensor:
        lengths.add(ids.shape[1])
        return forward(self, ids, *args)

    monkeypatch.setattr(Stage, "forward", counting)
    graphs = DecodeGraphs(stage, cpu, capture=False)
    graphs.prepare([stage.new_cache(rows=3, max_len=30) for _ in range(2)], job_of().tasks())
    assert graphs.report.graphs == 3
    assert lengths == {1}


def test_steps_are_kept_while_the_slots_are_the_same(tmp_path: Path) -> None:
    cpu = DeviceContext("cpu:0", num_threads=1)
    (stage,) = stages_of(save_tiny_model(tmp_path / "llama", "llama"), (0, 6), cpu)
    slots = [stage.new_cache(rows=3, max_len=30) for _ in range(2)]
    graphs = DecodeGraphs(stage, cpu, capture=False)
    graphs.prepare(slots, job_of().tasks())
    # Micro-batches of three rows in both slots, and the last one of one row in the first.
    assert graphs.report.graphs == 3
    first_s = graphs.report.capture_s
    graphs.prepare(slots, job_of().tasks())
    assert graphs.report.capture_s == first_s
    graphs.prepare([stage.new_cache(rows=3, max_len=30) for _ in range(2)], job_of(output_len=2).tasks())
    assert graphs.report.graphs == 3
    graphs.close()
    assert graphs.report.graphs == 0


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    prompt_len=st.integers(1, 600),
    output_len=st.integers(1, 300),
    in_flight=st.integers(1, 3),
    spare=st.integers(0, 40),
)
def test_every_decode_step_has_a_key_that_holds_it(
    sizes: list[int], prompt_len: int, output_len: int, in_flight: int, spare: int
) -> None:
    tasks = build_schedule(
        sizes, prompt_lens=[prompt_len] * len(sizes), output_len=output_len, in_flight=in_flight, prefill_size=1
    )
    max_len = prompt_len + output_len + spare
    keys = steps_of(tasks, max_len=max_len)
    assert [key.rows * key.kv_len for key in keys] == sorted((key.rows * key.kv_len for key in keys), reverse=True)
    for task in tasks:
        length = kv_length(task.end_token, max_len=max_len)
        assert task.end_token <= length <= max_len
        assert task.is_prefill or task.first_token <= keys[StepKey(task.slot, task.num_rows, length)] < length
    assert bool(keys) == (output_len > 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_captured_steps_give_what_eager_ones_give(family: str, dtype: str, tmp_path: Path) -> None:
    gpu = DeviceContext("cuda:0", num_threads=1)
    folder, job = save_tiny_model(tmp_path / family, family), job_of()
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    for cuts in CUTS:
        stages = stages_of(folder, cuts, gpu, dtype=dtype)
        graphs = [DecodeGraphs(stage, gpu) for stage in stages]
        eager = list(outputs_of(stages, job, gpu, None, max_len=40))
        captured = list(outputs_of(stages, job, gpu, graphs, max_len=40))
        assert all(one.report.graphs == 3 and one.report.pool_bytes > 0 for one in graphs)
        if dtype == "float32":
            for one, other in zip(eager, captured, strict=True):
                assert (one - other).abs().max().item() <= tolerance * max(1.0, one.abs().max().item())
        else:
            # Rounded differently, tokens part; what the first step gives is what the two have in common.
            first = next(index for index, task in enumerate(job.tasks()) if not task.is_prefill) * len(stages)
            assert disagreement(eager[first], captured[first]) <= tolerance


@pytest.mark.gpu
def test_tokens_are_chosen_as_the_first_job_wants_it_and_left_to_other_jobs(tmp_path: Path) -> None:
    gpu, job = DeviceContext("cuda:0", num_threads=1), job_of()
    (stage,) = stages_of(save_tiny_model(tmp_path / "llama", "llama"), (0, 6), gpu)
    graphs, slots = DecodeGraphs(stage, gpu), [stage.new_cache(rows=3, max_len=30) for _ in range(2)]
    task = next(task for task in job.tasks() if not task.is_prefill)
    inputs = MicroBatchInputs.build(job.prompts[:3], output_len=9, pad_token_id=0, device=gpu.torch_device)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, device=gpu.torch_device)
    drawn, cold = Sampling(temperature=3.0), Sampling(temperature=0.1)
    for wanted in (drawn, cold, None, drawn):
        graphs.prepare(slots, job.tasks(), wanted)
        logits = graphs.run(task, inputs, None, u)
        assert logits is not None
        assert (graphs.chosen is not None) == (wanted == drawn)
        if graphs.chosen is not None:
            assert torch.equal(graphs.chosen, draw(logits, u, drawn))
            assert not torch.equal(graphs.chosen, logits.argmax(-1))
    graphs.run(next(task for task in job.tasks() if task.is_prefill), inputs, None)
    assert graphs.chosen is None


@pytest.mark.gpu
def test_a_step_that_asks_the_host_is_refused_before_it_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = DeviceContext("cuda:0", num_threads=1)
    (stage,) = stages_of(save_tiny_model(tmp_path / "llama", "llama"), (0, 6), gpu)
    forward = Stage.forward

    def asking(self: Stage, ids: torch.Tensor, *args: Any) -> torch.Tensor:
        output = forward(self, ids, *args)
        return output if output.sum().item() != 0.25 else output * 2

    monkeypatch.setattr(Stage, "forward", asking)
    graphs = DecodeGraphs(stage, gpu)
    slots = [stage.new_cache(rows=3, max_len=30) for _ in range(2)]
    graphs.prepare(slots, job_of().tasks())
    assert len(graphs.notes) == 1
    assert "synchroniz" in graphs.notes[0]
    # The allocator is whole: it gives memory back, and other graphs can be captured.
    torch.cuda.empty_cache()
    monkeypatch.setattr(Stage, "forward", forward)
    graphs = DecodeGraphs(stage, gpu)
    graphs.prepare(slots, job_of().tasks())
    assert graphs.notes == ()
    assert graphs.report.graphs == 3


@pytest.mark.gpu
def test_a_graph_that_does_not_repeat_its_step_to_the_bit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = DeviceContext("cuda:0", num_threads=1)
    (stage,) = stages_of(save_tiny_model(tmp_path / "llama", "llama"), (0, 6), gpu)
    run = StaticStep.run
    monkeypatch.setattr(StaticStep, "run", lambda step: run(step) * (1 + 1e-6))
    graphs = DecodeGraphs(stage, gpu)
    graphs.prepare([stage.new_cache(rows=3, max_len=30) for _ in range(2)], job_of().tasks())
    assert graphs.notes == ("cuda_graphs: eager on this stage: a captured step differs from the same step as it is",)


def test_tiny_windows_are_exceeded() -> None:
    longest = max(len(prompt) for prompt in job_of().prompts)
    assert (getattr(tiny_config("gemma2"), "sliding_window", None) or 0) < longest


def test_on_a_cpu_nothing_grows() -> None:
    assert outside_bytes(DeviceContext("cpu:0", num_threads=1)) == 0
