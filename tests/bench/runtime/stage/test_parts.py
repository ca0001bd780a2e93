"""Whatever a checkpoint looks like, a stage holds the unsplit model's values and takes no one else's tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, modeling_utils

from pipetune.bench.errors import ModelError
from pipetune.bench.models.checkpoint import INDEX, SINGLE, weight_files
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.models.weights import check_weights
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.spec import ModelSpec
from tests.bench.models.model_configs import FAMILIES
from tests.bench.runtime.stage import bytes_read

MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "tied, learned positions": ("gpt2", {}),
    "experts, mixtral": ("mixtral", {}),
    "experts, qwen2_moe": ("qwen2_moe", {**FAMILIES["llama"], **MOE}),
    "experts, qwen3_moe": ("qwen3_moe", {**FAMILIES["llama"], **MOE, "head_dim": 8}),
    "experts, deepseek_v3": ("deepseek_v3", {}),
}
SPLIT = ((0, 1), (1, 3), (3, 4))


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    family, changes = CONFIGS[kind]
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, {}), **changes})
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def new_stage(folder: Path) -> Stage:
    return Stage(resolve_model(ModelSpec(name=str(folder))), torch.device("cpu"))


def load(folder: Path, first: int, end: int, num_layers: int = 4) -> Stage:
    stage = new_stage(folder)
    stage.assign(first, end, is_first=first == 0, is_last=end == num_layers)
    return stage


def names_in(folder: Path) -> set[str]:
    return {name for file in weight_files(folder) for name in load_file(file)}


def layer_of(name: str) -> int | None:
    """Of `model.layers.3.mlp…` 3; None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def embedding_name(model: Any) -> str:
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The names of tensors that are taken out of checkpoints meanwhile."""
    taken: set[str] = set()
    with monkeypatch.context() as patch:
        loader: Any = modeling_utils
        patch.setattr(loader, "safe_open", bytes_read.recording(loader.safe_open, taken))
        yield taken


def assert_equal_parts(stage: Stage, whole: dict[str, torch.Tensor]) -> None:
    own = dict(stage.model.named_parameters(remove_duplicate=False))
    assert own
    for name, parameter in own.items():
        assert torch.equal(parameter, whole[name]), name


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_stages_hold_the_unsplit_values_and_take_their_own_tensors_alone(
    kind: str, shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    names = names_in(tmp_path)
    assert (tmp_path / INDEX).is_file() == (shard_size != "5GB")
    if "experts" in kind:
        assert any(".experts.0." in name for name in names), "one tensor an expert, as on the hub"
    taken_by = []
    for first, end in SPLIT:
        with recorded(monkeypatch) as taken:
            stage = load(tmp_path, first, end)
        assert_equal_parts(stage, model.state_dict())
        assert {layer for name in taken if (layer := layer_of(name)) is not None} == set(range(first, end))
        taken_by.append(taken)
    assert set.union(*taken_by) == names
    embedding = embedding_name(model)
    tied = model.config.tie_word_embeddings
    assert [embedding in taken for taken in taken_by] == [True, False, tied]
    for name in names - {embedding}:
        if layer_of(name) is not None:
            assert sum(name in taken for taken in taken_by) == 1, name


def test_a_checkpoint_of_the_base_model_is_read_by_its_shorter_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("tied, learned positions")
    model.config.save_pretrained(tmp_path)
    values = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
    del values["lm_head.weight"]
    save_file({name: value.clone() for name, value in values.items()}, tmp_path / SINGLE, metadata={"format": "pt"})
    for first, end in SPLIT:
        with recorded(monkeypatch) as taken:
            stage = load(tmp_path, first, end)
        assert_equal_parts(stage, model.state_dict())
        assert {layer_of(name) for name in taken} - {None} == set(range(first, end))


def test_moving_a_boundary_reads_the_moved_layer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("experts, mixtral")
    model.save_pretrained(tmp_path)
    stage = load(tmp_path, 0, 2)
    with recorded(monkeypatch) as taken:
        stage.assign(0, 3, is_first=True, is_last=False)
    assert {name for name in taken if layer_of(name) != 2} <= {"model.norm.weight"}
    assert any(layer_of(name) == 2 for name in taken)
    with recorded(monkeypatch) as taken:
        stage.assign(0, 1, is_first=True, is_last=False)
    assert taken == set()
    assert_equal_parts(stage, model.state_dict())


@pytest.mark.parametrize("stored", ["apart", "as the head"])
def test_ends_that_move_have_the_weights_of_the_unsplit_model_however_a_tied_checkpoint_stores_them(
    stored: str, tmp_path: Path
) -> None:
    model = make_model("tied")
    model.save_pretrained(tmp_path)
    values = load_file(tmp_path / SINGLE)
    embedding = values.pop("model.embed_tokens.weight")
    values["lm_head.weight"] = torch.randn_like(embedding) if stored == "apart" else embedding
    if stored == "apart":
        values["model.embed_tokens.weight"] = embedding
    save_file(values, tmp_path / SINGLE, metadata={"format": "pt"})
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    stage = Stage(check_weights(resolve_model(ModelSpec(name=str(tmp_path)))), torch.device("cpu"))
    for first, end in ((0, 3), (2, 4), (0, 4), (1, 3), (3, 4), (0, 1)):
        stage.assign(first, end, is_first=first == 0, is_last=end == 4)
        assert_equal_parts(stage, dict(whole.state_dict()))
        ends = {"embed_tokens": first == 0 or (end == 4 and stored != "apart"), "lm_head": end == 4}
        held = {name for name, parameter in stage.model.named_parameters(remove_duplicate=False) if parameter.numel()}
        for name, holds in ends.items():
            assert any(name in one for one in held) == holds, (first, end)


def test_weights_that_the_checkpoint_lacks_are_named_by_the_stage_that_needs_them(tmp_path: Path) -> None:
    make_model("untied").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / INDEX).read_text())
    lacking = "model.layers.2.mlp.up_proj.weight"
    file = tmp_path / index["weight_map"].pop(lacking)
    values = load_file(file)
    del values[lacking]
    save_file(values, file, metadata={"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps(index))
    load(tmp_path, 0, 2)
    with pytest.raises(ModelError, match=f"lacks 1 weights, {lacking}"):
        load(tmp_path, 2, 4)


@pytest.mark.parametrize("shard_size", ["5GB", "14MB"], ids=["single", "sharded"])
def test_a_rank_reads_its_share_of_the_bytes(shard_size: str, tmp_path: Path) -> None:
    """140 MB over two ranks, each in a process of its own."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=8192,
        tie_word_embeddings=shard_size == "14MB",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(  # type: ignore[no-untyped-call]
        tmp_path, max_shard_size=shard_size
    )
    total = sum(file.stat().st_size for file in weight_files(tmp_path))
    reads = bytes_read.read_by_ranks(str(tmp_path), (5, 3))
    for read in reads:
        assert read.taken_bytes == read.share_bytes == read.weights_bytes
        assert 0.3 * total < read.share_bytes < 0.75 * total
        # Of the files no more than the share may come into memory; the rest is the allocator's and the tokenizer's.
        assert read.peak_bytes < 1.05 * read.share_bytes + 16 * 2**20
    tied_bytes = 8192 * 512 * 4 if config.tie_word_embeddings else 0
    assert abs(sum(read.share_bytes for read in reads) - total - tied_bytes) < 2**20
