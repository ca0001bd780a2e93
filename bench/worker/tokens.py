"""Text and token ids inside the workers: rank 0 reads and tokenizes, and the others take its word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from pipetune.bench.errors import ConfigError, UserError
from pipetune.bench.memory import ModelShape
from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.spec import Workload
from pipetune.bench.worker.channel import ControlGroup
from pipetune.bench.worker.prompts import encode, load_prompts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


class Tokens:
    """Prompts of workloads, prompts given, and the ids that mean something to the model."""

    def __init__(self, resolved: ResolvedModel, shape: ModelShape, config: Any, control: ControlGroup) -> None:
        """
        Args:
            config: the model's, as transformers reads it.
        """
        self._resolved, self._shape, self._config, self._control = resolved, shape, config, control
        self._prompts: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._tokenizer: Any = None
        self._tokenizer_sought = False

    def of_workload(self, workload: Workload) -> tuple[tuple[int, ...], ...]:
        """Prompts of a workload, alike on every rank.

        Raises:
            ConfigError: on every rank, what is wrong with them.
        """
        digest = workload.digest()
        if digest not in self._prompts:
            self._prompts[digest] = self._from_rank_0(
                lambda: load_prompts(
                    workload,
                    tokenizer=self.tokenizer() if workload.prompts_file else None,
                    vocab_size=self._shape.vocab_size,
                    max_positions=self._shape.max_positions,
                )
            )
        return self._prompts[digest]

    def encode(self, prompts: Sequence[Any], max_new_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Ids of prompts given as text or ids, alike on every rank.

        Args:
            max_new_tokens: to be generated for each; 0 where they are scored.

        Raises:
            ConfigError: on every rank, what is wrong with them.
        """

        def read() -> tuple[tuple[int, ...], ...]:
            rows = tuple(
                encode(prompt, self.tokenizer(), self._shape.vocab_size, f"prompts[{index}]")
                for index, prompt in enumerate(prompts)
            )
            longest, limit = max(len(row) for row in rows), self._shape.max_positions
            if limit is not None and longest + max_new_tokens > limit:
                more = f" and max_new_tokens={max_new_tokens}" if max_new_tokens else ""
                raise ConfigError(
                    f"the longest prompt has {longest} tokens{more}: more than the model's {limit} positions; "
                    "shorten it"
                )
            return rows

        return self._from_rank_0(read)

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

    def tokenizer(self) -> Any:
        """The model's tokenizer, or None where its folder has none."""
        if not self._tokenizer_sought:
            self._tokenizer_sought = True
            if any((self._resolved.folder / name).exists() for name in TOKENIZER_FILES):
                self._tokenizer = AutoTokenizer.from_pretrained(
                    self._resolved.folder, trust_remote_code=self._resolved.spec.trust_remote_code
                )
        return self._tokenizer

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
