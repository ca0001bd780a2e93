"""What SGLang's published package has of all that its host uses, read from the source and kept beside the tests.

`python -m tests.bench.engines.sglang_signatures 0.5.23` downloads that version and writes the file; nothing of it runs.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIGNATURES = Path(__file__).parent / "sglang-signatures.json"
FUNCTIONS = {
    "entrypoints/engine.py": (
        "Engine.__init__",
        "Engine.generate",
        "Engine.async_generate",
        "Engine.collective_rpc",
        "Engine.shutdown",
    ),
    "managers/schedule_batch.py": ("ScheduleBatch.batch_size",),
    "managers/scheduler.py": ("Scheduler.handle_rpc_request",),
    "managers/tp_worker.py": ("TpModelWorker.forward_batch_generation",),
    "model_executor/forward_batch_info.py": ("ForwardMode.is_extend",),
    "plugins/__init__.py": ("load_plugins",),
    "plugins/hook_registry.py": ("HookRegistry.register",),
    "runtime_context.py": ("get_parallel",),
}
WORDS = {
    "distributed/utils.py": ("SGLANG_PP_LAYER_PARTITION",),
    "entrypoints/engine.py": ("loop",),
    "managers/schedule_batch.py": ("extend_num_tokens", "forward_mode"),
    "managers/scheduler.py": ("device_module",),
    "managers/scheduler_components/internal_state.py": (
        "get_kvcache",
        "mem_usage",
        "model_runner",
        "token_to_kv_pool_allocator",
        "tp_worker",
    ),
    "managers/tokenizer_manager.py": (
        "finish_reason",
        "input_token_logprobs",
        "input_top_logprobs",
        "meta_info",
        "output_ids",
    ),
    "model_executor/model_runner.py": ("layer_info",),
    "model_executor/model_runner_components/layer_setup.py": ("end_layer", "start_layer"),
    "observability/req_time_stats.py": ("queue_time",),
    "plugins/__init__.py": ("sglang.srt.plugins",),
    "plugins/hook_registry.py": ("AROUND",),
    "runtime_context.py": ("pp_rank", "tp_rank"),
}
"""Variables, attributes and keys, and a file that has each."""


def arguments_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of a function's arguments, without `self`; `**` before what takes all others."""
    args = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return [one for one in args if one not in ("self", "cls")] + (
        [f"**{node.args.kwarg.arg}"] if node.args.kwarg else []
    )


def functions_of(tree: ast.Module) -> dict[str, list[str]]:
    """Arguments of each function, and of each method by its class."""
    found = {}
    for outer in tree.body:
        prefix, inside = (f"{outer.name}.", outer.body) if isinstance(outer, ast.ClassDef) else ("", [outer])
        for node in inside:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + node.name] = arguments_of(node)
    return found


def fields_of(tree: ast.Module, owner: str | None = None) -> list[str]:
    """Fields of a class, or of all."""
    classes = [one for one in tree.body if isinstance(one, ast.ClassDef) and owner in (None, one.name)]
    rows = (node.target for one in classes for node in one.body if isinstance(node, ast.AnnAssign))
    return [target.id for target in rows if isinstance(target, ast.Name)]


def words_of(tree: ast.AST) -> Iterator[str]:
    """Names, attributes and texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def read(wheel: Path, version: str) -> dict[str, Any]:
    """What a package has; SystemExit where something is not where it was."""
    with zipfile.ZipFile(wheel) as archive:

        def tree(name: str) -> ast.Module:
            return ast.parse(archive.read(f"sglang/srt/{name}"))

        groups = [name.removeprefix("sglang/srt/") for name in archive.namelist() if "/srt/arg_groups/fields/" in name]
        known = {name: functions_of(tree(name)) for name in FUNCTIONS}
        missing = [f"{name}: {one}" for name, wanted in FUNCTIONS.items() for one in wanted if one not in known[name]]
        for name, wanted in WORDS.items():
            there = {*words_of(tree(name))}
            missing += [f"{name}: {one}" for one in wanted if one not in there]
        if missing:
            raise SystemExit(f"SGLang {version} has no more:\n" + "\n".join(missing))
        return {
            "version": version,
            "server_args": sorted(
                {field for name in groups if name.endswith(".py") for field in fields_of(tree(name))}
            ),
            "sampling_params": sorted(fields_of(tree("sampling/sampling_params.py"), "SamplingParams")),
            "functions": {one: known[name][one] for name, wanted in FUNCTIONS.items() for one in wanted},
            "words": sorted({one for wanted in WORDS.values() for one in wanted}),
        }


def main() -> None:
    """Downloads a version and writes what it has."""
    version = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        how = ("--no-deps", "--only-binary", ":all:", "--python-version", "3.12", "--dest", folder)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *how, f"sglang=={version}"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        SIGNATURES.write_text(json.dumps(read(wheel, version), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
