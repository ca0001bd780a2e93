"""A whole study on a fake fleet: its order, its records, its failures, and every way to stop and go on."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipetune.bench import metrics
from pipetune.bench.errors import FleetError, ModelError, NothingFeasibleError, StudyError
from pipetune.bench.profile import Profile
from pipetune.bench.record import Failure, FailureKind, Measurement, Record
from pipetune.bench.spec import Plan, RunSpec
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.progress import PlainReporter, Reporter
from pipetune.tuner.search.driver import baseline_batch_sizes, rank_study, run_study
from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.policy.strategy import Strategy
from pipetune.tuner.search.policy.tpe import TpePolicy
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.files import load_records, read, was_interrupted
from pipetune.tuner.study.search_log import Proposal, SearchLog
from pipetune.tuner.study.store import StudyStore
from tests.tuner.fake_fleet import Lab, failure

MIB = 2**20


class Killed(BaseException):
    """The driver's end, as by `kill -9`: nothing handles it."""


def config(**values: Any) -> TuneConfig:
    usual = {"n_trials": 5, "stop_early": False, "finalists": 2, "finalist_rounds": 2, "max_finalist_rounds": 2}
    return TuneConfig.model_validate({"model": {"name": "m"}, "devices": "cpu:0-1", **usual, **values})


def study(folder: Path, lab: Lab, wanted: TuneConfig, *, resume: bool = False) -> tuple[bool, tuple[Record, ...]]:
    with StudyStore.resume(folder, wanted) if resume else StudyStore.create(folder, wanted) as store:
        finished = run_study(store, Reporter(), start_fleet=lab.start)
        return finished, store.records


def roles(records: Sequence[Record]) -> Counter[str]:
    return Counter(record.role for record in records)


def test_a_study_runs_in_its_order(tmp_path: Path) -> None:
    lab = Lab()
    finished, records = study(tmp_path / "s", lab, config())
    assert finished
    order = list(dict.fromkeys(record.role for record in records))
    assert order == ["baseline", "single_stage", "trial", "finalist"]
    assert roles(records) == {"baseline": 3, "single_stage": 1, "trial": 5, "finalist": 8}
    assert [record.params["batch_size"] for record in records[:3] if record.params] == [32, 16, 8]
    assert lab.calls[:2] == ["profile", "reference"]
    assert lab.calls.count("profile") == lab.calls.count("reference") == 1
    # The finals run on a fresh fleet that knows the reference.
    assert lab.starts == 2
    assert lab.calls.count("use_reference") == 1
    assert load_records(tmp_path / "s") == records
    trials = [record for record in records if record.role == "trial"]
    assert [record.trial_number for record in trials] == [0, 1, 2, 3, 4]
    assert len({record.effective.key for record in trials if record.effective}) >= 4
    assert {record.spec.model.revision for record in trials if record.spec} == {lab.revision}


def test_a_study_is_profiled_once_and_keeps_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    study(tmp_path / "s", lab, config(n_trials=2, finalists=0))
    profile = Profile.model_validate_json((tmp_path / "s/profile.json").read_bytes())
    assert profile.devices[0].layers[0].layers == tuple(range(30))
    # Another study on this machine finds it in the cache, and a resume beside its records.
    study(tmp_path / "other", lab, config(n_trials=2, finalists=0))
    monkeypatch.setenv("PIPETUNE_CACHE", str(tmp_path / "empty"))
    study(tmp_path / "s", lab, config(n_trials=3, finalists=0), resume=True)
    assert lab.calls.count("profile") == 1
    assert (tmp_path / "other/profile.json").read_bytes() == (tmp_path / "s/profile.json").read_bytes()


