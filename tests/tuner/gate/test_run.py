"""A gate as it runs: its randomised order, its looks, what stops it, and what it leaves to be read."""

from __future__ import annotations

import io
import json
import math
import time
from typing import Any

import pytest
from rich.console import Console

from pipetune.bench.record import FailureKind, Machine
from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate.run import Gate
from pipetune.tuner.gate.values import REHEARSAL, Case, GateResult, Reason, Sample, SideName, Verdict
from pipetune.tuner.progress import PlainReporter, Reporter
from tests.record_factory import make_failure, make_machine
from tests.tuner.gate.factory import make_case, make_sample
from tests.tuner.gate.fakes import Answer, FakeRunner, equal

METRIC = "mean_ttft_ms"
ONE = (make_case(),)


def run(answer: Answer = equal, cases: tuple[Case, ...] = ONE, **options: Any) -> tuple[GateResult, FakeRunner]:
    machines: dict[SideName, Machine | None] | None = options.pop("machines", None)
    runner = FakeRunner(answer, machines)
    result = Gate(cases=cases, runner=runner, **({"seed": 1} | options)).run(Reporter())
    assert not runner.open
    return result, runner


def worse_by(share: float, metric: str = METRIC, case: str = "small") -> Answer:
    def answer(where: Case, name: SideName, number: int) -> Sample:
        sample = equal(where, name, number)
        if name == "baseline" or where.name != case:
            return sample
        return sample.model_copy(update={"metrics": sample.metrics | {metric: sample.metrics[metric] * (1 + share)}})

    return answer


def failing(side: SideName, at: int) -> Answer:
    def answer(case: Case, name: SideName, number: int) -> Sample:
        return make_sample() if name == side and number == at else equal(case, name, number)

    return answer


def test_equal_sides_pass_after_a_rehearsal_and_the_first_look() -> None:
    result, runner = run()
    assert (result.verdict, result.exit_code, len(result.pairs)) == (Verdict.OK, 0, 8)
    assert runner.asked[:2] == [("small", "baseline", True), ("small", "candidate", True)]
    assert [check for *_, check in runner.asked[2:]] == [False] * 16


def test_the_seed_alone_says_who_runs_first() -> None:
    firsts = {seed: [pair.first for pair in run(seed=seed)[0].pairs] for seed in range(5)}
    result, runner = run(seed=3)
    assert [pair.first for pair in result.pairs] == firsts[3]
    assert [name for _, name, _ in runner.asked[2::2]] == firsts[3]
    assert len({tuple(order) for order in firsts.values()}) > 3
    assert result.order_seed == 3


def test_a_decided_case_costs_nothing_more_and_does_not_change_the_order_of_another() -> None:
    cases = (make_case("bad"), make_case("good"))
    both, runner = run(worse_by(0.2, case="bad"), cases)
    assert [finding.verdict for finding in both.findings] == [Verdict.FAIL, Verdict.OK]
    # Of two hypotheses, eight pairs tell nothing yet.
    assert {case.name: sum(pair.case == case.name for pair in both.pairs) for case in cases} == {"bad": 12, "good": 12}
    late, _ = run(failing("candidate", 2), cases)
    assert [pair.first for pair in late.pairs if pair.case == "good"][:2] == [
        pair.first for pair in both.pairs if pair.case == "good"
    ][:2]
    assert len(runner.asked) == 2 * (2 + 12 + 12)


def test_a_failed_metric_settles_its_case_and_not_the_others() -> None:
    metrics = {METRIC: Tolerance(), "peak_memory_bytes": Tolerance()}
    shaky = [100.0, 97.0, 109.0, 103.0, 106.0]

    def answer(case: Case, name: SideName, number: int) -> Sample:
        memory = shaky[(number + 2 * (name == "candidate")) % 5] * (1.02 if name == "candidate" else 1.0)
        return make_sample({METRIC: 150.0 if name == "candidate" else 100.0 + number, "peak_memory_bytes": memory})

    result, _ = run(answer, (make_case(metrics=metrics),))
    assert [finding.reason for finding in result.findings] == [Reason.WORSE, Reason.SETTLED]
    assert (result.verdict, len(result.pairs)) == (Verdict.FAIL, 12)


@pytest.mark.parametrize(
    ("side", "verdict", "code", "reason"),
    [
        ("candidate", Verdict.FAIL, 1, Reason.CANDIDATE_FAILED),
        ("baseline", Verdict.INCONCLUSIVE, 3, Reason.BASELINE_FAILED),
    ],
)
@pytest.mark.parametrize("at", [0, 4])
def test_a_side_that_fails_ends_it_in_rehearsal_and_later(
    side: SideName, verdict: Verdict, code: int, reason: Reason, at: int
) -> None:
    result, _ = run(failing(side, at))
    assert (result.verdict, result.exit_code, result.findings[0].reason) == (verdict, code, reason)
    assert len(result.pairs) == max(1, at)
    assert (result.pairs[-1].number == REHEARSAL) == (at == 0)
    assert result.findings[0].text.startswith("rehearsal, " if at == 0 else "pair 4, ")


def test_when_neither_side_runs_the_candidate_is_not_blamed() -> None:
    result, _ = run(lambda case, name, number: make_sample())
    assert result.findings[0].reason is Reason.BASELINE_FAILED


