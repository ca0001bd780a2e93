"""A plan behind OpenAI's API: a real server, real workers, and clients that behave and that do not."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipetune.bench.spec import Plan
from pipetune.tuner.commands.sweep import read_points
from tests.tiny_models import save_tiny_model, unsplit_tokens

PLAN = Plan.from_layer_counts((1, 3), ("cpu:0", "cpu:1"), 2)
pytestmark = pytest.mark.slow
VLLM, GUIDELLM = (os.environ.get(f"PIPETUNE_{name}", "") for name in ("VLLM_PYTHON", "GUIDELLM"))
BENCH_SERVE = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main

parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""`vllm bench serve`: its own command asks for the name of a package that builds for CPUs do not have."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose token i is the character 33 + i."""
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama", 4)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({chr(0x3400 + i): i for i in range(size)}, unk_token=chr(0x3400)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


@contextmanager
def server(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command in a process of its own, and its port."""
    plan = folder / "plan.json"
    plan.write_text(PLAN.model_dump_json())
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pipetune", "serve", str(plan), "--model", str(folder), "--port", "0"),
                *("--served-model-name", "tiny", "--max-model-len", "64", *options),
            ],
            stdout=subprocess.DEVNULL,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
    try:
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process, int(found.group(1))
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=60)


def text_of(ids: Any) -> str:
    return "".join(chr(0x3400 + token) for token in ids)


def ask(port: int, path: str, body: Any) -> tuple[int, Any]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST" if body is not None else "GET", path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        text = response.read().decode()
    return response.status, json.loads(text) if text.startswith("{") else text


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[int]:
    with server(folder) as (_, port):
        yield port


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_answers_are_the_unsplit_models(folder: Path, running: int) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[5, 9, 11], [7, 2]]
    expected = [text_of(unsplit_tokens(model, [prompt], output_len=6)[0]) for prompt in prompts]
    status, answer = ask(
        running, "/v1/completions", {"model": "tiny", "prompt": prompts, "max_tokens": 6, "ignore_eos": True}
    )
    assert status == 200
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    # As text, as a chat, and streamed.
    body = {"prompt": text_of(prompts[0]), "max_tokens": 6, "ignore_eos": True, "temperature": 0}
    assert ask(running, "/v1/completions", body)[1]["choices"][0]["text"] == expected[0]
    chat = {
        "messages": [{"role": "user", "content": text_of(prompts[0])}],
        "max_completion_tokens": 6,
        "ignore_eos": True,
    }
    _, answer = ask(running, "/v1/chat/completions", chat)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected[0]}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    _, text = ask(running, "/v1/chat/completions", {**chat, **stream})
    *parts, usage = events(text)
    deltas = [part["choices"][0]["delta"].get("content", "") for part in parts]
    assert "".join(deltas) == expected[0]
    assert sum(map(bool, deltas)) > 1
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 6
    _, text = ask(running, "/v1/completions", {**body, **stream, "prompt": prompts})
    by_index = ["", ""]
    for part in events(text)[:-1]:
        by_index[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert by_index == expected
    # A text that ends it is not part of it, however it comes.
    stop = {"stop": [expected[0][2:4]]}
    _, answer = ask(running, "/v1/completions", {**body, **stop})
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (expected[0][:2], "stop")
    _, text = ask(running, "/v1/completions", {**body, **stop, "stream": True})
    assert "".join(part["choices"][0]["text"] for part in events(text)) == expected[0][:2]


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"prompt": "x", "n": 2}, 400, "n", "n=2 is not served"),
        ({"prompt": "x", "temperature": 0.5}, 400, "temperature", "draws all tokens with temperature=0.0"),
        ({"prompt": "x", "model": "gpt"}, 404, "model", "does not exist; there is 'tiny'"),
        ({"max_tokens": 3}, 400, "prompt", "is missing"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"prompt": "x", "max_tokens": 640}, 400, None, "more than max_len=64"),
        ({"prompt": [100000]}, 400, None, "outside the vocabulary"),
        ([1], 400, None, "no JSON object"),
    ],
)
def test_what_is_not_served_is_said(running: int, body: Any, status: int, param: str | None, message: str) -> None:
    found, answer = ask(running, "/v1/completions", body)
    assert (found, answer["error"]["param"]) == (status, param), answer
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_a_client_that_goes_away_frees_its_rows(running: int) -> None:
    gone = []
    for stream in (True, False) * 3:
        connection = http.client.HTTPConnection("127.0.0.1", running, timeout=60)
        body = {"prompt": [1, 2], "max_tokens": 60, "ignore_eos": True, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body))
        gone.append(connection)
    time.sleep(0.3)
    for connection in gone:
        connection.close()
    # There are rows for 8: with all of these taken for ever nobody would be answered.
    for _ in range(3):
        assert ask(running, "/v1/completions", {"prompt": [3], "max_tokens": 2, "ignore_eos": True})[0] == 200
    assert ask(running, "/health", None)[0] == 200


def test_what_was_accepted_is_finished_when_it_is_told_to_end(folder: Path) -> None:
    with server(folder) as (process, port):
        answers: list[Any] = []
        body = {"prompt": [4, 5], "max_tokens": 60, "ignore_eos": True}
        threads = [
            threading.Thread(target=lambda: answers.append(ask(port, "/v1/completions", body))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(timeout=60) == 0
    assert [status for status, _ in answers] == [200] * 4
    assert {answer["usage"]["completion_tokens"] for _, answer in answers} == {60}


def test_it_ends_when_its_workers_are_lost(folder: Path) -> None:
    with server(folder) as (process, port):
        workers = [one for one in psutil.Process(process.pid).children(recursive=True) if not one.children()]
        max(workers, key=lambda one: one.memory_info().rss).kill()
        status, answer = ask(port, "/v1/completions", {"prompt": [4, 5], "max_tokens": 60})
        assert status in (500, 503)
        assert answer["error"]["type"] == "server_error"
        assert process.wait(timeout=60) == 4


@pytest.mark.skipif(not VLLM, reason="no environment with vLLM: make test-vllm")
def test_vllms_own_client_drives_it(folder: Path, running: int, tmp_path: Path) -> None:
    """Every request of its is served whole, and its results are read."""
    file = tmp_path / "result.json"
    lens = ("--random-input-len", "8", "--random-output-len", "6", "--num-prompts", "12")
    subprocess.run(
        [
            *(VLLM, "-c", BENCH_SERVE, "--backend", "openai"),
            *("--base-url", f"http://127.0.0.1:{running}", "--endpoint", "/v1/completions", "--model", "tiny"),
            *("--tokenizer", str(folder), "--dataset-name", "random", *lens, "--request-rate", "20", "--ignore-eos"),
            *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "90"),
            *("--save-result", "--result-dir", str(file.parent), "--result-filename", file.name),
        ],
        check=True,
        timeout=300,
    )
    told = json.loads(file.read_text(encoding="utf-8"))
    assert (told["completed"], told["total_output_tokens"]) == (12, 72)
    assert [point[:2] for point in read_points(file)] == [("tiny (openai)", 20.0)]


@pytest.mark.skipif(not GUIDELLM, reason="PIPETUNE_GUIDELLM names no `guidellm`")
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_drives_it(folder: Path, running: int, tmp_path: Path, path: str) -> None:
    """All of its requests succeed."""
    file = tmp_path / "benchmarks.json"
    subprocess.run(
        [
            *(GUIDELLM, "run", "--disable-progress", "--profile", "kind=constant,rate=10"),
            *("--backend", f"kind=openai_http,target=http://127.0.0.1:{running},model=tiny,request_format={path}"),
            *("--tokenizer", f"kind=huggingface_auto,model={folder}", "--constraint", "kind=max_requests,count=12"),
            *("--data", "kind=synthetic_text,prompt_tokens=8,output_tokens=6"),
            *("--output", f"kind=json,path={file}"),
        ],
        check=True,
        timeout=300,
    )
    (one,) = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    assert len(one["requests"]["successful"]) == 12
    assert one["requests"]["errored"] == []
