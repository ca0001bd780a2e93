"""The study folder: made once, resumed when it fits, never overwritten, and every damage named with its file."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.errors import ConfigError, StudyError
from pipetune.bench.record import FailureKind, Record
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.config.storage_url import sqlite_path
from pipetune.tuner.study.files import LOGS_FOLDER, load_records, load_study
from pipetune.tuner.study.store import StudyStore, study_folder
from tests.disks import fill, small_disk
from tests.record_factory import (
    make_effective,
    make_failure,
    make_machine,
    make_measurement,
    make_plan,
    make_record,
    make_shape,
)


def config(**values: Any) -> TuneConfig:
    return TuneConfig.model_validate({"model": {"name": "m"}, "devices": "cpu:0-1", **values})


def add(store: StudyStore, **fields: Any) -> Record:
    values: dict[str, Any] = {
        "number": 0,
        "spec": None,
        "role": "bench",
        "result": make_failure(),
        "hardware_id": "h",
        "started_at": "2026-01-02T03:04:05+00:00",
        "wall_s": 1.0,
    }
    return store.add(Record(**(values | fields)))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_records_are_counted_and_durable(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path / "s", config()) as store:
        records = [add(store), add(store)]
    assert [path.name for path in sorted((tmp_path / "s/records").iterdir())] == ["0000.json", "0001.json"]
    assert load_records(tmp_path / "s") == tuple(records)


def test_a_further_record_of_a_plan_is_a_replicate(tmp_path: Path) -> None:
    plan = make_plan()
    other = make_plan((16, 14))
    with StudyStore.create(tmp_path / "s", config()) as store:
        for chosen in (plan, other, plan):
            store.add(make_record(0, "bench", chosen, make_measurement(chosen)))
    with StudyStore.resume(tmp_path / "s", config()) as store:
        add(store, effective=make_effective(other))
        assert [record.replicate_of for record in store.records] == [None, None, 0, 1]


def test_a_study_reads_back(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path / "s", config(seed=3)) as store:
        assert store.set_machine(make_machine(), make_shape()) == ()
        add(store)
    contents = load_study(tmp_path / "s")
    assert contents.config == config(seed=3)
    assert (contents.machine, contents.shape) == (make_machine(), make_shape())
    assert len(contents.records) == 1


def test_a_folder_with_a_study_is_left_as_it_is(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path / "s", config()) as store:
        add(store)
    before = files(tmp_path / "s")
    with pytest.raises(StudyError, match=r"holds a study already; .*--resume"):
        StudyStore.create(tmp_path / "s", config(seed=9))
    assert files(tmp_path / "s") == before


def test_a_folder_with_other_files_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear", encoding="utf-8")
    with pytest.raises(StudyError, match=r"not empty: it holds thesis\.tex"):
        StudyStore.create(tmp_path, config())
    assert list(files(tmp_path)) == ["thesis.tex"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    StudyStore.create(tmp_path, config()).close()
    assert (tmp_path / "study.yaml").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(FileExistsError) as caught:
        StudyStore.create(tmp_path / "file", config())
    assert caught.value.filename == str(tmp_path / "file")


def test_a_study_that_a_full_disk_cannot_take_leaves_its_place_free(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n', encoding="utf-8")
    given = config(workload={"prompts_file": str(prompts), "num_prompts": 1})
    with small_disk(tmp_path / "disk") as disk:
        filler = fill(disk)
        with pytest.raises(OSError, match=r"No space|Read-only") as caught:
            StudyStore.create(disk / "s", given)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(disk / "s/.lock.holder"))
        # Room for the lock's holder and the prompts.
        os.truncate(filler, filler.stat().st_size - 2 * 4096)
        with pytest.raises(OSError, match=r"No space|Read-only") as caught:
            StudyStore.create(disk / "s", given)
        assert caught.value.filename == str(disk / "s/study.yaml")
        assert not (disk / "s").exists()
        filler.unlink()
        StudyStore.create(disk / "s", given).close()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"workload": {"num_prompts": 5}}, r"workload\.num_prompts: 32 → 5"),
        ({"model": {"name": "other"}}, r"model\.name: m → other"),
        ({"space": {"max_stages": 1}}, r"space\.max_stages: null → 1"),
        ({"devices": "cpu:0"}, r"devices: \[.cpu:0., .cpu:1.\] → \[.cpu:0.\]"),
        ({"protocol": {"num_iters": 9}}, r"protocol\.num_iters: 3 → 9"),
        ({"objectives": ["mean_ttft_ms"]}, "objectives: "),
    ],
)
def test_a_resume_with_other_settings_says_which(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    StudyStore.create(tmp_path, config()).close()
    with pytest.raises(StudyError, match=named):
        StudyStore.resume(tmp_path, config(**changed))


def test_a_resume_may_search_longer(tmp_path: Path) -> None:
    StudyStore.create(tmp_path, config()).close()
    with StudyStore.resume(tmp_path, config(n_trials=99, timeout_s=5.0, finalists=1)) as store:
        assert store.config.n_trials == 99
    assert load_config(tmp_path).n_trials == 99


def load_config(folder: Path) -> TuneConfig:
    from pipetune.tuner.study.files import read_config

    return read_config(folder)


def test_a_resume_on_other_hardware_is_refused_and_on_other_software_said(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path, config()) as store:
        store.set_machine(make_machine(), make_shape())
    machine = make_machine()
    newer = machine.model_copy(
        update={"software": machine.software.model_copy(update={"packages": {"torch": "99"}, "driver": "1"})}
    )
    with StudyStore.resume(tmp_path, config()) as store:
        said = store.set_machine(newer, make_shape())
        assert any(line.startswith("packages.torch: ") for line in said)
        with pytest.raises(StudyError, match=r"other hardware(.|\n)*gpus"):
            store.set_machine(make_machine(gpus=1), make_shape())
        with pytest.raises(StudyError, match="another model"):
            store.set_machine(machine, make_shape().model_copy(update={"hidden_size": 1}))
    # The machine on record stays the one that measured.
    assert load_study(tmp_path).machine == machine


def test_the_checkpoint_is_pinned(tmp_path: Path) -> None:
    named = config(model={"name": "m", "revision": "main"})
    with StudyStore.create(tmp_path, named) as store:
        store.set_revision("commit1")
        store.set_machine(make_machine(), make_shape())
    with StudyStore.resume(tmp_path, config()) as store:
        assert store.config.model.revision == "commit1"
        store.set_revision("commit1")
    with (
        StudyStore.resume(tmp_path, named) as store,
        pytest.raises(StudyError, match="revision commit1 of m, and it is now commit2"),
    ):
        store.set_revision("commit2")
    assert load_config(tmp_path).model.revision == "commit1"


def test_a_model_that_moved_is_known_by_its_content(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path / "s", config(model={"name": "model"})) as store:
        store.set_revision("sha256:0123")
    moved = config(model={"name": str(tmp_path / "elsewhere")})
    with StudyStore.resume(tmp_path / "s", moved) as store:
        store.set_revision("sha256:0123")
        assert store.config.model.name == moved.model.name
    with pytest.raises(StudyError, match=r"model\.dtype"):
        StudyStore.resume(tmp_path / "s", config(model={"name": moved.model.name, "dtype": "bfloat16"}))
    with pytest.raises(StudyError, match=r"model\.name: .* → someone/tiny"):
        StudyStore.resume(tmp_path / "s", config(model={"name": "someone/tiny"}))


def test_a_studys_database_lies_in_its_folder_whatever_its_name(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path / "run?1#%20", config()) as store:
        assert sqlite_path(store.storage_url) == tmp_path / "run?1#%20" / "study.db"


def test_a_dtype_that_was_left_open_is_recorded_as_it_was_found(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path, config(model={"name": "m", "dtype": "auto"})) as store:
        store.set_revision("commit1", "bfloat16")
    assert load_config(tmp_path).model.dtype == "bfloat16"
    for same in ("auto", "bf16"):
        with StudyStore.resume(tmp_path, config(model={"name": "m", "dtype": same})) as store:
            assert store.config.model.dtype == "bfloat16"
    with pytest.raises(StudyError, match="dtype: bfloat16 → float16"):
        StudyStore.resume(tmp_path, config(model={"name": "m", "dtype": "half"}))


def test_prompts_are_copied_and_compared_by_content(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n', encoding="utf-8")
    wanted = config(workload={"prompts_file": str(prompts), "num_prompts": 1})
    with StudyStore.create(tmp_path / "s", wanted) as store:
        assert store.workload.prompts_file == str(tmp_path / "s/prompts.jsonl")
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "s", moved)
    with StudyStore.resume(moved, wanted) as store:
        assert store.workload.prompts_file == str(moved / "prompts.jsonl")
    StudyStore.resume(moved, load_config(moved)).close()
    prompts.write_text('{"prompt": "b"}\n', encoding="utf-8")
    with pytest.raises(StudyError, match="prompts_sha256"):
        StudyStore.resume(moved, wanted)


def test_prompts_may_change_their_line_ends(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_bytes(b'{"prompt": "a"}\r\n')
    with StudyStore.create(tmp_path / "s", config(workload={"prompts_file": str(prompts), "num_prompts": 1})) as store:
        assert store.config.workload.prompts_sha256 == hashlib.sha256(b'{"prompt": "a"}\n').hexdigest()
    (tmp_path / "s/prompts.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n')
    StudyStore.resume(tmp_path / "s", load_config(tmp_path / "s")).close()


def test_missing_prompts_leave_no_study_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the prompts"):
        StudyStore.create(tmp_path / "s", config(workload={"prompts_file": "none.jsonl"}))
    assert not (tmp_path / "s/study.yaml").exists()
    StudyStore.create(tmp_path / "s", config()).close()


def test_a_study_that_recorded_nothing_makes_room(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path / "s", config()) as store:
        (store.folder / LOGS_FOLDER / "rank-0.log").write_text("", encoding="utf-8")
        store.discard_if_empty()
    assert not (tmp_path / "s").exists()
    with StudyStore.create(tmp_path / "t", config()) as store:
        add(store)
        store.discard_if_empty()
    with StudyStore.resume(tmp_path / "t", config()) as store:
        store.discard_if_empty()
    assert len(load_records(tmp_path / "t")) == 1


def test_stray_temporary_files_are_passed_over(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path, config()) as store:
        add(store)
    (tmp_path / "records/.0001.json.123.tmp").write_text('{"schema', encoding="utf-8")
    with StudyStore.resume(tmp_path, config()) as store:
        assert add(store).number == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "future"])
def test_a_damaged_record_is_named(tmp_path: Path, damage: str) -> None:
    with StudyStore.create(tmp_path, config()) as store:
        add(store)
    path = tmp_path / "records/0000.json"
    text = path.read_text(encoding="utf-8")
    future = json.dumps(json.loads(text) | {"colour": "red"})
    path.write_text({"cut": text[:-9], "empty": "", "garbage": "[]", "future": future}[damage], encoding="utf-8")
    with pytest.raises(StudyError, match=r"records/0000\.json is cut off or no Record of this version"):
        StudyStore.resume(tmp_path, config())


@pytest.mark.parametrize("damage", ["cut", "pipe", "folder"])
def test_readers_name_a_damaged_record_and_go_on(tmp_path: Path, damage: str) -> None:
    with StudyStore.create(tmp_path, config()) as store:
        store.set_machine(make_machine(), make_shape())
        sound = [add(store), add(store)]
    path = tmp_path / "records/0002.json"
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    else:
        path.write_text('{"number": 2', encoding="utf-8")
    found = load_study(tmp_path)
    assert found.records == tuple(sound)
    assert len(found.unread) == 1
    assert "records/0002.json" in found.unread[0]


@pytest.mark.parametrize("name", [".lock", "records", "logs", "logs/rank-0.log", "study.db", "study.db-journal"])
def test_a_strangers_study_leads_to_no_file_of_the_users(tmp_path: Path, name: str) -> None:
    own, folder = tmp_path / "own", tmp_path / "s"
    with StudyStore.create(folder, config()):
        pass
    place = folder / name
    if place.is_dir():
        place.rmdir()
        own.mkdir()
    else:
        place.unlink(missing_ok=True)
        own.write_text("mine", encoding="utf-8")
    place.symlink_to(own)
    with pytest.raises(StudyError, match=f"{name}: is a link to {own}"):
        StudyStore.resume(folder, config())
    assert own.is_dir() or own.read_text(encoding="utf-8") == "mine"


def test_a_pipe_for_a_file_is_refused_at_a_resume(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path, config()):
        pass
    os.mkfifo(tmp_path / "reference.safetensors")
    with pytest.raises(StudyError, match=r"reference\.safetensors: is no regular file"):
        StudyStore.resume(tmp_path, config())


def test_a_renamed_record_is_named(tmp_path: Path) -> None:
    with StudyStore.create(tmp_path, config()) as store:
        add(store)
    (tmp_path / "records/0000.json").rename(tmp_path / "records/0007.json")
    with pytest.raises(StudyError, match=r"0007\.json: holds record 0"):
        load_records(tmp_path)


@pytest.mark.parametrize("missing", ["machine.json", "shape.json"])
def test_what_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    with StudyStore.create(tmp_path, config()) as store:
        store.set_machine(make_machine(), make_shape())
        sound = add(store)
    (tmp_path / missing).unlink()
    found = load_study(tmp_path)
    assert found.records == (sound,)
    assert [text for text in found.unread if missing in text] == list(found.unread) != []
    (tmp_path / "study.yaml").unlink()
    with pytest.raises(StudyError, match=r"study\.yaml"):
        load_study(tmp_path)


def _hold(folder: Path, ready: Any, done: Any) -> None:
    with StudyStore.resume(folder, config()):
        ready.set()
        done.wait(30)


def test_a_study_in_use_names_its_holder(tmp_path: Path) -> None:
    StudyStore.create(tmp_path, config()).close()
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(StudyError, match=rf"in use by pid {other.pid} on "):
            StudyStore.resume(tmp_path, config())
    finally:
        done.set()
        other.join(30)
    StudyStore.resume(tmp_path, config()).close()


def test_where_a_study_lands() -> None:
    assert study_folder(config(output_dir="/a/b", name="x")) == Path("/a/b")
    assert study_folder(config(name="x.1")) == Path("results/x.1")
    made = study_folder(config(model={"name": "org/My Model~7B"}))
    assert made.parent == Path("results")
    assert made.name.startswith("My-Model-7B-")


def test_failures_that_somebody_caused_are_told_apart(tmp_path: Path) -> None:
    from pipetune.tuner.study.files import was_interrupted

    with StudyStore.create(tmp_path, config()) as store:
        assert was_interrupted(add(store, result=make_failure(FailureKind.INTERRUPTED)))
        assert not was_interrupted(add(store))