def test_what_is_no_number_is_inconclusive_and_survives_json() -> None:
    def answer(case: Case, name: SideName, number: int) -> Sample:
        return make_sample({METRIC: math.nan}) if number == 3 else equal(case, name, number)

    result, _ = run(answer)
    assert (result.exit_code, result.findings[0].reason) == (3, Reason.NOT_FINITE)
    text = result.model_dump_json()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    again = GateResult.model_validate_json(text)
    assert math.isnan(again.pairs[-1].baseline.metrics[METRIC])
    assert again.findings == result.findings


@pytest.mark.parametrize("at", [0, 4])
def test_a_run_that_says_nothing_of_its_side_blames_nobody(at: int) -> None:
    def answer(case: Case, name: SideName, number: int) -> Sample:
        if (name, number) != ("candidate", at):
            return equal(case, name, number)
        return make_sample({}, not_comparable="it did not get its GPU")

    result, _ = run(answer)
    assert (result.exit_code, result.findings[0].reason) == (3, Reason.NOT_COMPARABLE)
    assert "it did not get its GPU" in result.findings[0].text
    assert (result.pairs[-1].number == REHEARSAL) == (at == 0)


def test_sides_that_are_not_ready_in_time_are_not_judged() -> None:
    runner = FakeRunner(equal)
    runner.getting_ready_s = 3600.0
    result = Gate(cases=ONE, runner=runner, seed=1, max_minutes=30.0).run(Reporter())
    assert (result.exit_code, result.findings[0].reason) == (3, Reason.OUT_OF_TIME)
    assert (runner.asked, runner.open, result.machines, result.notes) == ([], False, {}, ())


def test_no_minute_starts_nothing_and_says_so() -> None:
    result, runner = run(max_minutes=0.0)
    assert (result.exit_code, result.findings[0].reason) == (3, Reason.OUT_OF_TIME)
    assert runner.asked == []


def test_a_pair_that_would_not_fit_is_not_begun() -> None:
    # A pair takes 24 s by the samples' own words.
    result, runner = run(max_minutes=0.3)
    assert [finding.reason for finding in result.findings] == [Reason.OUT_OF_TIME]
    assert len(runner.asked) == 2


def test_a_run_that_the_deadline_ended_is_not_held_against_the_side() -> None:
    def answer(case: Case, name: SideName, number: int) -> Sample:
        if name == "candidate" and number == 1:
            time.sleep(0.3)
            return make_sample(failure=make_failure(FailureKind.TIMEOUT))
        return equal(case, name, number).model_copy(update={"wall_s": 0.0})

    result, _ = run(answer, max_minutes=0.2 / 60)
    assert (result.verdict, result.findings[0].reason) == (Verdict.INCONCLUSIVE, Reason.OUT_OF_TIME)
    assert result.pairs == ()


def test_software_is_shown_and_hardware_decides() -> None:
    one = make_machine()
    other = one.model_copy(
        update={"software": one.software.model_copy(update={"packages": {**one.software.packages, "torch": "2.11.0"}})}
    )
    result, _ = run(machines={"baseline": one, "candidate": other})
    assert result.exit_code == 0
    assert result.notes == ("software differs: packages.torch: 2.13.0+cpu → 2.11.0",)
    result, _ = run(machines={"baseline": None, "candidate": one})
    assert result.notes == ("what the baseline runs on could not be read from it",)

    def elsewhere(case: Case, name: SideName, number: int) -> Sample:
        update = {"hardware_id": "another" if name == "candidate" else "abc"}
        return equal(case, name, number).model_copy(update=update)

    assert run(elsewhere)[0].findings[0].reason is Reason.OTHER_HARDWARE


def test_disturbed_runs_are_counted_in_a_note() -> None:
    def answer(case: Case, name: SideName, number: int) -> Sample:
        disturbances = ("make (pid 5) took a core",) if number == 2 else ()
        return equal(case, name, number).model_copy(update={"disturbances": disturbances})

    (note,) = run(answer)[0].notes
    assert note == "small: 2 of 16 runs were disturbed: make (pid 5) took a core, for one"


def test_before_it_goes_on_it_says_how_long_it_may_take() -> None:
    console = Console(file=io.StringIO(), width=80)
    Gate(cases=ONE, runner=FakeRunner(equal), seed=1, max_minutes=30).run(PlainReporter(console))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "8 to 24 pairs of about 24 s: 3 to 10 minutes from here, and no more than 30 in all" in text
    assert text.index("rehearsal") < text.index("8 to 24 pairs") < text.index("pair 1 ·")


@pytest.mark.parametrize(
    ("minutes", "told"),
    [
        (2, "the time is too short to decide: 5 of the 8 pairs fit that it takes at least; --max-minutes 4 has room"),
        (30, "the time is enough for 24 pairs; 8 may decide"),
    ],
)
def test_after_the_first_pair_it_says_whether_its_time_can_decide(minutes: float, told: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    Gate(cases=ONE, runner=FakeRunner(equal), seed=1, max_minutes=minutes).run(PlainReporter(console))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.index("pair 1 ·") < text.index(told) < text.index("pair 2 ·")
    assert "  1 of at most 24 pairs\n" in text
    assert "  2 of at most 24 pairs · about 0 s left\n" in text