def test_a_damaged_reference_is_made_anew_and_burns_no_trial(tmp_path: Path) -> None:
    lab = Lab()
    study(tmp_path / "s", lab, config(n_trials=1, finalists=0))
    (tmp_path / "s/reference.safetensors").write_bytes(b"refer")
    _, records = study(tmp_path / "s", lab, config(n_trials=3, finalists=0), resume=True)
    assert lab.calls.count("reference") == 2
    assert [type(record.result) for record in records if record.role == "trial"] == [Measurement] * 3
    (tmp_path / "s/reference.safetensors").unlink()
    (tmp_path / "s/reference.safetensors").mkdir()
    with pytest.raises(StudyError):
        study(tmp_path / "s", lab, config(n_trials=4, finalists=0), resume=True)


def test_a_profile_makes_the_first_prediction_good(tmp_path: Path) -> None:
    _, records = study(tmp_path / "s", Lab(), config(n_trials=4, finalists=0))
    log = read(tmp_path / "s/search.json", SearchLog)
    measured = {record.trial_number: record.result for record in records if record.role == "trial"}
    for entry in log.entries:
        result = measured[entry.trial_number]
        assert isinstance(result, Measurement)
        throughput = metrics.derive(result)["output_throughput"]
        assert entry.predicted["output_throughput"] == pytest.approx(throughput, rel=0.1)


def test_a_profile_that_fails_is_no_reason_to_stop(tmp_path: Path) -> None:
    lab = Lab()
    lab.profile_fault = failure(FailureKind.OUT_OF_MEMORY)
    finished, records = study(tmp_path / "s", lab, config(n_trials=2))
    assert finished
    assert roles(records)["trial"] == 2
    assert not (tmp_path / "s/profile.json").exists()
    _, more = study(tmp_path / "t", lab, config(n_trials=1, profile=False, finalists=0))
    assert lab.calls.count("profile") == 1
    assert roles(more)["trial"] == 1


def test_the_diary_says_why_each_trial_ran_why_the_search_ended_and_where_the_time_went(tmp_path: Path) -> None:
    _, records = study(tmp_path / "s", Lab(), config(n_trials=30, stop_early=True))
    log = read(tmp_path / "s/search.json", SearchLog)
    trials = [record for record in records if record.role == "trial"]
    assert [entry.trial_number for entry in log.entries] == [record.trial_number for record in trials]
    assert [entry.point for entry in log.entries] == [record.params for record in trials]
    assert all(entry.reason and entry.predicted["output_throughput"] > 0 for entry in log.entries)
    assert len(trials) < 30
    assert log.stop is not None
    assert log.stop.kind == "converged"
    assert set(log.seconds) == {
        *("start", "profile", "reference", "baseline", "single_stage", "trials", "search", "finals")
    }


def test_replaying_a_studys_records_gives_its_proposals(tmp_path: Path) -> None:
    lab = Lab()
    _, records = study(tmp_path / "s", lab, config(n_trials=10, finalists=0))
    log = read(tmp_path / "s/search.json", SearchLog)
    space = read(tmp_path / "s/space.json", SearchSpace)
    profile = read(tmp_path / "s/profile.json", Profile)
    workload = config().workload
    fleet = lab.start(config().model, ("cpu:0", "cpu:1"))
    lens = fleet.prompt_lens(workload)
    replay = OptunaStudy.open(
        f"sqlite:///{tmp_path / 'replay.db'}", space, objectives=("output_throughput",), constraints=()
    )
    strategy = Strategy(
        space,
        CostModel.of_workload(lab.shape, workload, lens, ProfiledCosts(profile)),
        Resolver.of_workload(lab.shape, workload, lens, fleet.device_bytes),
        objectives=("output_throughput",),
        constraints=(),
        n_trials=10,
        seed=0,
        stop_early=False,
        suggest=TpePolicy(space, objectives=("output_throughput",), seed=0, trials=replay.trials).suggest,
    )
    first = next(record.number for record in records if record.role == "trial")
    for entry, record in zip(log.entries, records[first:], strict=True):
        step = strategy.next(records[: record.number])
        assert isinstance(step, Proposal)
        assert (step.point, step.kind, step.reason) == (entry.point, entry.kind, entry.reason)
        assert step.predicted == pytest.approx(entry.predicted)
        assert replay.ask(step.point) == record.trial_number
        replay.tell(record)
    replay.close()


