"""Prompts as token ids: random ones, those of a file, or what a user gives.

Rank 0 reads and tokenizes, and the others take its word.
"""

import json
import os
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from pipetune.bench.errors import ConfigError, ModelError, UserError
from pipetune.bench.files import read_text
from pipetune.bench.memory import ModelShape
from pipetune.bench.models.checkpoint import HASHED
from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.prompts.file import output_lens, read_requests
from pipetune.bench.prompts.forms import Chat, Prompt
from pipetune.bench.spec import Workload
from pipetune.bench.worker.channel import ControlGroup

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def check_text_files(folder: Path) -> None:
    """Finds out before anything is measured what lies damaged beside a model's weights; ModelError names the file."""
    for name in HASHED:
        path = folder / name
        if not os.path.lexists(path) or path.suffix == ".model":
            continue
        try:
            text = read_text(path)
            if path.suffix == ".json" and not isinstance(json.loads(text), dict):
                raise ValueError("holds no JSON object")
            if name == "generation_config.json":
                ids = GenerationConfig.from_pretrained(folder).eos_token_id
                if not all(isinstance(one, int) for one in (ids if isinstance(ids, list) else [ids or 0])):
                    raise TypeError(f"eos_token_id {ids!r} is no token id")
        # transformers fails on wrong types as it comes upon them.
        except Exception as error:
            why = getattr(error, "strerror", None) or error
            raise ModelError(f"{path}: cannot be read: {why}; a broken download? Fetch it again") from error


