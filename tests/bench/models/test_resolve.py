"""A name must lead to one checkpoint and one revision, or to one clear message."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from pipetune.bench.errors import ModelError
from pipetune.bench.models import checkpoint
from pipetune.bench.models.resolve import ResolvedModel, resolve_model
from pipetune.bench.spec import LoadFormat, ModelSpec
from tests.bench.models.model_configs import model_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def resolve(name: Path | str, load_format: LoadFormat = "auto", revision: str | None = None) -> ResolvedModel:
    return resolve_model(ModelSpec(name=str(name), load_format=load_format, revision=revision))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file."""
    folder = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(model_config("llama")).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in several files with an index."""
    folder = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_config(model_config("llama"))  # type: ignore[no-untyped-call]
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def hub_cache(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache that holds one model, `someone/tiny`; gives its snapshot."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(original, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_folder_is_found_with_its_architecture_and_a_content_hash(folder: Path) -> None:
    resolved = resolve(folder)
    assert resolved.folder == folder
    assert resolved.architecture == "LlamaForCausalLM"
    assert resolved.spec.revision is not None
    assert resolved.spec.revision.startswith("sha256:")
    assert resolved.checkpoint_bytes == (folder / "model.safetensors").stat().st_size


def test_resolving_again_with_the_revision_changes_nothing(folder: Path) -> None:
    resolved = resolve(folder)
    assert resolve_model(resolved.spec) == resolved


def test_copies_have_one_revision(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    assert resolve(copy).spec.revision == resolve(folder).spec.revision


def test_one_changed_byte_of_the_weights_is_another_revision(folder: Path) -> None:
    before = resolve(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve(folder).spec.revision != before.spec.revision
    with pytest.raises(ModelError, match="changed since"):
        resolve_model(before.spec)


def test_changed_config_or_tokenizer_is_another_revision(folder: Path) -> None:
    revisions = {resolve(folder).spec.revision}
    (folder / "tokenizer.json").write_text("{}")
    revisions.add(resolve(folder).spec.revision)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    revisions.add(resolve(folder).spec.revision)
    assert len(revisions) == 3


def test_large_checkpoints_are_hashed_quickly_and_a_change_is_still_seen(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FULL_HASH_BYTES", 1000)
    before = resolve(sharded).spec.revision
    assert before is not None
    assert before.startswith("quick:")
    assert resolve(sharded).spec.revision == before
    os.utime(sorted(sharded.glob("*.safetensors"))[0], (0, 0))
    assert resolve(sharded).spec.revision != before


def test_config_alone_is_enough_for_dummy_weights(tmp_path: Path) -> None:
    model_config("llama").save_pretrained(tmp_path)
    resolved = resolve(tmp_path, "dummy")
    assert resolved.checkpoint_bytes is None
    with pytest.raises(ModelError, match="--load-format dummy"):
        resolve(tmp_path, "auto")


def test_dummy_revision_ignores_weights(folder: Path) -> None:
    before = resolve(folder, "dummy").spec.revision
    (folder / "model.safetensors").unlink()
    assert resolve(folder, "dummy").spec.revision == before


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}.*incomplete"):
        resolve(sharded)


def test_weights_cut_short_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    with pytest.raises(ModelError, match=r"model\.safetensors: is no whole .*not fully covered.*; .*Fetch it again"):
        resolve(folder)


@pytest.mark.parametrize(
    "change", [{"dtype": None}, {"dtype": "INT3"}, {"shape": [-1]}, {"shape": "long"}, {"data_offsets": [0]}], ids=str
)
def test_a_header_that_does_not_describe_its_weights_is_refused(folder: Path, change: dict[str, Any]) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["lm_head.weight"] |= change
    damaged = json.dumps(header).encode()
    weights.write_bytes(len(damaged).to_bytes(8, "little") + damaged + content[8 + length :])
    with pytest.raises(ModelError, match=r"model\.safetensors: is no whole safetensors file"):
        resolve(folder)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\0" * 64])
def test_what_is_no_safetensors_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is no whole safetensors file"):
        resolve(folder)


def test_broken_index_is_refused(sharded: Path) -> None:
    (sharded / checkpoint.INDEX).write_text("[]")
    with pytest.raises(ModelError, match="is no safetensors index"):
        resolve(sharded)


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pipetune reads safetensors only"):
        resolve(folder)


def test_adapters_are_refused_with_the_way_to_merge_them(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    for load_format in ("auto", "dummy"):
        with pytest.raises(ModelError, match=r"is a LoRA adapter.*merge_and_unload"):
            resolve(folder, load_format)


def test_of_two_layouts_the_one_that_transformers_reads_counts(folder: Path, sharded: Path) -> None:
    for file in sharded.glob("model*"):
        shutil.copy(file, folder)
    assert checkpoint.weight_files(folder) == (folder / "model.safetensors",)


@pytest.mark.parametrize("name", ["other.safetensors", "other.safetensors.index.json"])
def test_weights_under_another_name_are_found_by_the_config(folder: Path, sharded: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    with pytest.raises(ModelError, match=f"holds no {name}"):
        resolve(folder)
    if name.endswith(".json"):
        for file in sharded.glob("model-*"):
            shutil.copy(file, folder)
        shutil.copy(sharded / checkpoint.INDEX, folder / name)
        assert checkpoint.weight_files(folder) == tuple(sorted(folder.glob("model-*")))
    else:
        (folder / "model.safetensors").rename(folder / name)
        assert checkpoint.weight_files(folder) == (folder / name,)
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(tmp_path, "dummy")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "two words", "a/b/c"])
def test_what_is_neither_folder_nor_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no folder here and no Hugging Face id"):
        resolve(name)


@pytest.mark.parametrize("model_type", ["vit", "no_such_type", None])
def test_what_is_no_causal_lm_is_refused(tmp_path: Path, model_type: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match="no causal language model"):
        resolve(tmp_path, "dummy")


def test_foreign_code_needs_trust(tmp_path: Path) -> None:
    config = {"model_type": "theirs", "auto_map": {"AutoModelForCausalLM": "modeling_theirs.TheirsForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        resolve(tmp_path, "dummy")
    trusted = ModelSpec(name=str(tmp_path), load_format="dummy", trust_remote_code=True)
    assert resolve_model(trusted).architecture == "TheirsForCausalLM"


@pytest.mark.parametrize(
    ("file", "values", "method"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ("config.json", {"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "by an unknown method"),
        ("quantize_config.json", {"bits": 4, "quant_method": "gptq"}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "version": "GEMM"}, "GEMM"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ("params.json", {"quantization": {"qformat_weight": "fp8_e4m3"}}, "fp8_e4m3"),
    ],
)
def test_quantized_checkpoints_are_refused_wherever_the_method_is_written(
    folder: Path, file: str, values: dict[str, object], method: str
) -> None:
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))
    with pytest.raises(ModelError, match=rf"is quantized \({method}\)"):
        resolve(folder)
    told: list[str] = []
    resolve_model(ModelSpec(name=str(folder), load_format="dummy"), on_progress=told.append)
    assert told == [f"{folder} is quantized ({method}); sizes and times are those of unquantized float32 weights"]


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"dtype": None, "text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": "float64"}, "float32"),
        ({"dtype": None}, "float32"),
    ],
)
def test_auto_is_the_checkpoints_own_dtype_and_twice_its_memory_is_said(
    folder: Path, config: dict[str, object], dtype: str
) -> None:
    path, told = folder / "config.json", list[str]()
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    found = resolve_model(ModelSpec(name=str(folder), dtype="auto"), on_progress=told.append)
    assert (found.spec.dtype, told) == (dtype, [f"{folder} is computed in {dtype}, as its checkpoint is kept"])
    told.clear()
    assert resolve_model(ModelSpec(name=str(folder)), on_progress=told.append).spec.dtype == "float32"
    assert len(told) == (dtype != "float32")
    assert all("takes twice the memory" in one for one in told)
    resolve_model(ModelSpec(name=str(folder), dtype="float32"), on_progress=told.append)
    assert len(told) == (dtype != "float32"), "who asked for it knows"


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_hub_id_is_taken_from_the_local_cache(hub_cache: Path, revision: str | None) -> None:
    resolved = resolve("someone/tiny", revision=revision)
    assert resolved.folder == hub_cache
    assert resolved.spec.revision == COMMIT


def test_alias_prefers_the_hub_cache(hub_cache: Path) -> None:
    repository = hub_cache.parents[1]
    repository.rename(repository.with_name("models--HuggingFaceTB--SmolLM2-135M-Instruct"))
    assert resolve("smollm2-135m").spec.revision == COMMIT


def test_unknown_hub_id_says_what_to_do(hub_cache: Path) -> None:
    with pytest.raises(ModelError, match="hf download someone/unknown"):
        resolve("someone/unknown")


def test_snapshot_without_weights_does_not_count_as_the_model(hub_cache: Path) -> None:
    (hub_cache / "model.safetensors").unlink()
    assert resolve("someone/tiny", "dummy").folder == hub_cache
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        resolve("someone/tiny")


FOREIGN = {
    "Mistral's own format": ("params.json", "consolidated.safetensors", "tekken.json"),
    "Meta's own format": ("params.json", "consolidated.00.pth"),
    "shards of a training run": ("pytorch_model_fsdp_0/__0_0.distcp",),
    "shards of DeepSpeed": ("zero_to_fp32.py", "global_step24/mp_rank_00_model_states.pt"),
    "an adapter": ("checkpoint-24/adapter_config.json", "checkpoint-24/adapter_model.safetensors"),
    "a cache of the hub": ("models--someone--tiny/refs/main",),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_other_tools_write_is_called_by_its_name(tmp_path: Path, what: str) -> None:
    for name in FOREIGN[what]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=rf"holds no config\.json, but .*{what}.*give") as caught:
        resolve(tmp_path)
    assert FOREIGN[what][0].partition("/")[0] in str(caught.value) or "params.json" in str(caught.value)


@pytest.mark.parametrize("config", [True, False], ids=["with a config", "without"])
def test_of_a_trainers_folder_the_last_whole_checkpoint_is_named(original: Path, tmp_path: Path, config: bool) -> None:
    for number in (9, 24, 100):
        shutil.copytree(original, tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-100" / "model.safetensors").unlink()
    if config:
        shutil.copy(original / "config.json", tmp_path)
        (tmp_path / "training_args.bin").touch()
    with pytest.raises(ModelError, match=r"give .*/checkpoint-24, the last whole one of 3"):
        resolve(tmp_path)


def test_a_folder_inside_a_checkpoint_leads_to_it(folder: Path) -> None:
    (folder / "original").mkdir()
    (folder / "original" / "params.json").touch()
    with pytest.raises(ModelError, match=r"give .*/model, which is a checkpoint"):
        resolve(folder / "original")


@pytest.mark.parametrize("stray", ["model-00001-of-00002.safetensors", "weights.safetensors"])
def test_weights_that_nothing_would_read_are_named(folder: Path, stray: str) -> None:
    (folder / "model.safetensors").rename(folder / stray)
    (folder / "optimizer.pt").touch()
    with pytest.raises(ModelError, match=rf"holds no model\.safetensors, but {stray}: .*give the model as"):
        resolve(folder)


def test_files_beside_the_weights_change_nothing_but_a_second_layout_is_said(folder: Path, sharded: Path) -> None:
    alone = resolve(folder)
    (folder / "consolidated.safetensors").write_bytes(b"of another tool")
    (folder / "params.json").touch()
    for file in sharded.glob("model*"):
        shutil.copy(file, folder)
    said: list[str] = []
    assert resolve_model(ModelSpec(name=str(folder)), on_progress=said.append) == alone
    assert said == [
        f"{folder}: model.safetensors is read, as transformers does; {checkpoint.INDEX} and its shards are not"
    ]


@pytest.mark.parametrize("by_folder", [True, False], ids=["folder", "id"])
def test_cache_without_refs_gives_its_newest_whole_snapshot(hub_cache: Path, by_folder: bool) -> None:
    repository, name = hub_cache.parents[1], "someone/tiny"
    shutil.rmtree(repository / "refs")
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        shutil.copytree(hub_cache, hub_cache.with_name(commit))
        os.utime(hub_cache.with_name(commit), (2e9 + number, 2e9 + number))
    (hub_cache.with_name("b" * 40) / "model.safetensors").unlink()
    said: list[str] = []
    spec = ModelSpec(name=str(repository) if by_folder else name)
    assert resolve_model(spec, on_progress=said.append).spec.revision == "a" * 40
    assert f"{'a' * 40}, the newest whole one, is taken" in said[-1]


def test_cache_folder_gives_what_main_is_or_says_what_is_whole(hub_cache: Path) -> None:
    repository, other = hub_cache.parents[1], hub_cache.with_name("a" * 40)
    shutil.copytree(hub_cache, other)
    resolved = resolve(repository)
    assert (resolved.folder, resolved.spec.revision) == (hub_cache, COMMIT)
    assert resolve(repository, revision=other.name).folder == other
    (hub_cache / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"of {COMMIT}; get it by `hf download someone/tiny`, or say --revision aaaa"):
        resolve(repository)
    for name in (str(hub_cache), "someone/tiny"):
        with pytest.raises(ModelError, match=r"get the rest by `hf download someone/tiny`"):
            resolve(name)
