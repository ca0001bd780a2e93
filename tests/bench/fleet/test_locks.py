"""Locks of GPUs: by UUID, for one study at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipetune.bench.errors import StudyError
from pipetune.bench.fleet import locks
from tests.record_factory import make_machine

GPUS = make_machine(gpus=3).hardware.gpus


@pytest.fixture(autouse=True)
def _own_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_a_gpu_serves_one_study_at_a_time(tmp_path: Path) -> None:
    with locks.hold_gpus(("cuda:0", "cuda:1"), GPUS):
        assert {path.name for path in (tmp_path / "pipetune").glob("*.lock")} == {"GPU-0000.lock", "GPU-0001.lock"}
        with (
            pytest.raises(StudyError, match=r"cuda:1 \(GPU-0001\) is in use by pid \d+"),
            locks.hold_gpus(("cuda:1", "cuda:2"), GPUS),
        ):
            pass
        with locks.hold_gpus(("cuda:2",), GPUS):
            pass
    with locks.hold_gpus(("cuda:1",), GPUS):
        pass


def test_a_gpu_with_two_stages_is_held_once(tmp_path: Path) -> None:
    with locks.hold_gpus(("cuda:0", "cuda:0"), GPUS):
        assert {path.name for path in (tmp_path / "pipetune").glob("*.lock")} == {"GPU-0000.lock"}


def test_cpu_workers_need_no_lock(tmp_path: Path) -> None:
    with locks.hold_gpus(("cpu:0", "cpu:1"), ()):
        assert not (tmp_path / "pipetune").exists()


def test_a_runtime_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pipetune").mkdir()
    (tmp_path / "pipetune").chmod(0o777)
    with pytest.raises(StudyError, match="writable by others"), locks.hold_gpus(("cuda:0",), GPUS):
        pass


def test_a_holder_that_is_a_link_overwrites_nothing(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("mine", encoding="utf-8")
    (tmp_path / ".lock.holder").symlink_to(own)
    with locks.hold(tmp_path / ".lock", "it", remedy=""):
        pass
    assert own.read_text(encoding="utf-8") == "mine"
