"""A tiny config of every causal-LM family that transformers knows: its own defaults, with every size made small.

Sizes are recognised by their names, in the config and in those inside it. Lists of kinds of layer (sliding and full
attention, dense and mixture of experts …) are written so that every kind stands beside every kind, itself included:
each sort of boundary between two layers then occurs, and a cut can be put on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Every `model_type` that `AutoModelForCausalLM` takes."""

VOCAB_SIZE = 203
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, EXPERTS, WINDOW = 64, 4, 2, 16, 96, 4, 6
MIN_LAYERS = 5
LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks"),
    # Some decoders take the encoder's count for their caches.
    *("encoder_layers", "num_encoder_layers"),
)
_TOWER_COUNTS = ("depth", "conf_num_hidden_layers", "num_global_layers")
"""Counts of layers that text never meets."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "decoder_vocab_size": VOCAB_SIZE,
    "unpadded_vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "max_target_positions": 64,
    "max_source_positions": 64,
    "context_length": 64,
    "initializer_range": 0.15,
    "init_std": 0.15,
    "emb_init_range": 0.15,
    "embed_init_std": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # widths
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "embedding_dim", "emb_dim"), HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "attention_hidden_size", "d_inner"), HIDDEN),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "out_hidden_size", "backbone_hidden_size"), HIDDEN),
    **dict.fromkeys(("adapter_out_dim", "adapter_in_dim", "adapter_input_size", "input_size"), HIDDEN),
    "hidden_size_per_layer_input": 16,
    "hidden_size_global": HIDDEN,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dim_ff", "dff", "d_ff", "ffn_hidden_size"), MLP),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "feed_forward_size"), MLP),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "mlp_dim"), MLP),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "conf_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "kv_n_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "d_head", "d_kv", "kv_channels"), HEAD_DIM),
    **dict.fromkeys(("dim_head", "attention_head_size", "rotary_dim", "swa_v_head_dim"), HEAD_DIM),
    # latent attention and indexers
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "v_head_dim": HEAD_DIM,
    "qk_head_dim": HEAD_DIM,
    "index_n_heads": 2,
    "index_head_dim": HEAD_DIM,
    "index_topk": 8,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "o_groups": 2,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("top_k_experts", "decoder_sparse_step"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 2),
    "router_hidden_size": 32,
    "zero_expert_num": 2,
    # recurrent layers
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads"), 8),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "mamba_headdim"), HEAD_DIM),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD_DIM),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    # windows, which prompts must exceed
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), WINDOW),
    **dict.fromkeys(("local_attention", "attention_chunk_size", "keep_window_size"), WINDOW),
    "local_attention_window_len": WINDOW,
    # eyes and ears, which text never meets
    "image_size": 28,
    "patch_size": 14,
    "num_mel_bins": 16,
    "num_filters": 8,
    "codebook_size": 32,
    "codebook_dim": 16,
    "base_channels": 32,
    "output_channels": 16,
    "vision_output_dim": 64,
}
"""By name: what a size becomes, wherever it stands."""

_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "attn_layers")
"""Lists with one kind of layer each."""


def every_boundary(kinds: Sequence[str]) -> list[str]:
    """The shortest sequence in which every kind follows every kind, itself included (de Bruijn, order 2).

    Example:
        >>> every_boundary(["a", "b"])
        ['a', 'a', 'b', 'b', 'a']
    """
    order: list[int] = []
    for first in range(len(kinds)):
        order.append(first)
        for second in range(first + 1, len(kinds)):
            order += [first, second]
    return [kinds[index] for index in (*order, 0)]


_SLIDING_FULL = every_boundary(["sliding_attention", "full_attention"])
_LINEAR_FULL = every_boundary(["linear_attention", "full_attention"])
_KV_SHARING = {
    "num_hidden_layers": 8,
    "num_kv_shared_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"] * 2,
}
_ROPE_BY_KIND = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
}
_DOTS3_NOTE = {
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_DIM,
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": HEAD_DIM,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": HEAD_DIM,
}
_GEMMA4 = {**_KV_SHARING, "global_head_dim": HEAD_DIM, "hidden_size_per_layer_input": 8}
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 5,
    "layer_types": _SLIDING_FULL,
    "global_head_dim": HEAD_DIM,
}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 64,
    "heads_per_ngram": 2,
    "split_ngram_parts": 4,
    "make_ngram_vocab_size_divisible_by": 8,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "bert": {"is_decoder": True},
    "bert-generation": {"is_decoder": True},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "camembert": {"is_decoder": True},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "dense"]},
    "cohere_compass_text": {"layer_types": _SLIDING_FULL, "rope_parameters": _ROPE_BY_KIND},
    "data2vec-text": {"is_decoder": True},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": HIDDEN}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": EXPERTS, "first_k_dense_replace": 2},
    "dots1": {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 2,
        "layer_types": _SLIDING_FULL,
    },
    "dots3_note": {"text_config": _DOTS3_NOTE},
    "dots3_note_text": _DOTS3_NOTE,
    "electra": {"is_decoder": True, "embedding_size": 32},
    "ernie": {"is_decoder": True},
    "gemma3n": {"text_config": {**_KV_SHARING, "laurel_rank": 4, "activation_sparsity_pattern": None}},
    "gemma3n_text": {**_KV_SHARING, "laurel_rank": 4, "activation_sparsity_pattern": None},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _KV_SHARING},
    "gemma4_unified_text": _KV_SHARING,
    "gemma4_assistant": {
        "base": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}},
        "text_config": _ASSISTANT,
    },
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "glm_moe_dsa": {"indexer_types": ["full", "full", "shared", "full", "full"]},
    "gpt_neo": {
        "base": {"num_layers": 5, "attention_types": [[["global", "global", "local", "local", "global"], 1]]},
        "attention_types": [[["global", "global", "local", "local", "global"], 1]],
    },
    "granitemoehybrid": {"num_hidden_layers": 5, "layer_types": _LINEAR_FULL},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "num_experts": EXPERTS, "moe_topk": 2},
    "hy_v4": {"num_hidden_layers": 7, "indexer_types": ["full", "full", "shared", "shared", "full", "shared", "full"]},
    "inkling_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "dense"]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "laguna": {"layer_types": _SLIDING_FULL},
    "lfm2": {"layer_types": every_boundary(["conv", "full_attention"])},
    "lfm2_moe": {"layer_types": every_boundary(["conv", "full_attention"])},
    "llama4": {"text_config": {"interleave_moe_layer_step": 2}},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "megatron-bert": {"is_decoder": True},
    "mellum": {"layer_types": _SLIDING_FULL, "mlp_layer_types": ["dense", "sparse", "sparse", "dense", "dense"]},
    "minimax_m3_vl_text": {
        "layer_types": every_boundary(["full_attention", "minimax_m3_sparse"]),
        "mlp_layer_types": ["dense", "sparse", "sparse", "dense", "dense"],
    },
    "mllama": {"text_config": {"num_hidden_layers": 8, "cross_attention_layers": [1, 5]}},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _SLIDING_FULL},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": _SLIDING_FULL,
        "mlp_only_layers": [1, 2],
    },
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": _SLIDING_FULL,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {"mlp_only_layers": [1, 2]},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 8],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
    },
    "rembert": {"is_decoder": True, "input_embedding_size": 32, "output_embedding_size": 48},
    "roberta": {"is_decoder": True},
    "roberta-prelayernorm": {"is_decoder": True},
    "roc_bert": {
        "is_decoder": True,
        "shape_vocab_size": VOCAB_SIZE,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": VOCAB_SIZE,
        "pronunciation_embed_dim": 16,
    },
    "roformer": {"is_decoder": True, "embedding_size": 32},
    "smollm3": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": _SLIDING_FULL,
        "no_rope_layers": [1, 0, 0, 1, 1],
    },
    "xlm-roberta": {"is_decoder": True},
    "xlm-roberta-xl": {"is_decoder": True},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS},
    "zaya": {"num_experts_per_tok": 1},
}
"""By family, what its defaults do not give: `base` goes into the first config, from which names and kinds are read."""


def _shrunk(base: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a small config of this one's class."""
    known = base.to_dict()
    sizes = {name: size for name, size in SIZES.items() if known.get(name) is not None or name.endswith("token_id")}
    latent = "qk_rope_head_dim" in known
    if latent and known.get("kv_lora_rank") is not None:
        # Latent attention derives its heads from the parts.
        sizes.pop("head_dim", None)
        sizes.update({name: HEADS for name in ("num_key_value_heads",) if name in sizes})
    kinds = {name: list(dict.fromkeys(known[name])) for name in _KINDS if known.get(name)}
    num_layers = max(MIN_LAYERS, *(len(names) ** 2 + 1 for names in kinds.values()), 0) if kinds else MIN_LAYERS
    num_layers = next((changes[name] for name in LAYER_COUNTS if name in changes), num_layers)
    for offset, (name, names) in enumerate(kinds.items()):
        if len(names) > 1:
            cycle = every_boundary(names)[:-1]
            # Each list starts elsewhere, so that kinds of attention and of MLP meet in every combination.
            sizes[name] = [cycle[(layer + offset) % len(cycle)] for layer in range(num_layers)]
    sizes |= {name: num_layers for name in LAYER_COUNTS if isinstance(known.get(name), int)}
    sizes |= {name: 2 for name in _TOWER_COUNTS if isinstance(known.get(name), int)}
    for name in base.sub_configs:
        inner = getattr(base, name, None)
        if isinstance(inner, PreTrainedConfig):
            sizes[name] = type(inner)(**_shrunk(inner, changes.get(name, {}))).to_dict()
    return sizes | {name: value for name, value in changes.items() if name not in base.sub_configs}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A config of some ten thousand parameters.

    Args:
        family: a `model_type` of `FAMILIES`.
        changes: values to have instead of those chosen here.

    Raises:
        Exception: whatever transformers raises where a family's config does not build.
    """
    config_class = CONFIG_MAPPING[family]
    given = OVERRIDES.get(family, {})
    base = config_class(**given.get("base", {}))
    config: PreTrainedConfig = config_class(**_shrunk(base, {**given, **changes}))
    return config


UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "its config demands that all layers share keys and values; its text model refuses",
    "gemma4_unified_assistant": "its config demands that all layers share keys and values; its text model refuses",
    "musicgen": "AutoModelForCausalLM hands its whole config to the decoder, which does not take it",
    "musicgen_melody": "AutoModelForCausalLM hands its whole config to the decoder, which does not take it",
}
"""Families that transformers itself cannot build from a config of their own, and why."""