def test_replicas_are_tried_beside_pipelines(tmp_path: Path) -> None:
    _, records = study(tmp_path / "s", Lab(), config(n_trials=6))
    trials = [record for record in records if record.role == "trial" and record.spec]
    assert {record.spec.plan.replicas for record in trials if record.spec} == {1, 2}
    (tmp_path / "s/study.db").unlink()
    _, more = study(tmp_path / "s", Lab(), config(n_trials=8), resume=True)
    assert more[: len(records)] == records
    assert roles(more)["trial"] == 8


def test_switches_of_the_space_hold_for_the_single_stage_too(tmp_path: Path) -> None:
    space = {"compile": True, "packed_weights": False, "replicas": [1]}
    _, records = study(tmp_path / "s", Lab(), config(space=space))
    plans = [record.spec.plan for record in records if record.spec]
    assert plans
    assert all(plan.compile and not plan.packed_weights and plan.replicas == 1 for plan in plans)


def test_texts_are_scored_by_all_their_tokens(tmp_path: Path) -> None:
    wanted = config(workload={"kind": "score", "num_prompts": 8, "input_len": 256}, n_trials=6)
    _, records = study(tmp_path / "s", Lab(), wanted)
    measured = [record.result for record in records if isinstance(record.result, Measurement)]
    assert {result.output_len for result in measured} == {0}
    assert {record.spec.plan.prefill_chunk_size is None for record in records if record.spec} == {True, False}
    with StudyStore.resume(tmp_path / "s", wanted) as store:
        best = rank_study(store).best
    assert best is not None
    assert best.value == best.metrics["total_token_throughput"]


def test_a_lost_space_is_no_reason_to_guess_what_points_meant(tmp_path: Path) -> None:
    study(tmp_path / "s", Lab(), config(n_trials=2, finalists=0))
    (tmp_path / "s/space.json").unlink()
    with pytest.raises(StudyError, match=r"space\.json is missing, and the points of 2 records refer to it"):
        study(tmp_path / "s", Lab(), config(n_trials=4, finalists=0), resume=True)


def test_a_resume_names_a_damaged_file_and_goes_on_once_it_is_put_back(tmp_path: Path) -> None:
    lab, folder = Lab(), tmp_path / "s"
    _, before = study(folder, lab, config(n_trials=1, finalists=0))
    for name, damaged in {
        "space.json": b'{"partitions": [[30], [1, 2]]}',
        "profile.json": b"{",
        "search.json": b"\x00\xff",
        "machine.json": b"[]",
        "records/0000.json": b"",
    }.items():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(damaged)
        with pytest.raises(StudyError, match=f"{name} is cut off or no .*; move it away to go on without it"):
            study(folder, lab, config(n_trials=2, finalists=0), resume=True)
        assert (folder / name).read_bytes() == damaged
        (folder / name).write_bytes(whole)
    # The database holds nothing that the records do not.
    database = (folder / "study.db").read_bytes()
    database = database[:4096] + b"\xff" * 4096 + database[8192:]
    (folder / "study.db").write_bytes(database)
    _, records = study(folder, lab, config(n_trials=2, finalists=0), resume=True)
    assert (folder / "study.db.broken").read_bytes() == database
    assert records[: len(before)] == before
    assert [record.trial_number for record in records if record.role == "trial"] == [0, 1]


def test_the_single_stage_takes_the_best_batch_of_the_baseline(tmp_path: Path) -> None:
    lab = Lab()
    _, records = study(tmp_path / "s", lab, config())
    best = max(
        (record for record in records if record.role == "baseline"),
        key=lambda record: -record.result.iterations[0].duration_s if isinstance(record.result, Measurement) else 0,
    )
    single = next(record for record in records if record.role == "single_stage")
    assert single.spec is not None
    assert best.params is not None
    assert single.spec.plan.layer_counts == (30,)
    assert single.spec.plan.micro_batch_size == best.params["batch_size"]


