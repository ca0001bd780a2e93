"""Tiny random checkpoints of real architectures, and what the unsplit model makes of prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from pipetune.bench.runtime.job import MicroBatchInputs, sort_by_length

VOCAB_SIZE = 300
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
}


def tiny_config(family: str, num_layers: int = 6) -> PreTrainedConfig:
    """A config of a few thousand parameters; windows are short enough to be exceeded in a test."""
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    configs: dict[str, Any] = {
        "llama": lambda: LlamaConfig(num_hidden_layers=num_layers, **COMMON, **special),
        "qwen3": lambda: Qwen3Config(
            num_hidden_layers=num_layers, head_dim=16, tie_word_embeddings=True, **COMMON, **special
        ),
        "gpt2": lambda: GPT2Config(
            n_embd=64, n_layer=num_layers, n_head=4, n_positions=128, vocab_size=VOCAB_SIZE, **special
        ),
        "bloom": lambda: BloomConfig(hidden_size=64, n_layer=num_layers, n_head=4, vocab_size=VOCAB_SIZE, **special),
        "gemma2": lambda: Gemma2Config(
            num_hidden_layers=num_layers, head_dim=16, sliding_window=8, **COMMON, **special
        ),
        "gemma3": lambda: Gemma3TextConfig(
            num_hidden_layers=num_layers, head_dim=16, sliding_window=8, **COMMON, **special
        ),
        "mistral": lambda: MistralConfig(
            num_hidden_layers=num_layers, head_dim=16, sliding_window=8, **COMMON, **special
        ),
        "mixtral": lambda: MixtralConfig(num_hidden_layers=num_layers, num_local_experts=4, **COMMON, **special),
    }
    config: PreTrainedConfig = configs[family]()
    return config


def save_tiny_model(folder: Path, family: str, num_layers: int = 6) -> Path:
    """Saves a random model whose weights are large enough that its tokens vary."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        tiny_config(family, num_layers)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def tiny_prompts(count: int, *, longest: int = 20, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Prompts of unequal length."""
    source = random.Random(seed)
    return tuple(
        tuple(source.randrange(3, VOCAB_SIZE) for _ in range(source.randint(1, longest))) for _ in range(count)
    )


def unsplit_tokens(
    model: Any, prompts: Sequence[Sequence[int]], *, output_len: int, eos_token_id: int | None = None
) -> list[list[int]]:
    """Greedy tokens by transformers' own `generate`, all prompts in one padded batch, in the order given."""
    order = sort_by_length(prompts)
    inputs = MicroBatchInputs.build(
        [prompts[index] for index in order], output_len=0, pad_token_id=0, device=torch.device("cpu")
    )
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=output_len, do_sample=False, eos_token_id=eos_token_id, pad_token_id=0
    )
    model.generation_config = config
    output = model.generate(input_ids=inputs.ids, attention_mask=inputs.mask, generation_config=config)
    rows = output[:, inputs.prompt_len :].tolist()
    if eos_token_id is not None:
        rows = [row[: row.index(eos_token_id) + 1] if eos_token_id in row else row for row in rows]
    by_index = dict(zip(order, rows, strict=True))
    return [by_index[index] for index in range(len(prompts))]
