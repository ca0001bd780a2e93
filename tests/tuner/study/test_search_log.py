"""The log of a search: whole after every step, and times that go where they belong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipetune.bench.errors import StudyError
from pipetune.tuner.study.search_log import Proposal, SearchLogWriter, Stop

PROPOSAL = Proposal(
    point={"partition_rank": 3},
    kind="model",
    reason="predicted to be the best",
    predicted={"output_throughput": 95.0},
    predicted_sd={"output_throughput": 0.03},
)


def test_what_is_noted_is_there_for_whoever_goes_on(tmp_path: Path) -> None:
    log = SearchLogWriter(tmp_path / "search.json")
    log.note(0, PROPOSAL)
    log.note(1, PROPOSAL.model_copy(update={"kind": "kind"}))
    log.note(1, PROPOSAL)
    again = SearchLogWriter(tmp_path / "search.json")
    assert [entry.trial_number for entry in again.log.entries] == [0, 1]
    assert again.log.entries[1].predicted == {"output_throughput": 95.0}
    assert again.log.stop is None
    again.end(Stop(kind="budget", text="enough"))
    assert SearchLogWriter(tmp_path / "search.json").log.stop == Stop(kind="budget", text="enough")
    again.note(2, PROPOSAL)
    assert SearchLogWriter(tmp_path / "search.json").log.stop is None


def test_time_counts_for_the_innermost_phase(tmp_path: Path) -> None:
    log = SearchLogWriter(tmp_path / "search.json")
    began = time.monotonic()
    with log.spend("trials"):
        time.sleep(0.02)
        with log.spend("reference"):
            time.sleep(0.01)
        time.sleep(0.01)
    took = time.monotonic() - began
    assert log.log.seconds["trials"] >= 0.029
    assert 0.009 <= log.log.seconds["reference"] <= took - 0.029
    assert log.log.total_s == pytest.approx(took, abs=0.005)
    assert log.log.measuring_share == pytest.approx(1 - log.log.seconds["reference"] / log.log.total_s)


def test_time_is_counted_though_something_fails_and_nothing_is_left_where_nothing_was_noted(tmp_path: Path) -> None:
    log = SearchLogWriter(tmp_path / "search.json")
    with pytest.raises(ZeroDivisionError), log.spend("profile"):
        raise ZeroDivisionError
    assert "profile" in log.log.seconds
    log.save()
    assert not (tmp_path / "search.json").exists()


def test_a_torn_diary_is_named(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text('{"entries": [', encoding="utf-8")
    with pytest.raises(StudyError, match=r"search\.json"):
        SearchLogWriter(tmp_path / "search.json")
