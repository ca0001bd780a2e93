"""What pipetune uses of torch, transformers and Optuna beyond their documented parts stands in one module a library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = {ROOT / "bench/models/torch_private.py", ROOT / "bench/models/hf_private.py"}
FILES = sorted(path for folder in ("bench", "tuner", "pipetune") for path in (ROOT / folder).rglob("*.py"))
DOCUMENTED = {
    *("torch", "torch.nn", "torch.distributed", "torch.distributed.launcher.api"),
    *("torch.distributed.elastic.multiprocessing", "torch.distributed.elastic.rendezvous"),
    *("transformers", "accelerate", "accelerate.utils"),
    *("optuna", "optuna.distributions", "optuna.exceptions", "optuna.study", "optuna.trial"),
}
"""Modules that anybody may import from."""
LIBRARIES = {name for name in DOCUMENTED if "." not in name}
OF_PYTHON = {"_exit", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def own_names(tree: ast.AST) -> Iterator[str]:
    """Private names that a module defines, as functions, classes, variables or attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr if of_self(node) else ""


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def asked_by_name(node: ast.AST) -> list[str]:
    """Attributes that `getattr` and the like are given as texts."""
    asking = ("getattr", "hasattr", "setattr", "attrgetter")
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in asking):
        return []
    return [str(given.value) for given in node.args if isinstance(given, ast.Constant)]


def foreign(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Uses of what is not ours and not documented."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            of_library = node.module.split(".")[0] in LIBRARIES
            yield from (f"{node.module}.{alias.name}" for alias in node.names if of_library and is_private(alias.name))
            # A module may be named as something of its package.
            names += [f"{node.module}.{alias.name}" for alias in node.names if alias.name.endswith("_utils")]
        yield from (name for name in names if name.split(".")[0] in LIBRARIES and name not in DOCUMENTED)
        attributes = [node.attr] if isinstance(node, ast.Attribute) and not of_self(node) else asked_by_name(node)
        yield from (name for name in attributes if is_private(name) and name not in own | OF_PYTHON)


def test_private_use_stands_in_its_place() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    placed = {use.rpartition(".")[2] for path in PLACES for use in foreign(trees[path], set())}
    own = {name for path, tree in trees.items() if path not in PLACES for name in own_names(tree)}
    found = [
        f"{path.relative_to(ROOT)}: {use}"
        for path, tree in trees.items()
        if path not in PLACES
        # What is a library's is refused, whoever has a name alike.
        for use in foreign(tree, own - placed)
    ]
    assert not found, f"private names of others; they belong into {', '.join(map(str, PLACES))}"
    assert {"_C", "_dynamo", "_init_weights", "_cdata", "sdpa_attention"} <= placed


@pytest.mark.parametrize(
    "code",
    [
        "import torch._inductor",
        "from torch import _C",
        "from torch.utils import _pytree",
        "from torch.distributed.distributed_c10d import _get_default_group",
        "torch.ops.aten._grouped_mm(x)",
        "tensor._cdata",
        "from transformers.masking_utils import sdpa_mask",
        "from transformers import cache_utils",
        "getattr(config, '_attn_implementation', None)",
        "attrgetter('_buffers')",
        "from optuna._hypervolume import wfg",
        "from optuna.storages._rdb import models",
        "study._storage.get_all_trials()",
    ],
)
def test_each_way_to_private_names_is_seen(code: str) -> None:
    assert list(foreign(ast.parse(code), {"_ours"}))


def test_what_is_ours_or_documented_is_not_meant() -> None:
    ours = "from torch import nn\nimport optuna\nself._buffers\nother._ours\nos._exit(1)\nx.__dict__"
    assert not list(foreign(ast.parse(ours), {"_ours"}))
