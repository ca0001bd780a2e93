"""Prompts as token ids: random ones of given lengths, or real text from a JSONL file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pipetune.bench.errors import ConfigError
from pipetune.bench.spec import Workload


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Text to ids, special tokens of the model included."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Ids to text."""


def load_prompts(
    workload: Workload, *, tokenizer: Tokenizer | None, vocab_size: int, max_positions: int | None
) -> tuple[tuple[int, ...], ...]:
    """Token ids of every prompt.

    Raises:
        ConfigError: the file is missing or malformed, holds too few prompts, or a prompt does not fit the model.
    """
    if workload.prompts_file is None:
        prompts = random_prompts(workload, vocab_size)
    else:
        path = Path(workload.prompts_file)
        entries = read_prompts_file(path)
        if len(entries) < workload.num_prompts:
            raise ConfigError(
                f"workload.num_prompts={workload.num_prompts}, but {path} holds {len(entries)} prompts; "
                "lower --num-prompts or add prompts"
            )
        prompts = tuple(
            encode(entry, tokenizer, vocab_size, f"{path}:{line}") for line, entry in entries[: workload.num_prompts]
        )
    longest = max(len(prompt) for prompt in prompts)
    if workload.kind == "score" and longest < 2:
        raise ConfigError(
            "workload: every text has a single token, and a first token has no probability; give longer texts"
        )
    if max_positions is not None and longest + workload.generated_len > max_positions:
        generated = (
            f", and with output_len={workload.generated_len} that is" if workload.generated_len else ", which is"
        )
        raise ConfigError(
            f"workload: the longest prompt has {longest} tokens{generated} "
            f"more than the model's {max_positions} positions; shorten it"
        )
    return prompts


def random_prompts(workload: Workload, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Random ids with lengths uniform in `input_len · (1 ± random_range_ratio)`; the same for the same seed."""
    source = random.Random(workload.seed)
    spread = round(workload.input_len * workload.random_range_ratio)
    lengths = [
        max(1, source.randint(workload.input_len - spread, workload.input_len + spread))
        for _ in range(workload.num_prompts)
    ]
    return tuple(tuple(source.randrange(vocab_size) for _ in range(length)) for length in lengths)


def read_prompts_file(path: Path) -> list[tuple[int, str | list[int]]]:
    """Line numbers and prompts of a JSONL file: `{"prompt": …}` or `{"prompt_token_ids": […]}` a line.

    Raises:
        ConfigError: the file cannot be read, a line is neither form, or there is no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: cannot be read: {error}") from error
    entries: list[tuple[int, str | list[int]]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
        entries.append((number, _entry(value, f"{path}:{number}")))
    if not entries:
        raise ConfigError(f"{path}: holds no prompt; write one JSON object a line")
    return entries


def _entry(value: Any, place: str) -> str | list[int]:
    if isinstance(value, dict) and isinstance(value.get("prompt"), str) and value["prompt"]:
        return str(value["prompt"])
    ids = value.get("prompt_token_ids") if isinstance(value, dict) else None
    if isinstance(ids, list) and ids and all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        return list(ids)
    raise ConfigError(f'{place}: neither {{"prompt": "text"}} nor {{"prompt_token_ids": [1, 2]}} with something in it')


def encode(entry: str | Sequence[int], tokenizer: Tokenizer | None, vocab_size: int, place: str) -> tuple[int, ...]:
    """Ids of one prompt.

    Raises:
        ConfigError: text without a tokenizer, an empty prompt, or an id outside the vocabulary.
    """
    if isinstance(entry, str):
        if tokenizer is None:
            raise ConfigError(
                f'{place}: the model folder has no tokenizer, so text cannot be used; give {{"prompt_token_ids": […]}}'
            )
        ids = tuple(tokenizer.encode(entry))
    else:
        ids = tuple(entry)
    if not ids:
        raise ConfigError(f"{place}: the prompt has no token")
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ConfigError(f"{place}: token id {outside} is outside the vocabulary of {vocab_size}")
    return ids
