"""Temporary folders: who sweeps what, and what stays; files that are whole or name themselves."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipetune.bench.files import scratch_folder, write_durably
from tests.disks import fill, read_only, small_disk

HOLDER = (
    "from pipetune.bench.files import scratch_folder\nwith scratch_folder() as folder:\n    print(folder, flush=True)\n"
)


def test_scratch_folders_go_with_their_process_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with subprocess.Popen(
        [sys.executable, "-c", f"{HOLDER}    input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        theirs = Path(holder.stdout.readline().strip())
        assert theirs.parent == tmp_path
        # A number of a process says nothing where processes are numbered anew; the lock does.
        with scratch_folder() as own:
            assert own.is_dir()
        assert theirs.is_dir()
        holder.kill()
    (mark,) = theirs.iterdir()
    foreign = {
        "pipetune-20261128-llama": None,
        "pipetune-unreadable": b"\xff\xfe",
        "pipetune-renamed": mark.read_bytes(),
        "pipetune-other-boot": b"pipetune-other-boot 0b00",
        "pipetune-unmarked": b"",
    }
    for name, content in foreign.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "ranking.md").write_text("weeks of work")
        if content is not None:
            (tmp_path / name / mark.name).write_bytes(content)
    (tmp_path / "pipetune-0.1.0-py3-none-any.whl").write_bytes(b"")
    (tmp_path / "pipetune-link").symlink_to(theirs, target_is_directory=True)
    with scratch_folder():
        pass
    assert not own.exists()
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, "pipetune-0.1.0-py3-none-any.whl", "pipetune-link"}
    assert all((tmp_path / name / "ranking.md").is_file() for name in foreign)


@pytest.mark.parametrize(("fault", "code"), [(fill, errno.ENOSPC), (read_only, errno.EROFS)])
def test_a_file_that_cannot_be_written_is_named_and_the_one_before_it_stays(
    tmp_path: Path, fault: Callable[[Path], object], code: int
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        path = disk / "record.json"
        write_durably(path, "before")
        fault(disk)
        with pytest.raises(OSError, match=r"No space|Read-only") as caught:
            write_durably(path, "after" * 1000)
        assert (caught.value.errno, caught.value.filename) == (code, str(path))
        assert path.read_text() == "before"
        assert {one.name for one in disk.iterdir()} <= {"record.json", "filler"}