def test_finals_are_rounds_of_the_best_the_single_stage_and_the_baseline(tmp_path: Path) -> None:
    _, records = study(tmp_path / "s", Lab(), config())
    finals = [record for record in records if record.role == "finalist"]
    by_round = {number: [record for record in finals if record.round == number] for number in (0, 1)}
    for rows in by_round.values():
        assert len(rows) == 4
        assert sum(record.spec is None for record in rows) == 1
        assert sum(len(record.spec.plan.devices) == 1 for record in rows if record.spec) == 1
        assert all(isinstance(record.result, Measurement) and len(record.result.iterations) == 1 for record in rows)
        assert all(record.replicate_of is not None for record in rows if record.spec)


def test_finals_may_be_left_out(tmp_path: Path) -> None:
    lab = Lab()
    _, records = study(tmp_path / "s", lab, config(finalists=0))
    assert "finalist" not in roles(records)
    assert lab.starts == 1


def test_a_failed_plan_is_recorded_and_not_run_again(tmp_path: Path) -> None:
    lab = Lab()
    lab.fault = lambda spec, number: (
        failure(FailureKind.WRONG_OUTPUT) if spec.plan.micro_batch_size == 16 and len(spec.plan.stages) == 2 else None
    )
    _, records = study(tmp_path / "s", lab, config(n_trials=12))
    trials = [record for record in records if record.role == "trial"]
    broken = [record for record in trials if isinstance(record.result, Failure)]
    assert broken
    assert len(trials) == 12
    assert max(Counter(record.effective.key for record in broken if record.effective).values()) == 1
    # What broke twice with a trait, and never worked with it, is left alone.
    assert len(broken) <= 3


def test_a_plan_that_lost_its_worker_gets_a_second_chance(tmp_path: Path) -> None:
    lab = Lab()
    lab.fault = lambda spec, number: failure(FailureKind.WORKER_DIED) if number == 2 else None
    _, records = study(tmp_path / "s", lab, config())
    trials = [record for record in records if record.role == "trial"]
    lost = next(index for index, record in enumerate(trials) if isinstance(record.result, Failure))
    assert trials[lost + 1].params == trials[lost].params
    assert isinstance(trials[lost + 1].result, Measurement)
    assert trials[lost + 1].replicate_of == trials[lost].number
    # The loss costs a retry, not a trial.
    assert sum(isinstance(record.result, Measurement) for record in trials) == 5


def test_a_baseline_and_a_single_stage_that_lost_their_worker_are_run_again(tmp_path: Path) -> None:
    lab, left = Lab(), {"baseline": 1, "single": 1}

    def lose(name: str) -> Failure | None:
        left[name] -= 1
        return failure(FailureKind.WORKER_DIED) if left[name] >= 0 else None

    lab.baseline_fault = lambda batch_size: lose("baseline") if batch_size == 32 else None
    lab.fault = lambda spec, number: lose("single") if len(spec.plan.stages) == 1 else None
    _, records = study(tmp_path / "s", lab, config(n_trials=1))
    for role, size in (("baseline", 32), ("single_stage", None)):
        runs = [one for one in records if one.role == role and (one.params or {}).get("batch_size") == size]
        assert [type(one.result) for one in runs] == [Failure, Measurement]


def test_a_loss_that_the_driver_did_not_outlive_is_made_good_by_a_resume(tmp_path: Path) -> None:
    whole = study(tmp_path / "s", Lab(), config(n_trials=1))[1]
    for record in whole:
        if record.role in ("baseline", "single_stage"):
            lost = record.model_copy(update={"result": failure(FailureKind.WORKER_HUNG)})
            (tmp_path / "s" / "records" / f"{record.number:04}.json").write_text(lost.model_dump_json())
    _, again = study(tmp_path / "s", Lab(), config(n_trials=1), resume=True)
    added = [record for record in again[len(whole) :] if record.role in ("baseline", "single_stage")]
    assert len(added) == sum(record.role in ("baseline", "single_stage") for record in whole)
    assert all(isinstance(record.result, Measurement) for record in added)
    assert study(tmp_path / "s", Lab(), config(n_trials=1), resume=True)[1] == again


