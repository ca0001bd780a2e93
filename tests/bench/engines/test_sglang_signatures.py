"""What SGLang's host, its probe and its stand-in use of SGLang is what the published package has."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from pipetune.bench.engines.sglang import SglangEngine
from tests.bench.engines import fake_sglang
from tests.bench.engines.sglang_signatures import SIGNATURES, fields_of, functions_of

REAL: dict[str, Any] = json.loads(SIGNATURES.read_text(encoding="utf-8"))
HOST = ast.parse(SglangEngine.HOST.read_text(encoding="utf-8"))
PROBE = ast.parse((SglangEngine.HOST.parent / "pipetune_sglang_probe.py").read_text(encoding="utf-8"))
FAKE = ast.parse(Path(fake_sglang.__file__).read_text(encoding="utf-8"))


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """Calls of a function or a method of that name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [one for one in found if name in (getattr(one.func, "id", None), getattr(one.func, "attr", None))]


def keywords(tree: ast.AST, name: str) -> set[str]:
    (call,) = calls(tree, name)
    return {one.arg for one in call.keywords if one.arg is not None}


def dictionaries(tree: ast.AST) -> list[set[str]]:
    """Keys of each dictionary that is written out."""
    rows = [node.keys for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    return [{str(one.value) for one in keys if isinstance(one, ast.Constant)} for keys in rows]


def test_the_version_that_was_read_is_the_one_that_is_taken() -> None:
    first, end = SglangEngine.VERSIONS
    assert first <= tuple(map(int, REAL["version"].split("."))) < end


def test_the_engine_is_started_by_fields_of_its_arguments() -> None:
    driver = ast.parse(Path(SglangEngine._arguments.__code__.co_filename).read_text(encoding="utf-8"))
    told = {key for keys in dictionaries(driver) if "model_path" in keys for key in keys}
    assert {"max_total_tokens", "mem_fraction_static", "chunked_prefill_size", "max_running_requests"} < told
    assert (told | keywords(HOST, "Engine")) - {*REAL["server_args"]} == set()
    assert {"tp_size", "pp_size"} < told | keywords(HOST, "Engine")


def test_requests_are_made_by_arguments_and_sampling_parameters_that_there_are() -> None:
    functions: dict[str, list[str]] = REAL["functions"]
    for name in ("generate", "async_generate"):
        assert keywords(HOST, name) - {*functions[f"Engine.{name}"]} == set()
    assert functions["Engine.collective_rpc"] == ["method", "**kwargs"]
    sampling = {key for keys in dictionaries(HOST) if keys & {"temperature", "max_new_tokens", "top_k"} for key in keys}
    assert "sampling_seed" in sampling
    assert sampling - {*REAL["sampling_params"]} == set()


def test_variables_attributes_and_keys_are_among_those_that_were_found() -> None:
    words = {*REAL["words"]}
    texts = {node.value for node in ast.walk(HOST) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {"SGLANG_PP_LAYER_PARTITION", "output_ids", "meta_info", "queue_time", "finish_reason"} <= texts & words
    assert {"input_token_logprobs", "input_top_logprobs"} <= words
    assert any("sglang.srt.plugins" in text for text in texts)
    roots = {"scheduler", "batch", "layers", "HookType"}
    used = {
        node.attr
        for node in ast.walk(PROBE)
        if isinstance(node, ast.Attribute) and {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} & roots
    }
    methods = {name.rpartition(".")[2] for name in REAL["functions"]}
    assert {"layer_info", "start_layer", "extend_num_tokens", "get_kvcache", "AROUND"} <= used
    assert used - words - methods == set()


def test_what_is_hooked_and_asked_has_the_arguments_that_the_probe_takes() -> None:
    functions: dict[str, list[str]] = REAL["functions"]
    (target,) = (
        node.value
        for node in ast.walk(PROBE)
        if isinstance(node, ast.Constant) and str(node.value).startswith("sglang.srt.") and isinstance(node.value, str)
    )
    assert target.endswith(".tp_worker.TpModelWorker.forward_batch_generation")
    assert functions["TpModelWorker.forward_batch_generation"][0] == "batch"
    assert functions["HookRegistry.register"][:3] == ["target", "hook", "hook_type"]
    assert functions["get_parallel"] == functions["load_plugins"] == functions["ScheduleBatch.batch_size"] == []


def test_the_stand_in_takes_nothing_that_the_package_does_not() -> None:
    own, real = functions_of(FAKE), REAL["functions"]
    both = own.keys() & real.keys()
    assert real.keys() - both == {"Engine.shutdown"}
    assert [name for name in both if {*own[name]} - {*real[name]}] == []


def test_fields_are_read_from_classes() -> None:
    tree = ast.parse("class A:\n    one: int = 1\n    two = 2\nclass B:\n    three: str\n")
    assert (fields_of(tree), fields_of(tree, "B")) == (["one", "three"], ["three"])
