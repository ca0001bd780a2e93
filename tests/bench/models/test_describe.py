"""What `describe_model` says of a model must be what the model really is, and its device map must load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from pipetune.bench.errors import ModelError
from pipetune.bench.memory import ModelShape
from pipetune.bench.models.describe import build_on_meta, describe_model
from pipetune.bench.models.dummy import init_dummy_weights
from pipetune.bench.models.layers import UNSPLITTABLE, check_family, find_layers
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.spec import ModelSpec
from tests.bench.models.model_configs import FAMILIES, model_config


def describe(folder: Path, **spec: Any) -> ModelShape:
    return describe_model(resolve_model(ModelSpec(name=str(folder), load_format="dummy", **spec)))


def save_config(folder: Path, family: str, **changes: Any) -> Path:
    model_config(family, **changes).save_pretrained(folder)
    return folder


def load(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **how)


def whole_map(shape: ModelShape) -> dict[str, str]:
    layers = [f"{shape.layers_prefix}.{index}" for index in range(shape.num_layers)]
    return dict.fromkeys((*shape.first_modules, *layers, *shape.last_modules), "cpu")


@pytest.fixture(scope="module", params=sorted(set(FAMILIES) - {"mamba"}))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one family on disk."""
    folder = save_config(tmp_path_factory.mktemp("model"), request.param)
    model = build_on_meta(resolve_model(ModelSpec(name=str(folder), load_format="dummy")))
    init_dummy_weights(model, 0)
    model.save_pretrained(folder)
    return folder


def test_bytes_add_up_to_the_model(saved: Path) -> None:
    shape = describe(saved)
    model = load(saved)
    expected = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    parts = shape.embedding_bytes + shape.head_bytes + shape.other_bytes
    assert parts + sum(layer.weight_bytes for layer in shape.layers) == expected
    assert shape.num_parameters == model.num_parameters()
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert shape.architecture == type(model).__name__
    assert shape.num_layers == model.config.num_hidden_layers