def test_a_round_of_the_finals_that_lost_its_worker_is_run_again(tmp_path: Path) -> None:
    lab, lost = Lab(), list[Plan]()

    def fault(spec: Any, number: int) -> Failure | None:
        if spec.protocol.check_outputs or lost:
            return None
        lost.append(spec.plan)
        return failure(FailureKind.WORKER_DIED)

    lab.fault = fault
    _, records = study(tmp_path / "s", lab, config(finalists=2, finalist_rounds=2))
    (place,) = [
        index for index, one in enumerate(records) if one.role == "finalist" and isinstance(one.result, Failure)
    ]
    again = records[place + 1]
    assert (again.round, again.spec and again.spec.plan) == (records[place].round, lost[0])
    assert isinstance(again.result, Measurement)


def test_a_plan_that_always_kills_its_worker_gets_no_third_chance(tmp_path: Path) -> None:
    lab = Lab()
    lab.fault = lambda spec, number: (
        failure(FailureKind.WORKER_DIED) if spec.plan.micro_batch_size == 16 and spec.plan.replicas == 2 else None
    )
    _, records = study(tmp_path / "s", lab, config(n_trials=10))
    lost = [record for record in records if record.role == "trial" and isinstance(record.result, Failure)]
    assert lost
    assert set(Counter(record.effective.key for record in lost if record.effective).values()) == {2}
    finished, again = study(tmp_path / "s", lab, config(n_trials=10), resume=True)
    assert finished
    assert again == records


def test_a_machine_that_loses_every_worker_ends_the_study(tmp_path: Path) -> None:
    lab = Lab()
    lab.fault = lambda spec, number: failure(FailureKind.WORKER_HUNG)
    with pytest.raises(FleetError, match="made worker_hung"):
        study(tmp_path / "s", lab, config(n_trials=50))
    records = load_records(tmp_path / "s")
    assert 5 <= len(records) < 12


def test_out_of_memory_costs_the_plan_only(tmp_path: Path) -> None:
    lab = Lab()
    lab.fault = lambda spec, number: (
        failure(FailureKind.OUT_OF_MEMORY, bytes_wanted=3, bytes_had=2) if spec.plan.micro_batch_size > 8 else None
    )
    finished, records = study(tmp_path / "s", lab, config(n_trials=15))
    best = next(record for record in reversed(records) if record.role == "finalist" and record.spec)
    assert finished
    assert best.spec is not None
    assert best.spec.plan.micro_batch_size <= 8


def test_predicted_overruns_are_recorded_without_running(tmp_path: Path) -> None:
    lab = Lab()
    lab.device_bytes = 480 * MIB
    _, records = study(tmp_path / "s", lab, config(n_trials=8))
    refused = [record for record in records if isinstance(record.result, Failure)]
    assert all(record.result.phase == "plan" for record in refused if isinstance(record.result, Failure))
    assert any(record.role == "single_stage" for record in refused)
    ran = [record for record in records if record.role == "trial" and isinstance(record.result, Measurement)]
    assert len(ran) == 8


def test_nothing_fits_is_no_search(tmp_path: Path) -> None:
    lab = Lab()
    lab.device_bytes = 20 * MIB
    with pytest.raises(NothingFeasibleError, match="fits into memory"):
        study(tmp_path / "s", lab, config())


def test_a_baseline_that_does_not_fit_is_tried_smaller(tmp_path: Path) -> None:
    lab = Lab()
    lab.baseline_fault = lambda size: failure(FailureKind.OUT_OF_MEMORY) if size > 3 else None
    _, records = study(tmp_path / "s", lab, config(finalists=0))
    sizes = [record.params["batch_size"] for record in records if record.role == "baseline" and record.params]
    assert sizes == [32, 16, 8, 4, 2]
    single = next(record for record in records if record.role == "single_stage")
    assert single.spec is not None
    assert single.spec.plan.micro_batch_size == 2


