"""Prompts files as editors, systems and pipes leave them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from pipetune.bench.errors import ConfigError
from pipetune.bench.prompts.file import output_lens, read_requests, read_text, rereadable, sha256_of
from pipetune.bench.prompts.forms import Request
from pipetune.bench.spec import Workload

LINES = '{"prompt": "one"}\n\n{"prompt": "two"}\n'


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        LINES.encode("utf-8-sig"),
        LINES.replace("\n", "\r\n").encode("utf-16"),
        LINES.encode("utf-16-be"),
    ],
)
def test_line_ends_and_byte_order_marks_change_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    assert read_requests(path) == [(f"{path}:1", Request("one", None)), (f"{path}:3", Request("two", None))]
    assert sha256_of(read_text(path)) == sha256_of(LINES)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    texts = [f"one{sign}two" for sign in "\u2028\u2029\x85"] + ["a\fb\x1cc"]
    rows = [json.dumps({"prompt": text}, ensure_ascii="\f" in text) for text in texts]
    # Joined files have byte order marks within.
    path.write_text("\n\ufeff".join(rows) + "\n", encoding="utf-8")
    assert [request.prompt for _, request in read_requests(path)] == texts


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_as_its_items(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": "one"}, {"conversations": []}, {"prompt": [1, 2]}], indent=indent))
    assert read_requests(path) == [(f"{path}[0]", Request("one", None)), (f"{path}[2]", Request([1, 2], None))]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "\xff"}', "no UTF-8 text"),
        (b"\x1f\x8b\x08\x00\x00\x00", "<.zcat FILE"),
        (b'{"prompt": "a"}\nplain text\n', ":2: not JSON"),
        (b'{"prompt": "a"}\n' + b"[" * 200_000, ":2: not JSON"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", ":1: not JSON"),
        (b"\n\n", "holds no prompt"),
        (b"[]", "holds no prompt"),
    ],
)
def test_what_is_no_prompts_file_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        read_requests(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [("none.jsonl", "No such"), ("", "directory"), ("/dev/zero", "end"), ("n" * 300, "too long"), ("\0", "null")],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot read the prompts: .*{message}"):
        rereadable(str(tmp_path / given))


def test_a_pipe_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPETUNE_CACHE", str(tmp_path / "cache"))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(LINES,))
    writer.start()
    kept = rereadable(str(pipe))
    writer.join()
    # A second side of a gate asks for it again.
    assert rereadable(str(pipe)) == kept
    assert [request.prompt for _, request in read_requests(kept)] == ["one", "two"]


def test_a_number_of_this_process_is_the_file_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(LINES)
    assert rereadable(str(path)) == str(path)
    with path.open() as file:
        assert rereadable(f"/dev/fd/{file.fileno()}") == str(path)


def test_lines_say_how_many_tokens_they_want(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "output_tokens": 7}\n{"prompt": "b"}\n{"prompt": "c", "max_tokens": "3"}\n')
    requests = read_requests(path)
    workload = Workload(num_prompts=3, output_len=4, prompts_file=str(path))
    assert output_lens(workload, requests) == (7, 4, 3)
    assert output_lens(workload.model_copy(update={"num_prompts": 2}), requests) == (7, 4)
    # What says the same as the workload changes nothing, nor its digest.
    assert output_lens(Workload(num_prompts=1, output_len=7), requests) is None
    with pytest.raises(ConfigError, match=r"p\.jsonl:1: nothing is generated where texts are scored"):
        output_lens(Workload(num_prompts=3, kind="score"), requests)
