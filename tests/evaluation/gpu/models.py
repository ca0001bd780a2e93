"""Models without weights of anyone's: configs of six families made small, and two of real shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Weights larger than usual, so that tokens vary.
_TINY: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
TINY_LAYERS = 8
TINY: dict[str, dict[str, Any]] = {
    "llama": {**_TINY, "architectures": ["LlamaForCausalLM"]},
    "qwen3": {**_TINY, "head_dim": 32, "tie_word_embeddings": True, "architectures": ["Qwen3ForCausalLM"]},
    "gpt2": {
        **_TOKENS,
        "n_embd": 128,
        "n_layer": 8,
        "n_head": 4,
        "n_positions": 256,
        "vocab_size": 512,
        "initializer_range": 0.15,
        "architectures": ["GPT2LMHeadModel"],
    },
    "bloom": {
        **_TOKENS,
        "hidden_size": 128,
        "n_layer": 8,
        "n_head": 4,
        "vocab_size": 512,
        "initializer_range": 0.15,
        "architectures": ["BloomForCausalLM"],
    },
    "gemma2": {**_TINY, "head_dim": 32, "sliding_window": 16, "architectures": ["Gemma2ForCausalLM"]},
    "mixtral": {**_TINY, "num_local_experts": 4, "architectures": ["MixtralForCausalLM"]},
}
"""By `model_type`: plain, tied, learned positions, ALiBi, sliding windows, mixture of experts."""

SMALL: dict[str, Any] = {
    **_TOKENS,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}
"""The shape of SmolLM2-135M."""

GROUPED: dict[str, Any] = {
    **_TOKENS,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Two layers of the shape of Llama-3-8B, with a smaller vocabulary."""

LARGE: dict[str, Any] = {
    **_TOKENS,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
"""The shape of Llama-2-7B."""
LARGE_BYTES = 13_500_000_000


def save_config(folder: Path, config: dict[str, Any], model_type: str | None = None) -> Path:
    """Writes a `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "model_type": model_type or config["model_type"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def save_random_checkpoint(folder: Path, config: dict[str, Any], device: str) -> Path:
    """Writes a config and random bf16 weights, drawn on a GPU: on a CPU billions of them take minutes at every load.

    One file a layer, so that no more than one lies in memory.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    save_config(folder, config)
    untyped: Any = AutoModelForCausalLM
    with torch.device("meta"):
        skeleton = untyped.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    files: dict[str, list[str]] = {}
    for name, _ in skeleton.named_parameters():
        parts = name.split(".")
        number = next((part for part in parts if part.isdecimal()), "rest")
        files.setdefault(f"model-{number}.safetensors", []).append(name)
    generator = torch.Generator(device).manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    for file, names in files.items():
        tensors = {}
        for name in names:
            # Norms scale by one; all other weights are drawn as such models draw them.
            tensor = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
            if tensor.dim() > 1:
                tensor.normal_(0.0, 0.02, generator=generator)
            tensors[name] = tensor.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