def test_a_small_space_is_tried_whole_and_the_search_ends(tmp_path: Path) -> None:
    space = {"min_stages": 2, "micro_batch_sizes": [16], "prefill_micro_batch_sizes": [8], "memory_fractions": [0.9]}
    _, records = study(tmp_path / "s", Lab(), config(n_trials=99, space=space, finalists=0))
    cuts = {record.spec.plan.layer_counts for record in records if record.role == "trial" and record.spec}
    assert cuts == {(first, 30 - first) for first in range(1, 30)}
    assert roles(records)["trial"] == 29


def test_a_timeout_bounds_the_trials_and_not_the_rest(tmp_path: Path) -> None:
    _, records = study(tmp_path / "s", Lab(), config(timeout_s=1e-6))
    assert roles(records) == {"baseline": 3, "single_stage": 1, "finalist": 4}


def test_several_objectives_and_constraints(tmp_path: Path) -> None:
    wanted = config(objectives=["output_throughput", "mean_ttft_ms"], constraints=["mean_ttft_ms<=2600"], n_trials=10)
    with StudyStore.create(tmp_path / "s", wanted) as store:
        run_study(store, Reporter(), start_fleet=Lab().start)
        best = rank_study(store).best
    assert best is not None
    assert best.metrics["mean_ttft_ms"] <= 2600


def test_a_model_that_cannot_be_split_is_the_models_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tuner.fake_fleet import FakeFleet

    monkeypatch.setattr(FakeFleet, "make_reference", lambda *args: failure(FailureKind.WRONG_OUTPUT))
    with pytest.raises(ModelError, match="made wrong_output"):
        study(tmp_path / "s", Lab(), config())
    assert load_records(tmp_path / "s") == ()


def test_the_first_plan_that_runs_is_the_reference_where_the_model_fits_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tuner.fake_fleet import FakeFleet

    monkeypatch.setattr(FakeFleet, "make_reference", lambda *args: failure(FailureKind.OUT_OF_MEMORY))
    lab = Lab()
    with StudyStore.create(tmp_path / "s", config(n_trials=3, finalists=0)) as store:
        assert run_study(store, PlainReporter(Console()), start_fleet=lab.start)
        first = next(record for record in store.records if record.role == "single_stage")
    assert first.effective is not None
    asked = [call for call in lab.calls if call.startswith(("reference", "measure"))]
    assert asked[:2] == [f"reference {first.effective.key}", f"measure {first.effective.key}"]
    assert not any(call.startswith("reference") for call in asked[1:])


@pytest.mark.parametrize("after", [0, 1, 2, 5, 8, 9, 12])
def test_a_killed_driver_goes_on_with_what_it_had(tmp_path: Path, after: int) -> None:
    """Whenever it dies, the resumed study ends with every run done once, and at most the running one is lost."""
    lab = Lab()

    def die(spec: RunSpec, number: int) -> Failure | None:
        if number == after:
            raise Killed
        return None

    lab.fault = die
    with pytest.raises(Killed):
        study(tmp_path / "s", lab, config(n_trials=8))
    before = load_records(tmp_path / "s")
    lab.fault = lambda spec, number: None
    finished, records = study(tmp_path / "s", lab, config(n_trials=8), resume=True)
    assert finished
    assert records[: len(before)] == before
    interrupted = [record for record in records if was_interrupted(record)]
    measured = [record for record in records if isinstance(record.result, Measurement)]
    assert roles(measured) == {"baseline": 3, "single_stage": 1, "trial": 8, "finalist": 8}
    assert len(interrupted) == (1 if 1 <= after <= 8 else 0)
    trials = [record for record in records if record.role == "trial"]
    assert sorted(record.trial_number or 0 for record in trials) == list(range(len(trials)))
    for record in interrupted:
        again = [other for other in measured if other.role == "trial" and other.params == record.params]
        assert again
    if after > 0:
        assert lab.calls.count("reference") == 1


