"""Unpatched vLLM over CPU workers: equal tokens over splits and against transformers, and who dies leaves nothing.

`make test-vllm` makes its environment and runs these; elsewhere they are skipped.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.metrics import derive
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.bench.spec import SMOLLM2, Arrivals, EffectivePlan, ModelSpec, Plan, Protocol, RunSpec, Workload
from pipetune.tuner.study.plan_file import Format, PlanFile, render
from tests.bench.engines.conftest import make_plan
from tests.bench.engines.test_host import session

PYTHON = os.environ.get("PIPETUNE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="no environment with vLLM: make test-vllm"),
]
PARSE = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
make_arg_parser(parser.add_subparsers(dest="subparser").add_parser("serve"))
args = parser.parse_args()
args.model = args.model_tag or args.model
known = vars(AsyncEngineArgs.from_cli_args(args))
print(json.dumps({key: value for key, value in known.items() if isinstance(value, (str, int, float, bool))}))
"""
"""What `vllm serve` makes of its arguments."""
WORKLOAD = Workload(num_prompts=8, input_len=48, random_range_ratio=0.5, output_len=8)
PROTOCOL = Protocol(num_iters=2, num_iters_warmup=1, hang_timeout_s=60.0)
SETTINGS: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": "64MiB", "max_num_seqs": 8}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("vllm")
    with VllmEngine(ModelSpec(name=SMOLLM2), ["cpu:0", "cpu:1"], python=Path(PYTHON), log_dir=folder) as own:
        assert own.make_reference(folder / "reference.safetensors", WORKLOAD, PROTOCOL) is None
        yield own


def measure(engine: VllmEngine, plan: Plan) -> Measurement | Failure:
    return engine.measure(RunSpec(model=engine.model, workload=WORKLOAD, plan=plan, protocol=PROTOCOL))


@pytest.mark.parametrize("counts", [(15, 15), (20, 10), (30,)])
def test_tokens_are_those_of_transformers_over_every_split(engine: VllmEngine, counts: tuple[int, ...]) -> None:
    """The second split is taken in place."""
    outcome = measure(engine, make_plan(counts, **SETTINGS, max_num_batched_tokens=128))
    assert isinstance(outcome, Measurement), outcome
    assert outcome.check is not None
    assert (outcome.check.tokens_equal, outcome.check.argmax_flips) == (True, 0)
    assert outcome.notes == ()
    metrics, run = derive(outcome), outcome.iterations[-1]
    # In every pass each prompt's tokens, and each token generated but the last, go through every stage once.
    passed = sum(outcome.prompt_lens) + 8 * 7
    assert [sum(trace.step_tokens) for trace in run.stages] == [passed] * len(counts)
    assert max(max(trace.step_tokens) for trace in run.stages) <= 128
    assert 0.0 < metrics["bubble_ratio"] < 1.0
    assert 0.0 < metrics["median_itl_ms"] < metrics["mean_e2el_ms"]
    assert all(one.peak_bytes - one.baseline_bytes > one.kv_bytes > 0 for one in outcome.memory)


def test_replicas_run_side_by_side(engine: VllmEngine) -> None:
    outcome = measure(engine, make_plan((30,), replicas=2, **SETTINGS))
    assert isinstance(outcome, Measurement), outcome
    assert outcome.check is not None
    assert outcome.check.tokens_equal
    assert len(outcome.iterations[0].stages) == 2


@pytest.mark.parametrize("served", [False, True])
def test_requests_over_time_give_the_same_tokens_in_process_and_served(engine: VllmEngine, served: bool) -> None:
    """Eagerly: the probe makes what the server lacks for that."""
    rate = 20.0
    workload = WORKLOAD.model_copy(update={"arrivals": Arrivals(request_rate=rate)})
    plan = make_plan((16, 14), **SETTINGS, max_num_batched_tokens=128, served=served)
    outcome = engine.measure(RunSpec(model=engine.model, workload=workload, plan=plan, protocol=PROTOCOL))
    assert isinstance(outcome, Measurement), outcome
    assert outcome.check is not None
    assert (outcome.check.tokens_equal, outcome.check.argmax_flips) == (True, 0)
    for run in outcome.iterations:
        assert run.requests[-1].arrived_s == pytest.approx(8 / rate)
        assert all(one.began_s and one.arrived_s <= one.began_s <= one.token_times_s[0] for one in run.requests)
        assert run.duration_s >= 8 / rate
        assert [sum(trace.step_tokens) for trace in run.stages] == [sum(outcome.prompt_lens) + 8 * 7] * 2
    assert 0.0 < derive(outcome)["bubble_ratio"] < 1.0
    host = engine._hosts[0].hello["hello"]
    assert len(session(host)) >= (5 if served else 3)
    engine.interrupt()
    assert session(host) == []


