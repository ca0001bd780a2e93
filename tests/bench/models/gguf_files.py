"""GGUF files written from tiny models as llama.cpp's converter writes them, with a tokenizer of 260 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

TOKENS = ("<pad>", "<s>", "</s>", *bytes_to_unicode().values(), "ĠĠ", "ĠĠĠ")  # type: ignore[no-untyped-call]
_ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gpt2": "gpt2"}
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}


def write_gguf(
    file: Path,
    model: Any,
    *,
    tensor_type: str = "F32",
    tokenizer: bool = True,
    leave_out: str | None = None,
    architecture: str | None = None,
    **metadata: str | int,
) -> Path:
    """Writes a model.

    Args:
        model: of one of a few families, with `len(TOKENS)` tokens in its vocabulary.
        tensor_type: of matrices, `F32`, `F16`, `BF16` or `Q8_0`; vectors stay F32.
        leave_out: a GGUF name of a tensor that shall be missing.
        architecture: another than the model's own.
        metadata: further keys, with `__` for a dot.
    """
    config = model.config
    arch = architecture or _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, arch)
    for name, key in _SIZES.items():
        value = getattr(config, name, None)
        if isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    if config.model_type != "gpt2":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_uint32(f"{arch}.rope.dimension_count", head_dim)
        writer.add_uint32(f"{arch}.attention.key_length", head_dim)
        writer.add_float32(f"{arch}.rope.freq_base", config.rope_parameters["rope_theta"])
    if config.model_type == "qwen3_moe":
        writer.add_uint32(f"{arch}.expert_feed_forward_length", config.moe_intermediate_size)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(str(metadata.pop("pre", "smollm")))
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
        writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
    else:
        writer.add_uint32(f"{arch}.vocab_size", config.vocab_size)
    for key, given in metadata.items():
        if isinstance(given, str):
            writer.add_string(key.replace("__", "."), given)
        else:
            writer.add_uint16(key.replace("__", "."), given)
    for name, values in tensors_of(model).items():
        if name != leave_out:
            kind = gguf.GGMLQuantizationType[tensor_type if values.ndim > 1 else "F32"]
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tensors_of(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The model's values by their GGUF names, laid out as llama.cpp wants them."""
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, parameter in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = parameter.float().numpy()
        stem, _, suffix = name.rpartition(".")
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            gate, up = np.split(values, 2, axis=1)
            tensors |= {f"blk.{block}.ffn_gate_exps.weight": gate, f"blk.{block}.ffn_up_exps.weight": up}
            continue
        if name.endswith("experts.down_proj"):
            tensors[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = values
            continue
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.T
        tensors[f"{names.get_name(stem)}.{suffix}"] = np.ascontiguousarray(values)
    return tensors
