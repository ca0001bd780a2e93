"""The GPU check's report and arithmetic, which need no GPU."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.machine.hardware import read_machine
from pipetune.bench.memory import LayerShape, ModelShape
from pipetune.bench.record import Iteration, Measurement, TaskShape
from tests.evaluation.gpu.report import aim_line, render
from tests.evaluation.gpu.roofline import bandwidth_share, decode_step_s, step_bytes
from tests.evaluation.gpu.timing import busy_s
from tests.evaluation.gpu.values import Aim, Report, Section


def shape(*, tied: bool = False) -> ModelShape:
    return ModelShape(
        architecture="LlamaForCausalLM",
        num_parameters=1,
        layers_prefix="model.layers",
        first_modules=(),
        last_modules=(),
        embedding_bytes=1000,
        head_bytes=0 if tied else 1000,
        other_bytes=10,
        tied=tied,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=1,
        vocab_size=8,
        dtype_bytes=2,
        layers=(LayerShape(weight_bytes=300, active_params=1, kv_bytes_per_token=4),) * 2,
    )


def test_a_step_reads_all_weights_but_the_embeddings_rows() -> None:
    for tied in (False, True):
        assert step_bytes(shape(tied=tied), batch=3, prompt_len=10, output_len=4) == 2 * 300 + 10 + 1000 + 3 * 12 * 8


def test_the_share_is_bytes_over_time_over_bandwidth() -> None:
    assert bandwidth_share(6_000_000_000, 0.002, 4e12) == 0.75


@given(
    step_s=st.floats(1e-4, 1.0),
    steps=st.integers(1, 20),
    prefill_s=st.floats(0.0, 10.0),
    pieces=st.integers(1, 3),
)
def test_a_decode_step_is_what_lies_between_tokens(step_s: float, steps: int, prefill_s: float, pieces: int) -> None:
    tasks = [TaskShape(micro_batch=0, step=0, first_row=row, end_row=row + 1) for row in range(pieces)]
    tasks += [TaskShape(micro_batch=0, step=step, first_row=0, end_row=pieces) for step in range(1, steps + 1)]
    times = [prefill_s * (row + 1) / pieces for row in range(pieces)]
    times += [prefill_s + step_s * step for step in range(1, steps + 1)]
    slow = [2 * time for time in times]
    measurement = Measurement(
        prompt_lens=(5,) * pieces,
        order=tuple(range(pieces)),
        output_len=steps + 1,
        micro_batch_sizes=(pieces,),
        tasks=tuple(tasks),
        iterations=tuple(
            Iteration(duration_s=row[-1], token_times_s=tuple(row), stages=()) for row in (times, slow, times)
        ),
    )
    assert abs(decode_step_s(measurement) - step_s) <= 1e-9 + 1e-6 * step_s


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_what_overlaps_is_busy_once(spans: list[tuple[int, int]]) -> None:
    moments = {moment for begin, length in spans for moment in range(begin, begin + length)}
    assert round(busy_s([(begin, begin + length) for begin, length in spans]) * 1e6) == len(moments)


def test_the_report_shows_aims_tables_and_why_something_is_missing() -> None:
    missed = Aim(text="7B shape", is_met=False, seen="41.0%")
    report = Report(
        started_at="2026-11-23T10:00:00+00:00",
        wall_s=12.0,
        machine=read_machine(),
        sections=(
            Section(
                name="decode-large", status="done", rows=({"how": "a|b", "share": 0.41234}, {"x": True}), aims=(missed,)
            ),
            Section(name="equality-nccl-fp32", status="skipped", error="one GPU\nand an old NCCL", notes=("<b>",)),
        ),
    )
    text = render(report)
    assert "| 7B shape | 41.0% | **missed** |" in text
    assert "| how | share | x |" in text
    assert "| a\\|b | 0.4123 |  |" in text
    assert "|  |  | yes |" in text
    assert "skipped, 0 s\n\n```\none GPU\nand an old NCCL\n```" in text
    assert "- &lt;b>" in text
    assert aim_line(missed) == "MISSED  7B shape: 41.0%"
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_a_missed_aim_of_speed_is_nothing_wrong() -> None:
    slow = Aim(text="fast", is_met=False, seen="slow")
    assert not Section(name="a", status="done", aims=(slow,)).is_wrong
    assert Section(name="a", status="done", aims=(slow.model_copy(update={"proves_correctness": True}),)).is_wrong
    assert Section(name="a", status="failed").is_wrong
    assert not Section(name="decode-small", status="out of time").is_wrong
    assert Section(name="equality-nccl-fp32", status="out of time").is_wrong