def exported(engine: VllmEngine, form: Format, **settings: Any) -> str:
    """A plan of two stages, as it would be exported."""
    plan = make_plan(**SETTINGS, max_num_batched_tokens=128, **settings)
    file = PlanFile(plan=plan, model=engine.model, workload=WORKLOAD, devices=engine.devices)
    lens = engine.prompt_lens(WORKLOAD)
    return render(file, engine.shape, form, machine=engine.machine, prompt_lens=lens)


def command(text: str) -> tuple[dict[str, str], list[str]]:
    """Variables, and what follows `vllm`."""
    words = shlex.split(text.replace("\\\n", ""), comments=True)
    place = words.index("vllm")
    return dict(word.split("=", 1) for word in words[:place]), words[place + 1 :]


def test_vllms_own_parser_takes_what_is_exported(engine: VllmEngine, tmp_path: Path) -> None:
    """As the file and as the command, with the same outcome."""
    (tmp_path / "serve.yaml").write_text(exported(engine, "vllm-yaml"), encoding="utf-8")
    rows = [command(exported(engine, "vllm"))[1], ["serve", "--config", str(tmp_path / "serve.yaml")]]
    found = []
    for words in rows:
        done = subprocess.run([PYTHON, "-c", PARSE, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == found[1]
    wanted = {
        "pipeline_parallel_size": 2,
        "tensor_parallel_size": 1,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 * 2**20,
        "enable_prefix_caching": False,
        "dtype": "float32",
        "max_model_len": engine._longest(WORKLOAD),
    }
    assert {name: found[0][name] for name in wanted} == wanted
    assert (Path(found[0]["model"]) / "config.json").is_file()


def test_what_is_exported_serves(engine: VllmEngine) -> None:
    variables, (_, model, *flags) = command(exported(engine, "vllm"))
    engine.interrupt()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = ["--model", model, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *place, *flags],
        env={**os.environ, **variables, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        question = {"model": model, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        while True:
            assert server.poll() is None, server.stdout and server.stdout.read()[-4000:]
            time.sleep(1.0)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            with contextlib.suppress(ConnectionError), contextlib.closing(connection):
                connection.request(
                    "POST", "/v1/completions", json.dumps(question), {"Content-Type": "application/json"}
                )
                answer = json.loads(connection.getresponse().read())
                break
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()
    assert answer["usage"]["completion_tokens"] == 4, answer
    assert "Paris" in answer["choices"][0]["text"], answer


def test_too_little_memory_for_one_request_is_named(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(**SETTINGS | {"kv_cache_memory_bytes": "1MiB"})
    # As if it were not foreseen.
    monkeypatch.setattr(engine, "resolve", lambda plan, workload: EffectivePlan(plan=plan, in_flight=2))
    failure = measure(engine, plan)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.phase) == (FailureKind.OVER_MEMORY_CAP, "start"), failure


def test_a_killed_worker_is_named_and_the_next_plan_runs(engine: VllmEngine) -> None:
    before = {*Path("/dev/shm").iterdir()}
    assert isinstance(measure(engine, make_plan(**SETTINGS)), Measurement)
    host = engine._hosts[0].hello["hello"]
    victim = engine._workers[1]["pid"]

    def kill() -> None:
        time.sleep(0.3)
        os.kill(victim, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    protocol = PROTOCOL.model_copy(update={"num_iters": 500})
    failure = engine.measure(
        RunSpec(model=engine.model, workload=WORKLOAD, plan=make_plan(**SETTINGS), protocol=protocol)
    )
    thread.join()
    assert isinstance(failure, Failure)
    assert failure.kind is FailureKind.WORKER_DIED
    assert "was killed by SIGKILL" in failure.message
    assert (failure.stage, failure.device) == (1, "cpu:1")
    assert session(host) == []
    assert {*Path("/dev/shm").iterdir()} <= before
    assert isinstance(measure(engine, make_plan(**SETTINGS)), Measurement)


def test_stages_of_two_shards_each(tmp_path: Path) -> None:
    """SmolLM2 has an odd number of heads."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(num_hidden_layers=6, vocab_size=320, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    devices = [f"cpu:{index}" for index in range(4)]
    with VllmEngine(ModelSpec(name=str(tmp_path / "model")), devices, python=Path(PYTHON)) as engine:
        assert engine.make_reference(tmp_path / "reference.safetensors", WORKLOAD, PROTOCOL) is None
        outcome = measure(engine, make_plan((4, 2), tensor_parallel_size=2, **SETTINGS))
    assert isinstance(outcome, Measurement), outcome
    assert outcome.check is not None
    assert outcome.check.tokens_equal
    assert [one.device for one in outcome.memory] == ["cpu:0", "cpu:2"]
