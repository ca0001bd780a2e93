"""The search for a side's own setting: it finds what a landscape allows, within its runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.peers.climb import best_of, chunked, climb, moved, scaled, sleeping
from tests.evaluation.peers.values import Setting, Tried

NUM_LAYERS = 30


def valley(bottom_rows: int, bottom_cut: int) -> dict[Setting, float]:
    """Seconds of every setting, least at the bottom."""
    return {
        Setting(rows=rows, cut=cut): 1.0 + abs(rows - bottom_rows) / 8 + abs(cut - bottom_cut) / 4
        for rows in (1, 2, 4, 8, 16, 32, 64)
        for cut in range(1, NUM_LAYERS)
    }


@given(st.sampled_from([4, 8, 16, 32, 64]), st.integers(1, NUM_LAYERS - 1), st.integers(1, 40))
def test_it_finds_the_bottom_of_a_valley_and_keeps_to_its_runs(rows: int, cut: int, max_runs: int) -> None:
    landscape = valley(rows, cut)
    knobs = (
        scaled("rows", 0.5, high=64),
        scaled("rows", 2.0, high=64),
        moved(1, num_layers=NUM_LAYERS),
        moved(-1, num_layers=NUM_LAYERS),
    )
    start = Setting(rows=32, cut=15)
    tried = climb(start, knobs, lambda one: Tried(setting=one, duration_s=landscape[one]), max_runs=max_runs)
    assert tried[0].setting == start
    assert len(tried) <= max_runs
    assert len({one.setting for one in tried}) == len(tried)
    best = best_of(tried)
    assert best is not None
    if len(tried) < max_runs:
        assert best.setting == Setting(rows=rows, cut=cut)


def test_settings_that_fail_are_kept_and_never_chosen() -> None:
    def run(setting: Setting) -> Tried:
        failed = setting.rows < 4
        return Tried(setting=setting, duration_s=None if failed else 1.0 * setting.rows, error="no" if failed else None)

    tried = climb(Setting(rows=8), (scaled("rows", 0.5, high=8),), run, max_runs=9)
    assert [one.setting.rows for one in tried] == [8, 4, 2]
    best = best_of(tried)
    assert best is not None
    assert best.setting.rows == 4
    assert best_of([one for one in tried if one.duration_s is None]) is None


def test_a_start_that_fails_does_not_end_the_search() -> None:
    def run(setting: Setting) -> Tried:
        failed = setting.rows == 8
        return Tried(setting=setting, duration_s=None if failed else 1.0, error="no" if failed else None)

    best = best_of(climb(Setting(rows=8), (scaled("rows", 0.5, high=8),), run, max_runs=4))
    assert best is not None
    assert best.setting.rows == 4


def test_knobs_end_where_they_must() -> None:
    one = Setting(rows=4, prefill_rows=4, cut=1)
    assert moved(-1, num_layers=2)(one) is None
    assert moved(1, num_layers=2)(one) is None
    assert scaled("prefill_rows", 2.0, high=64)(one) is None
    assert scaled("rows", 0.5, high=64)(one) == Setting(rows=2, prefill_rows=2, cut=1)
    assert scaled("prefill_rows", 0.5, high=4)(Setting(rows=4)) is None
    assert chunked(32)(one) == one.model_copy(update={"prefill_tokens": 32})
    assert chunked(32)(one.model_copy(update={"prefill_tokens": 32})) is None
    assert sleeping(one.model_copy(update={"sleeps": True})) is None
