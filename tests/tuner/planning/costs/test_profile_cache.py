"""Kept profiles: measured once for what they depend on, read again without a worker, never trusted when damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import CACHE_VARIABLE
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.profile import Profile, ProfileGrid
from pipetune.bench.spec import ModelSpec, Sampling, Workload
from pipetune.tuner.planning.costs import profile_cache
from pipetune.tuner.planning.costs.profile_cache import (
    KeptProfile,
    find_profile,
    grid_for,
    keep,
    kept_folder,
    kept_path,
    profile_for,
    profile_key,
    read_kept,
    read_profile,
    spread,
)
from tests.quiet import hush
from tests.tiny_models import tiny_config
from tests.workers import worker_pids

DEVICES = ("cpu:0", "cpu:1")
GRID = ProfileGrid(rows=(1,), lengths=(4,), pasts=(4,))
SLOWER = {"cpu:1": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_config("llama").save_pretrained(folder)
    return ModelSpec(name=str(folder), load_format="dummy")


@pytest.fixture(scope="module")
def fleet(model: ModelSpec) -> Iterator[Fleet]:
    with Fleet.start(model, DEVICES) as started:
        yield started


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    hush(monkeypatch)
    return tmp_path / "cache"


def test_what_is_kept_is_read_without_a_worker(fleet: Fleet, cache: Path) -> None:
    measured = profile_for(fleet, GRID)
    (file,) = (cache / "profiles").iterdir()
    assert file.name.startswith("llama-")
    assert KeptProfile.model_validate_json(file.read_text(encoding="utf-8")).profile == measured
    fleet.interrupt()
    assert profile_for(fleet, GRID) == measured
    assert worker_pids(fleet) == (), "nothing was started for it"
    again = profile_for(fleet, GRID, refresh=True)
    assert len(worker_pids(fleet)) == len(DEVICES)
    assert again != measured
    assert profile_for(fleet, GRID) == again


def test_links_between_hosts_are_timed_anew(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = profile_for(fleet, GRID)
    monkeypatch.setattr(profile_cache, "device_host", lambda device: device)
    again = profile_for(fleet, GRID)
    assert again.links != measured.links
    assert again.model_copy(update={"links": measured.links}) == measured


def test_a_disturbed_profile_is_used_and_not_kept(fleet: Fleet, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hush(monkeypatch, "other processes took 1.2 CPU cores: somebody")
    measured = profile_for(fleet, GRID)
    assert measured.disturbances
    assert measured.notes[-1] == "doubtful, and not kept: other processes took 1.2 CPU cores: somebody"
    assert not cache.exists()


def test_a_damaged_file_is_measured_anew(fleet: Fleet) -> None:
    measured = profile_for(fleet, GRID)
    key = profile_key(fleet, GRID, packed_weights=True, cuda_graphs=True)
    for damage in (b"", b"{", b'{"key": 1}', b"\xff"):
        kept_path(key).write_bytes(damage)
        assert read_kept(key) is None, damage
        again = profile_for(fleet, GRID)
        assert again.measured_at >= measured.measured_at
        assert read_kept(key) == again
        measured = again


def test_a_file_of_another_key_is_not_taken(fleet: Fleet) -> None:
    measured = profile_for(fleet, GRID)
    key = profile_key(fleet, GRID, packed_weights=True, cuda_graphs=True)
    other = key.model_copy(update={"hardware_id": "another"})
    kept_path(other).write_text(KeptProfile(key=key, profile=measured).model_dump_json(), encoding="utf-8")
    assert read_kept(other) is None


def test_what_times_depend_on_makes_another_entry(fleet: Fleet, model: ModelSpec) -> None:
    key = profile_key(fleet, GRID, packed_weights=True, cuda_graphs=True)
    paths = {
        kept_path(key),
        kept_path(profile_key(fleet, GRID, packed_weights=False, cuda_graphs=True)),
        kept_path(profile_key(fleet, ProfileGrid(), packed_weights=True, cuda_graphs=True)),
        kept_path(key.model_copy(update={"model": model.model_copy(update={"dtype": "bfloat16"})})),
        kept_path(key.model_copy(update={"devices": DEVICES[:1]})),
        kept_path(key.model_copy(update={"versions": key.versions | {"torch": "0.1"}})),
    }
    assert len(paths) == 6
    fleet.model = fleet.model.model_copy(update={"seed": 7})
    assert profile_key(fleet, GRID, packed_weights=True, cuda_graphs=True) == key, "random weights all take as long"


def test_a_device_held_back_has_a_profile_of_its_own(fleet: Fleet, model: ModelSpec) -> None:
    profile_for(fleet, GRID)
    with Fleet.start(model, DEVICES, worker_env=SLOWER) as unlike:
        key = profile_key(unlike, GRID, packed_weights=True, cuda_graphs=True)
        assert key.worker_env == SLOWER
        assert read_kept(key) is None
        measured = profile_for(unlike, GRID)
        assert read_kept(key) == measured
    assert len(list(kept_folder().iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_only_the_keeping(fleet: Fleet, cache: Path) -> None:
    cache.write_text("a file where the folder should be", encoding="utf-8")
    profile = profile_for(fleet, GRID)
    assert any(note.startswith("not kept") and CACHE_VARIABLE in note for note in profile.notes)


def found(fleet: Fleet, **changes: object) -> Profile | None:
    asked: dict[str, object] = {
        "hardware_id": fleet.machine.hardware_id,
        "devices": DEVICES,
        "model": fleet.model,
        "packed_weights": True,
        "cuda_graphs": True,
        "scores": False,
    }
    return find_profile(**(asked | changes))  # type: ignore[arg-type]


def test_the_newest_profile_of_any_grid_is_found(fleet: Fleet) -> None:
    assert found(fleet) is None
    older = profile_for(fleet, GRID)
    newer = older.model_copy(update={"measured_at": "2999-01-01T00:00:00+00:00"})
    keep(profile_key(fleet, ProfileGrid(), packed_weights=True, cuda_graphs=True), newer)
    assert found(fleet) == newer
    assert found(fleet, hardware_id="another") is None
    assert found(fleet, devices=DEVICES[:1]) is None
    assert found(fleet, scores=True) is None


def test_a_profile_is_read_from_a_file(fleet: Fleet, tmp_path: Path) -> None:
    profile = profile_for(fleet, GRID)
    printed = tmp_path / "profile.json"
    printed.write_text(profile.model_dump_json(), encoding="utf-8")
    assert read_profile(printed) == profile
    assert read_profile(next(kept_folder().iterdir())) == profile
    printed.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"profile\.json: no profile of this version \(model: Field required\)"):
        read_profile(printed)
    with pytest.raises(ConfigError, match="cannot read the profile: No such file"):
        read_profile(tmp_path / "none.json")


def test_profiles_and_grids_survive_json(fleet: Fleet) -> None:
    profile = profile_for(fleet, GRID)
    assert Profile.model_validate(json.loads(profile.model_dump_json())) == profile
    grid = ProfileGrid(chunks=((4, 8),), sampling=Sampling(top_k=3))
    assert ProfileGrid.model_validate_json(grid.model_dump_json()) == grid


def test_a_grid_holds_what_the_plans_of_a_workload_do() -> None:
    workload = Workload(num_prompts=16, output_len=16, sampling=Sampling(top_p=0.9, seed=5))
    lens = (40,) * 15 + (60,)
    grid = grid_for(workload, lens, (4, 8, 16, 64), (2, 4), (16, None, 64))
    assert grid.rows == (2, 4, 8, 16)
    assert grid.lengths == (16, 41, 60)
    assert grid.pasts == (41, 75)
    assert grid.chunks == ((16, 16), (16, 48))
    assert grid.padded
    assert grid.sampling == Sampling(top_p=0.9)
    assert grid.max_tokens == 1024
    assert grid_for(workload, lens, (4,), (4,), devices=("cuda:0", "cuda:1")).max_tokens > 1024


def test_a_largest_task_of_twice_what_is_enough_is_timed_itself() -> None:
    assert grid_for(Workload(), (68,) * 16, (16,), (4,)).max_tokens == 16 * 68
    assert grid_for(Workload(), (68,) * 32, (32,), (4,)).max_tokens == 1024


def test_one_length_is_neither_padded_nor_drawn_out() -> None:
    grid = grid_for(Workload(output_len=1), (48,) * 8, (8,), (8,))
    assert (grid.rows, grid.lengths, grid.pasts, grid.padded) == ((8,), (48,), (), False)


def test_scoring_is_timed_as_scoring() -> None:
    grid = grid_for(Workload(kind="score"), (48, 20), (1,), (1,))
    assert grid.scores
    assert grid.pasts == ()
    assert grid.lengths == (20, 34, 48)


def test_a_prompt_beyond_the_largest_task_is_cut_to_it() -> None:
    assert grid_for(Workload(), (5000,), (1, 2), (1,)).lengths == (1024,)


@given(sizes=st.sets(st.integers(1, 512), min_size=1, max_size=40), most=st.integers(2, 9))
def test_a_choice_of_sizes_keeps_the_ends(sizes: set[int], most: int) -> None:
    ranked = sorted(sizes)
    chosen = spread(ranked, most)
    assert len(chosen) == min(most, len(ranked))
    assert set(chosen) <= sizes
    assert (chosen[0], chosen[-1]) == (ranked[0], ranked[-1])
    assert list(chosen) == sorted(chosen)
