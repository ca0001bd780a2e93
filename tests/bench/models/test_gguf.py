"""A GGUF must become the model it was made from, once, or be refused with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipetune.bench.errors import ModelError
from pipetune.bench.files import CACHE_VARIABLE
from pipetune.bench.models import checkpoint
from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.gguf import find_gguf, gguf_revision, read_header
from pipetune.bench.models.resolve import ResolvedModel, resolve_model
from pipetune.bench.spec import LoadFormat, ModelSpec
from tests.bench.models.gguf_files import TOKENS, tensors_of, write_gguf
from tests.bench.models.model_configs import FAMILIES, model_config

QWEN: dict[str, Any] = {"head_dim": 128}
"""What transformers assumes of Qwen 3 files, whatever they say."""

MOE: dict[str, Any] = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


def resolve(
    path: Path, load_format: LoadFormat = "auto", revision: str | None = None, said: list[str] | None = None
) -> ResolvedModel:
    spec = ModelSpec(name=str(path), load_format=load_format, revision=revision)
    return resolve_model(spec, on_progress=None if said is None else said.append)


def make_model(family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    if family == "qwen3_moe":
        config = AutoConfig.for_model(family, **{**FAMILIES["llama"], "vocab_size": len(TOKENS), **changes})
    else:
        config = model_config(family, vocab_size=len(TOKENS), **changes)
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def values_of(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen3", QWEN), ("gpt2", {}), ("qwen3_moe", MOE)],
)
def test_a_gguf_becomes_the_model_it_was_made_from(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(family, **changes)
    said: list[str] = []
    resolved = resolve(write_gguf(tmp_path / "tiny.gguf", model), said=said)
    assert resolved.architecture == type(model).__name__
    assert values_of(resolved.folder).keys() == model.state_dict().keys()
    for name, values in values_of(resolved.folder).items():
        assert torch.equal(values, model.state_dict()[name]), name
    shape = describe_model(resolved)
    assert (shape.num_layers, shape.tied) == (4, model.config.tie_word_embeddings)
    assert not [text for text in said if "made no use" in text]


def test_quantised_values_come_out_exactly(tmp_path: Path) -> None:
    model = make_model("qwen3", **QWEN, intermediate_size=64)
    file = write_gguf(tmp_path / "tiny.gguf", model, tensor_type="Q8_0")
    assert read_header(file).dtype == "float32"
    found = values_of(resolve(file).folder)["model.layers.3.mlp.up_proj.weight"]
    written = tensors_of(model)["blk.3.ffn_up.weight"]
    kind = gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(found.numpy(), gguf.dequantize(gguf.quantize(written, kind), kind))


@pytest.mark.parametrize(("tensor_type", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision_stays_what_it_is(tensor_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("qwen3", **QWEN)
    resolved = resolve(write_gguf(tmp_path / "tiny.gguf", model, tensor_type=tensor_type))
    assert resolved.checkpoint_bytes is not None
    assert resolved.checkpoint_bytes < 3 * model.num_parameters()
    assert torch.equal(values_of(resolved.folder, dtype)["model.norm.weight"], model.model.norm.weight.to(dtype))


def test_the_tokenizer_splits_digits_as_it_was_trained(tmp_path: Path) -> None:
    folder = resolve(write_gguf(tmp_path / "tiny.gguf", make_model())).folder
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a  42").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "ĠĠ", "4", "2"]
    assert tokenizer("</s>").input_ids == [2]
    assert tokenizer.model_max_length == 64


def test_an_unknown_way_to_split_text_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    resolve(write_gguf(tmp_path / "tiny.gguf", make_model(), pre="of-tomorrow"), said=said)
    assert [text for text in said if "'of-tomorrow'" in text]


def test_a_file_without_tokenizer_is_a_model_without_one(tmp_path: Path) -> None:
    resolved = resolve(write_gguf(tmp_path / "tiny.gguf", make_model(), tokenizer=False))
    assert not (resolved.folder / "tokenizer.json").exists()
    assert describe_model(resolved).vocab_size == len(TOKENS)


def test_a_folder_with_one_gguf_is_that_gguf_and_is_converted_once(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_model())
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    first = resolve(tmp_path)
    said: list[str] = []
    again = resolve_model(first.spec, on_progress=said.append)
    assert again == first
    assert said == []
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == [first.folder]


def test_a_changed_file_is_converted_anew(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", make_model())
    before = resolve(file)
    write_gguf(file, make_model(rms_norm_eps=1e-3))
    after = resolve(file)
    assert after.folder != before.folder
    with pytest.raises(ModelError, match="changed since"):
        resolve_model(before.spec)


def test_large_files_are_told_apart_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", make_model())
    whole = gguf_revision(file)
    monkeypatch.setattr(checkpoint, "FULL_HASH_BYTES", 1000)
    quick = gguf_revision(file)
    assert whole != quick == gguf_revision(file)
    write_gguf(file, make_model("qwen3", **QWEN))
    assert gguf_revision(file) != quick


def test_dummy_weights_need_the_config_alone(tmp_path: Path) -> None:
    resolved = resolve(write_gguf(tmp_path / "tiny.gguf", make_model(), leave_out="blk.2.ffn_up.weight"), "dummy")
    assert resolved.checkpoint_bytes is None
    assert not list(resolved.folder.glob("*.safetensors"))
    assert (resolved.folder / "tokenizer.json").is_file()
    assert describe_model(resolved).num_layers == 4


def test_safetensors_beside_it_win(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    write_gguf(tmp_path / "tiny.gguf", model)
    assert find_gguf(tmp_path) is None
    assert resolve(tmp_path).folder == tmp_path


def test_several_files_must_be_told_apart(tmp_path: Path) -> None:
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"several GGUF files \(q4\.gguf, q8\.gguf\); name the one"):
        resolve(tmp_path)


def test_split_files_are_refused_with_the_command_that_joins_them(tmp_path: Path) -> None:
    for part in (1, 2):
        write_gguf(tmp_path / f"m-0000{part}-of-00002.gguf", make_model(), split__count=2)
    with pytest.raises(ModelError, match=r"llama-gguf-split --merge m-00001-of-00002\.gguf"):
        resolve(tmp_path)


@pytest.mark.parametrize(("kind", "message"), [("adapter", "is a LoRA adapter"), ("imatrix", "holds a imatrix")])
def test_what_is_no_model_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", make_model(), general__type=kind)
    with pytest.raises(ModelError, match=message):
        resolve(file)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", make_model(), architecture="rwkv7")
    with pytest.raises(ModelError, match=r"cannot convert a GGUF of architecture 'rwkv7'.*safetensors"):
        resolve(file)


def test_a_family_that_cannot_be_split_is_refused_before_the_work(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", make_model(), architecture="t5")
    with pytest.raises(ModelError, match="'t5'"):
        resolve(file)


def test_missing_weights_are_named(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", make_model(), leave_out="blk.2.ffn_up.weight")
    with pytest.raises(ModelError, match=r"no values for 1 weights.*model\.layers\.2\.mlp\.up_proj\.weight"):
        resolve(file)
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"tiny\.gguf: is no GGUF file, or is cut short"):
        resolve(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", make_model())
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cut short"):
        resolve(file)


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", make_model())
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("pipetune.bench.models.gguf.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match=f"more room in {CACHE_VARIABLE}"):
        resolve(file)