def test_kv_bytes_are_those_of_a_real_cache(saved: Path) -> None:
    shape = describe(saved)
    model = load(saved).eval()
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.full((1, 3), 5), past_key_values=cache, use_cache=True)
    per_token = [(layer.keys.nbytes + layer.values.nbytes) // 3 for layer in cache.layers]
    assert [layer.kv_bytes_per_token for layer in shape.layers] == per_token


def test_modules_make_a_complete_device_map_that_loads(saved: Path) -> None:
    device_map = whole_map(describe(saved))
    plain = load(saved)
    for name, _ in (*plain.named_parameters(), *plain.named_buffers()):
        owners = [key for key in device_map if name == key or name.startswith(f"{key}.")]
        assert len(owners) == 1, f"{name} belongs to {owners}"
    mapped, info = load(saved, device_map=device_map, output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.tensor([[3, 7, 11]])
    with torch.no_grad():
        torch.testing.assert_close(mapped(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_embedding_is_first_and_norm_and_head_are_last(tmp_path: Path) -> None:
    shape = describe(save_config(tmp_path, "llama"))
    assert shape.layers_prefix == "model.layers"
    assert shape.first_modules == ("model.embed_tokens", "model.rotary_emb")
    assert shape.last_modules == ("model.norm", "lm_head")


def test_nested_decoder_is_mapped_from_top_to_bottom(tmp_path: Path) -> None:
    shape = describe(save_config(tmp_path, "opt"))
    assert shape.layers_prefix == "model.decoder.layers"
    assert shape.first_modules == ("model.decoder.embed_tokens", "model.decoder.embed_positions")
    assert shape.last_modules == ("model.decoder.final_layer_norm", "lm_head")


def test_half_precision_halves_weights_and_cache(tmp_path: Path) -> None:
    save_config(tmp_path, "llama")
    full, half = describe(tmp_path), describe(tmp_path, dtype="bfloat16")
    assert half.dtype_bytes == 2
    assert [layer.weight_bytes * 2 for layer in half.layers] == [layer.weight_bytes for layer in full.layers]
    assert [layer.kv_bytes_per_token * 2 for layer in half.layers] == [
        layer.kv_bytes_per_token for layer in full.layers
    ]


def test_one_token_meets_only_the_experts_that_are_chosen(tmp_path: Path) -> None:
    shape = describe(save_config(tmp_path, "mixtral", num_local_experts=8, num_experts_per_tok=2))
    layer, total = shape.layers[0], shape.layers[0].weight_bytes // 4
    experts = 8 * 3 * shape.hidden_size * shape.intermediate_size
    assert layer.active_params == total - experts + experts * 2 // 8


def test_kinds_of_layers_are_told(tmp_path: Path) -> None:
    shape = describe(save_config(tmp_path, "gemma2"))
    assert [layer.kind for layer in shape.layers[:2]] == ["sliding_attention", "full_attention"]


def test_recurrent_layers_keep_no_kv(tmp_path: Path) -> None:
    shape = describe(save_config(tmp_path, "qwen3_next"))
    kept = {layer.kind: layer.kv_bytes_per_token > 0 for layer in shape.layers}
    assert kept == {"linear_attention": False, "full_attention": True}


def test_cuts_between_shared_keys_and_their_users_are_forbidden(tmp_path: Path) -> None:
    shape = describe(save_config(tmp_path, "gemma4_text"))
    # Layers 2 and 3 store for 4 and 5, kind by kind.
    assert shape.forbidden_cuts == (3, 4, 5)
    assert [layer.kv_bytes_per_token > 0 for layer in shape.layers] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("family", sorted(UNSPLITTABLE))
def test_families_that_come_out_wrong_are_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match=f"'{family}' cannot be split over devices: {UNSPLITTABLE[family]}"):
        check_family(family)


def test_refusal_by_name_reaches_the_user(tmp_path: Path) -> None:
    AutoConfig.for_model("rwkv").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="rwkv"):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("family", "cuts"),
    [("glm_moe_dsa", (1, 3)), ("mllama", (2, 5)), ("gemma3n_text", (2, 3, 4)), ("zamba2", ())],
)
def test_cuts_are_forbidden_where_a_layer_reads_what_does_not_cross(
    tmp_path: Path, family: str, cuts: tuple[int, ...]
) -> None:
    assert describe(save_config(tmp_path, family)).forbidden_cuts == cuts


@pytest.mark.parametrize(
    ("family", "recurrent", "embeds"),
    [
        ("llama", False, False),
        ("gemma2", False, False),
        ("deepseek_v32", False, False),
        ("gemma3n_text", False, True),
        ("mamba2", True, False),
        ("falcon_h1", True, False),
        ("minimax", True, False),
        ("xlstm", True, False),
        ("zamba2", True, True),
    ],
)
def test_what_a_family_asks_of_a_split_is_told(tmp_path: Path, family: str, recurrent: bool, embeds: bool) -> None:
    shape = describe(save_config(tmp_path, family))
    assert (shape.recurrent, shape.embedding_on_every_stage) == (recurrent, embeds)


def test_families_that_mask_otherwise_behind_a_cache_take_prompts_at_once(tmp_path: Path) -> None:
    AutoConfig.for_model("doge", hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path)
    assert describe(tmp_path).recurrent


def test_layers_of_two_attentions_keep_twice_the_keys_and_values(tmp_path: Path) -> None:
    shape = describe(save_config(tmp_path, "longcat_flash"))
    assert shape.num_layers == 4
    assert [layer.kv_bytes_per_token for layer in shape.layers] == [2 * (16 + 8) * 4] * 4


def test_bias_of_a_tied_head_belongs_to_the_head(tmp_path: Path) -> None:
    AutoConfig.for_model("ctrl", n_embd=32, dff=48, n_layer=2, n_head=4, vocab_size=96).save_pretrained(tmp_path)
    shape = describe(tmp_path)
    assert shape.tied
    assert shape.head_bytes == 96 * 4


def test_encoder_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("roberta", num_hidden_layers=2, hidden_size=32, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="is an encoder"):
        describe(tmp_path)


def test_config_that_fits_no_model_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    with pytest.raises(ModelError, match=r"no model can be built from its config\.json"):
        describe(tmp_path)


def test_layers_are_found_in_a_pruned_model() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config("llama"))  # type: ignore[no-untyped-call]
    _, layers = find_layers(model)
    layers[0] = torch.nn.Identity()
    assert find_layers(model)[0] == "model.layers"
