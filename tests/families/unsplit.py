"""The other side of the comparison: prompts, forced tokens, and what transformers alone makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from pipetune.bench.runtime.job import MicroBatchInputs
from tests.families.configs import VOCAB_SIZE

NEW_TOKENS = 5
PADDED_LENGTHS = (13, 9, 2)
EVEN_LENGTHS = (11, 11)
NOTICEABLE = 1e-3
CPU = torch.device("cpu")


class Case:
    """Prompts of some lengths, forced tokens, and the unsplit model's logits for them, `[B, t, V]`."""

    def __init__(self, model: Any, lengths: Sequence[int]) -> None:
        """Runs the unsplit model; prompts of unlike lengths are padded on the left."""
        source = torch.Generator().manual_seed(len(lengths))
        prompts = [torch.randint(5, VOCAB_SIZE, (length,), generator=source).tolist() for length in lengths]
        self.inputs = MicroBatchInputs.build(prompts, output_len=NEW_TOKENS, pad_token_id=0, device=CPU)
        forced = torch.randint(5, VOCAB_SIZE, (len(lengths), NEW_TOKENS), generator=source)
        self.inputs.ids[:, self.inputs.prompt_len :] = forced
        self.expected, self.how = unsplit_logits(model, self.inputs)

    @classmethod
    def both(cls, model: Any) -> dict[str, Case]:
        """One padded, one unpadded.

        Raises:
            AssertionError: there are logits that are not finite.
        """
        cases = {"padded": cls(model, PADDED_LENGTHS), "unpadded": cls(model, EVEN_LENGTHS)}
        for case in cases.values():
            assert torch.isfinite(case.expected).all(), "logits are not finite"
        return cases

    def check_sensitive(self, model: Any) -> None:
        """Whether a wrong split would show in these logits at all: one that lost the prompt, for example.

        Raises:
            AssertionError: another token early in the first prompt hardly moves its last logits.
        """
        ids = self.inputs.ids.clone()
        ids[0, 1] = 5 + (ids[0, 1] - 4) % (VOCAB_SIZE - 5)
        changed, _ = unsplit_logits(
            model,
            MicroBatchInputs(
                ids=ids, mask=self.inputs.mask, positions=self.inputs.positions, prompt_len=self.inputs.prompt_len
            ),
        )
        moved = difference(changed[0, -1], self.expected[0, -1])
        assert moved > NOTICEABLE, f"another prompt moves the last logits by {moved:.1e} alone"


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Relative to the largest value on the right; infinite where there is a NaN."""
    if torch.equal(left, right):
        return 0.0
    error = float((left - right).abs().max() / right.abs().max())
    return error if error == error else float("inf")


def steps(inputs: MicroBatchInputs) -> Iterator[tuple[int, int]]:
    """Positions that each forward pass works on: the prompt, then token by token."""
    past = 0
    for end in range(inputs.prompt_len, inputs.ids.shape[1] + 1):
        yield past, end
        past = end


@torch.inference_mode()
def unsplit_logits(model: Any, inputs: MicroBatchInputs) -> tuple[torch.Tensor, str]:
    """By transformers alone: with its `DynamicCache`, else with a cache of the model's own, else with none.

    Returns:
        `[B, t, V]` and, unless it was a `DynamicCache`, what it ran with.

    Raises:
        Exception: whatever the model raises in the first of these ways.
    """
    accepts = inspect.signature(type(model).forward).parameters
    ways: list[tuple[str, Callable[[], torch.Tensor]]] = []
    if "past_key_values" in accepts:
        ways.append(("", lambda: _cached_logits(model, inputs, "past_key_values", DynamicCache(config=model.config))))
    for name in ("past_key_values", "cache_params", "state"):
        if name in accepts:
            ways.append(("a cache of its own", partial(_cached_logits, model, inputs, name, None)))
    ways.append(("no cache", lambda: _uncached_logits(model, inputs, ("attention_mask", "position_ids"))))
    ways.append(("neither cache nor positions", lambda: _uncached_logits(model, inputs, ("attention_mask",))))
    first_error: Exception | None = None
    for how, run in ways:
        try:
            return run(), how
        except Exception as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _cached_logits(model: Any, inputs: MicroBatchInputs, name: str, cache: Any) -> torch.Tensor:
    accepts = inspect.signature(type(model).forward).parameters
    logits = []
    for past, end in steps(inputs):
        kwargs: dict[str, Any] = {"input_ids": inputs.ids[:, past:end], "use_cache": True, name: cache}
        # Recurrent families take the mask of the new tokens; they have no others.
        kwargs["attention_mask"] = inputs.mask[:, :end] if name == "past_key_values" else inputs.mask[:, past:end]
        kwargs |= {"position_ids": inputs.positions[:, past:end], "logits_to_keep": 1}
        output = model(**{key: value for key, value in kwargs.items() if key in accepts})
        # A few fill the cache they are given, and do not hand it back.
        cache = output.get(name, cache)
        assert cache is not None, f"{type(model).__name__} gives no {name} back"
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


def _uncached_logits(model: Any, inputs: MicroBatchInputs, names: Sequence[str]) -> torch.Tensor:
    accepts = inspect.signature(type(model).forward).parameters
    logits = []
    for _, end in steps(inputs):
        given = {"attention_mask": inputs.mask[:, :end], "position_ids": inputs.positions[:, :end]}
        kwargs: dict[str, Any] = {name: given[name] for name in names if name in accepts}
        if "use_cache" in accepts:
            kwargs["use_cache"] = False
        logits.append(model(input_ids=inputs.ids[:, :end], **kwargs).logits[:, -1])
    return torch.stack(logits, 1)
