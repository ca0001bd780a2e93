"""Every causal-LM family is split as `docs/models.md` says: a core and a shard of the others here, all on demand.

`PIPETUNE_FAMILY_SHARD` says which others: `2/8` is the second of eight shards, `all` is every family.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pipetune.bench.errors import UserError
from pipetune.bench.runtime.stage.stage import Stage
from tests.families.configs import FAMILIES, every_boundary, tiny_config
from tests.families.fakes import fake_survey
from tests.families.pool import Surveyor, survey_all
from tests.families.result import same_verdict
from tests.families.survey import some_splits, survey_family, survey_on_one_core
from tests.families.table import read_verdicts, write_table

SHARD_VARIABLE = "PIPETUNE_FAMILY_SHARD"
DEFAULT_SHARD = "1/10"
MODELS = Path(__file__).parents[2] / "docs" / "models.md"
CORE = (
    *("llama", "qwen3", "gpt2", "opt", "bloom", "mpt", "falcon", "gptj", "bart", "roberta"),
    *("gemma2", "gemma3", "gemma4_text", "gpt_oss", "mixtral", "llama4_text", "deepseek_v3", "glm_moe_dsa"),
    *("mamba", "jamba", "qwen3_next", "lfm2", "falcon_h1", "zamba2", "rwkv"),
)
"""Dense, tied, fused, learned positions, ALiBi, windows, shared keys and values, experts, latents, indexers, states."""


def families_of(shard: str) -> tuple[str, ...]:
    """The core and every n-th of the other families.

    Raises:
        UserError: the shard is neither `i/n` nor `all`.
    """
    if shard == "all":
        return FAMILIES
    others = [family for family in FAMILIES if family not in CORE]
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"{SHARD_VARIABLE}={shard!r}: write 2/8 for the second of eight shards, or all")
    return tuple(sorted((*CORE, *others[int(index) - 1 :: int(count)])))


@cache
def listed() -> dict[str, str]:
    return read_verdicts(MODELS.read_text(encoding="utf-8"))


def test_a_wrong_split_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Stage.forward

    def drift(self: Stage, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(self, *args, **kwargs) * (1.0 if self.is_last else 1.01)

    monkeypatch.setattr(Stage, "forward", drift)
    found = survey_family("llama")
    assert found.verdict == "wrong"
    assert "(3, 2) padded" in found.reason


@pytest.fixture(scope="module")
def surveyor() -> Iterator[Surveyor]:
    with Surveyor(survey_on_one_core) as running:
        yield running


@pytest.mark.parametrize("family", families_of(os.environ.get(SHARD_VARIABLE, DEFAULT_SHARD)))
def test_a_family_is_split_right_or_refused(family: str, surveyor: Surveyor) -> None:
    found = surveyor.survey(family)
    assert found.is_settled, f"{family} is {found.verdict}: {found.reason}"
    assert found.agrees or found.reason
    assert same_verdict(found.verdict, listed()[family]), (
        f"{family} is {found.verdict} ({found.reason or found.max_error}) and {MODELS.name} says {listed()[family]}: "
        "`make models-table` writes it anew"
    )


def test_the_table_has_every_family() -> None:
    assert sorted(listed()) == list(FAMILIES)
    assert set(CORE) <= set(FAMILIES)


def test_shards_cover_all_families() -> None:
    assert {family for index in range(1, 9) for family in families_of(f"{index}/8")} == set(FAMILIES)
    assert families_of("all") == FAMILIES
    for wrong in ("0/8", "9/8", "x", "1/"):
        with pytest.raises(UserError, match=SHARD_VARIABLE):
            families_of(wrong)


@pytest.mark.parametrize("kinds", ["a", "ab", "abc", "abcd"])
def test_every_kind_of_layer_stands_beside_every_kind(kinds: str) -> None:
    sequence = every_boundary(list(kinds))
    pairs = list(itertools.pairwise(sequence))
    assert len(pairs) == len(set(pairs)) == len(kinds) ** 2


def test_configs_are_tiny_and_mixed() -> None:
    config = tiny_config("exaone_moe")
    assert len(set(zip(config.layer_types, config.mlp_layer_types, strict=True))) == 4
    assert config.sliding_window == 6
    assert tiny_config("gemma3").get_text_config().hidden_size == 64


def test_splits_keep_off_forbidden_cuts_and_use_all_others() -> None:
    assert some_splits(5, ()) == ((3,), (1, 4), (1, 2, 4), (1, 2, 3, 4))
    splits = some_splits(8, (2, 3))
    assert splits[-1] == (1, 4, 5, 6, 7)
    assert not any({2, 3} & set(cuts) for cuts in splits)
    assert some_splits(3, (1, 2)) == ()


def test_a_crash_costs_one_verdict() -> None:
    seen: list[str] = []
    surveys = survey_all(
        ("b", "crash", "a"), fake_survey, processes=1, on_result=lambda survey: seen.append(survey.family)
    )
    assert seen == ["b", "crash", "a"]
    assert [survey.verdict for survey in surveys] == ["equal", "equal", "crashed"]
    assert surveys[-1].reason == "the process ended with 7"
    assert not surveys[-1].is_settled
    document = write_table(surveys, {"torch": "2"})
    assert read_verdicts(document) == {"a": "equal", "b": "equal", "crash": "crashed"}
    assert "With torch 2." in " ".join(document.split())
    mended = write_table([surveys[-1].model_copy(update={"verdict": "close"})], {"torch": "2"}, before=document)
    assert read_verdicts(mended) == {"a": "equal", "b": "equal", "crash": "close"}
    assert "| equal | 2 |" in mended


def test_equal_and_close_are_one_verdict_to_another_machine() -> None:
    assert same_verdict("equal", "close")
    assert not same_verdict("refused", "close")
