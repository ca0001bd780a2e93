"""Configs of a few thousand parameters, one per family, for tests that need no weights of anyone's."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 96}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {**_GPT, "bos_token_id": 1, "eos_token_id": 2},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": 96},
    "gemma2": {**_COMMON, "head_dim": 16},
    "mixtral": {**_COMMON, "num_local_experts": 4},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 96, "state_size": 4},
    "deepseek_v3": {
        **_COMMON,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
"""By `model_type`: dense, tied, fused, mixture of experts, learned positions, recurrent, latent attention."""

_LATENT: dict[str, Any] = {**_COMMON, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16}
_LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4}
_LATENT |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_INDEXED: dict[str, Any] = {**_LATENT, "first_k_dense_replace": 1, "index_head_dim": 16}
# Of few heads the scores are often all zero, and what is chosen among equals depends on how many there are.
_INDEXED |= {"index_n_heads": 16, "index_topk": 4}
_OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v32": _INDEXED,
    "glm_moe_dsa": {**_INDEXED, "indexer_types": ["full", "shared", "full", "shared"]},
    "falcon_h1": {
        **_COMMON,
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
    },
    "gemma3n_text": {
        **_COMMON,
        "head_dim": 16,
        "num_hidden_layers": 5,
        "layer_types": [*["sliding_attention", "full_attention"], *["sliding_attention"] * 2, "full_attention"],
        "intermediate_size": [48] * 5,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 2,
        "sliding_window": 4,
        "laurel_rank": 8,
    },
    "hy_v4": _COMMON,
    "longcat_flash": {
        **_LATENT,
        "num_hidden_layers": 8,
        "num_layers": 4,
        "head_dim": 8,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba2": {**_COMMON, "num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2, "expand": 2, "chunk_size": 4},
    "minimax": {
        **_COMMON,
        "head_dim": 8,
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "block_size": 4,
    },
    "mllama": {"text_config": {**_COMMON, "num_hidden_layers": 6, "cross_attention_layers": [2, 5]}},
    "xlstm": {**_COMMON, "hidden_size": 128, "num_heads": 2, "chunk_size": 4},
    "zamba2": {
        **_COMMON,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba"],
        "hybrid_layer_ids": [1, 3, 4],
        "num_mem_blocks": 2,
        "mamba_d_state": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "chunk_size": 4,
        "adapter_rank": 4,
    },
    "zaya": _COMMON,
    "qwen3_next": {
        **_COMMON,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gemma4_text": {
        **_COMMON,
        "head_dim": 16,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 0,
    },
}


def model_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config of a family, with some values changed."""
    config: PreTrainedConfig = AutoConfig.for_model(family, **{**(FAMILIES | _OTHERS)[family], **changes})
    return config