def test_a_resumed_study_may_go_further(tmp_path: Path) -> None:
    lab = Lab()
    _, first = study(tmp_path / "s", lab, config(n_trials=4))
    finished, records = study(tmp_path / "s", lab, config(n_trials=7), resume=True)
    assert finished
    assert records[: len(first)] == first
    assert roles(records)["trial"] == 7
    # New plans came in, so that the finals are held again.
    assert {record.round for record in records if record.role == "finalist"} == {0, 1, 2, 3}


def test_a_finished_study_has_nothing_left_to_do(tmp_path: Path) -> None:
    lab = Lab()
    _, first = study(tmp_path / "s", lab, config())
    calls = len(lab.calls)
    finished, records = study(tmp_path / "s", lab, config(), resume=True)
    assert finished
    assert records == first
    assert len(lab.calls) == calls


def test_finals_that_were_killed_go_on_and_do_not_reopen_the_search(tmp_path: Path) -> None:
    wanted = config(n_trials=30, stop_early=True, finalist_rounds=3, max_finalist_rounds=3)
    whole = study(tmp_path / "whole", Lab(), wanted)[1]
    trials = roles(whole)["trial"]
    assert trials < 30, "it ended by itself"
    lab = Lab()

    def die(spec: RunSpec, number: int) -> Failure | None:
        if number == trials + 4:  # behind the single stage and three runs of the finals
            raise Killed
        return None

    lab.fault = die
    with pytest.raises(Killed):
        study(tmp_path / "s", lab, wanted)
    before = load_records(tmp_path / "s")
    assert roles(before)["finalist"] >= 2
    lab.fault = lambda spec, number: None
    _, records = study(tmp_path / "s", lab, wanted, resume=True)
    assert records[: len(before)] == before
    assert roles(records) == roles(whole)
    assert {record.round for record in records if record.role == "finalist"} == {0, 1, 2}


def test_a_lost_database_is_made_anew(tmp_path: Path) -> None:
    lab = Lab()
    study(tmp_path / "s", lab, config(n_trials=4))
    (tmp_path / "s/study.db").unlink()
    _, records = study(tmp_path / "s", lab, config(n_trials=6), resume=True)
    trials = [record for record in records if record.role == "trial"]
    assert [record.trial_number for record in trials] == list(range(6))
    fresh = {record.effective.key for record in trials if record.effective and record.replicate_of is None}
    assert len(fresh) + sum(record.replicate_of is not None for record in trials) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_study_with_a_record(tmp_path: Path, number: signal.Signals) -> None:
    lab = Lab()

    def interrupt(spec: RunSpec, count: int) -> Failure | None:
        if count == 3:
            os.kill(os.getpid(), number)
        return None

    lab.fault = interrupt
    before = signal.getsignal(number)
    finished, records = study(tmp_path / "s", lab, config())
    assert not finished
    assert signal.getsignal(number) == before
    assert records[-1].role == "trial"
    assert was_interrupted(records[-1])
    assert lab.calls[-1] == "interrupt"
    lab.fault = lambda spec, count: None
    finished, records = study(tmp_path / "s", lab, config(), resume=True)
    assert finished
    assert sum(isinstance(record.result, Measurement) for record in records if record.role == "trial") == 5


def test_a_signal_outside_a_trial_leaves_no_record(tmp_path: Path) -> None:
    lab = Lab()

    def interrupt(size: int) -> Failure | None:
        if size == 16:
            os.kill(os.getpid(), signal.SIGINT)
        return None

    lab.baseline_fault = interrupt
    finished, records = study(tmp_path / "s", lab, config())
    assert not finished
    assert roles(records) == {"baseline": 1}


def test_baseline_batch_sizes() -> None:
    assert baseline_batch_sizes(None, 32) == (32, 16, 8)
    assert baseline_batch_sizes(None, 1) == (1,)
    assert baseline_batch_sizes((4, 64, 4), 10) == (10, 4)