class Tokens:
    """Prompts of workloads, prompts given, and the ids that mean something to the model."""

    def __init__(self, resolved: ResolvedModel, shape: ModelShape, config: Any, control: ControlGroup) -> None:
        """`config` is the model's, as transformers reads it."""
        self._resolved, self._shape, self._config, self._control = resolved, shape, config, control
        self._prompts: dict[str, tuple[tuple[int, ...], ...]] = {}

    def of_workload(self, workload: Workload, *, as_text: bool = False) -> tuple[tuple[int, ...], ...]:
        """Prompts of a workload, alike on every rank; `as_text` where the answers will be wanted as text. ConfigError,
        on every rank, says what is wrong with them, or with the tokenizer that they need."""
        digest = workload.digest()
        if digest not in self._prompts or as_text:
            self._prompts[digest] = self._from_rank_0(
                lambda: load_prompts(
                    workload,
                    tokenizer=self.tokenizer if workload.prompts_file or as_text else None,
                    vocab_size=self._shape.vocab_size,
                    max_positions=self._shape.max_positions,
                )
            )
        return self._prompts[digest]

    def encode(self, prompts: Sequence[Any], max_new_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Ids of prompts given as text or ids, alike on every rank; ConfigError, on each, says what is wrong with them.
        For each `max_new_tokens` are to be generated; 0 where they are scored."""

        def read() -> tuple[tuple[int, ...], ...]:
            rows = tuple(self.read(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts))
            longest, limit = max(len(row) for row in rows), self._shape.max_positions
            if limit is not None and longest + max_new_tokens > limit:
                more = f" and max_new_tokens={max_new_tokens}" if max_new_tokens else ""
                why = f"more than the model's {limit} positions; shorten it"
                raise ConfigError(f"the longest prompt has {longest} tokens{more}: {why}")
            return rows

        return self._from_rank_0(read)

    def read(self, prompt: Any, place: str = "prompt") -> tuple[int, ...]:
        """Ids of one prompt, on this rank alone; ConfigError says what is wrong with it."""
        return encode(prompt, self.tokenizer, self._shape.vocab_size, place)

    def _from_rank_0(self, read: Callable[[], tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
        """Rows of ids as rank 0 reads them, on every rank; what is wrong with them is raised on every rank as well."""
        reply: dict[str, Any] = {}
        if self._control.rank == 0:
            try:
                reply["prompts"] = read()
            except UserError as error:
                reply["error"] = str(error)
        reply = self._control.broadcast(reply)
        if "error" in reply:
            raise ConfigError(reply["error"])
        return tuple(tuple(row) for row in reply["prompts"])

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None where its folder has none."""
        folder, trusted = self._resolved.folder, self._resolved.spec.trust_remote_code
        if not any((folder / name).exists() for name in TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        except Exception as error:
            files = ", ".join(name for name in TOKENIZER_FILES if (folder / name).exists())
            raise ConfigError(f"{folder}: its tokenizer ({files}) does not load: {error!r}") from error

    @property
    def pad_token_id(self) -> int:
        """Padded places are masked, so that any id of the vocabulary will do."""
        pad = getattr(self._config.get_text_config(decoder=True), "pad_token_id", None)
        return int(pad) if isinstance(pad, int) and 0 <= pad < self._shape.vocab_size else 0

    def eos_token_ids(self) -> frozenset[int]:
        """End-of-sequence tokens: of the generation config where the folder has one, else of the model's."""
        ids = getattr(self._config.get_text_config(decoder=True), "eos_token_id", None)
        if (self._resolved.folder / "generation_config.json").exists():
            given = GenerationConfig.from_pretrained(self._resolved.folder).eos_token_id
            ids = ids if given is None else given
        return frozenset([ids] if isinstance(ids, int) else ids or [])


def load_prompts(
    workload: Workload, *, tokenizer: Any | None, vocab_size: int, max_positions: int | None
) -> tuple[tuple[int, ...], ...]:
    """Token ids of every prompt. ConfigError where the file is missing or malformed, holds too few prompts, or a prompt
    does not fit the model."""
    if workload.prompts_file is None:
        prompts = random_prompts(workload, vocab_size)
    else:
        path = workload.prompts_file
        entries = read_requests(path)
        if len(entries) < workload.num_prompts:
            few = f"workload.num_prompts={workload.num_prompts}, but {path} holds {len(entries)} prompts"
            raise ConfigError(f"{few}; lower --num-prompts or add prompts")
        if output_lens(workload, entries) not in (None, workload.output_lens):
            raise ConfigError(f"{path}: its lines have output lengths of their own; give them as workload.output_lens")
        used = entries[: workload.num_prompts]
        prompts = tuple(encode(request.prompt, tokenizer, vocab_size, place) for place, request in used)
    longest = max(len(prompt) for prompt in prompts)
    if workload.kind == "score" and longest < 2:
        raise ConfigError(
            "workload: every text has a single token, and a first token has no probability; give longer texts"
        )
    if max_positions is not None and longest + workload.generated_len > max_positions:
        output_len = workload.generated_len
        generated = f", and with {output_len=} that is" if output_len else ", which is"
        why = f"more than the model's {max_positions} positions; shorten it"
        raise ConfigError(f"workload: the longest prompt has {longest} tokens{generated} {why}")
    return prompts


def random_prompts(workload: Workload, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Random ids with lengths uniform in `input_len · (1 ± random_range_ratio)`; the same for the same seed."""
    source = random.Random(workload.seed)
    spread = round(workload.input_len * workload.random_range_ratio)
    lengths = workload.input_lens or [
        max(1, source.randint(workload.input_len - spread, workload.input_len + spread))
        for _ in range(workload.num_prompts)
    ]
    return tuple(tuple(source.randrange(vocab_size) for _ in range(length)) for length in lengths)


def encode(entry: Prompt | Sequence[int], tokenizer: Any, vocab_size: int, place: str) -> tuple[int, ...]:
    """Ids of one prompt. ConfigError for text without a tokenizer, messages without a template that takes them, an
    empty prompt, or an id outside the vocabulary."""
    ids: tuple[int, ...]
    if isinstance(entry, str):
        if tokenizer is None:
            raise ConfigError(
                f'{place}: the model folder has no tokenizer, so text cannot be used; give {{"prompt_token_ids": […]}}'
            )
        ids = tuple(tokenizer.encode(entry))
    elif isinstance(entry, Chat):
        ids = _templated(entry, tokenizer, place)
    else:
        ids = tuple(entry)
    if not ids:
        raise ConfigError(f"{place}: the prompt has no token")
    if (outside := next((token for token in ids if not 0 <= token < vocab_size), None)) is not None:
        raise ConfigError(f"{place}: token id {outside} is outside the vocabulary of {vocab_size}")
    return ids


def _templated(chat: Chat, tokenizer: Any, place: str) -> tuple[int, ...]:
    """Ids of messages: as vLLM does, the answer's head follows whatever the last one is."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f'{place}: messages need a chat template, and the model folder has none; give {{"prompt": "text"}}, or a '
            "model for chats"
        )
    options = {"add_generation_prompt": not chat.options.get("continue_final_message"), **chat.options}
    try:
        return tuple(tokenizer.apply_chat_template(chat.messages, tokenize=True, return_dict=False, **options))
    except Exception as error:
        # Templates are programs of the model's folder, and fail as they like.
        where = f"the chat template of {tokenizer.name_or_path}"
        raise ConfigError(f"{place}: {where} does not take these messages: {error}") from None
