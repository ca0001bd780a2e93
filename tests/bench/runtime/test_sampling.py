"""Draws follow the distribution asked for, and their margins say truly how far the logits may be off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.runtime import sampling as module
from pipetune.bench.runtime.sampling import draw, draw_margins, uniforms
from pipetune.bench.spec import Sampling

VOCABULARY = 23
CUTS = [Sampling(), Sampling(temperature=0.6), Sampling(top_k=5), Sampling(top_p=0.8), Sampling(top_k=7, top_p=0.7)]

samplings = st.builds(
    Sampling,
    temperature=st.floats(0.2, 3.0),
    top_k=st.sampled_from([0, 1, 2, 5, VOCABULARY - 1, VOCABULARY, 1000]),
    top_p=st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
)
seeds = st.integers(0, 2**32 - 1)


def some_logits(seed: int, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, VOCABULARY, generator=source) * 3
    return logits, torch.rand(rows, generator=source, dtype=torch.float64), source


def left(logits: torch.Tensor, wanted: Sampling) -> torch.Tensor:
    """Probabilities by the plainest means: the definition of each cut, one row at a time."""
    rows = []
    for row in logits.double() / wanted.temperature:
        order = sorted(range(len(row)), key=lambda token: (-row[token].item(), token))
        order = order[: wanted.top_k or len(row)]
        weights = torch.zeros_like(row)
        shares = row[order].softmax(-1)
        before = 0.0
        for token, share in zip(order, shares.tolist(), strict=True):
            if before < wanted.top_p:
                weights[token] = share
            before += share
        rows.append(weights / weights.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("wanted", CUTS, ids=str)
def test_tokens_come_as_often_as_they_are_likely(wanted: Sampling) -> None:
    logits, _, _ = some_logits(1, rows=3)
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for row, expected in zip(logits, left(logits, wanted), strict=True):
        tokens = draw(row.expand(count, -1), grid, wanted)
        seen = torch.bincount(tokens, minlength=VOCABULARY) / count
        assert torch.allclose(seen.double(), expected, atol=2 / count)


@given(seed=seeds, wanted=samplings)
def test_no_error_below_the_margin_changes_a_draw(seed: int, wanted: Sampling) -> None:
    logits, u, source = some_logits(seed)
    tokens, margins = draw(logits, u, wanted), draw_margins(logits, u, wanted)
    assert (margins >= 0).all()
    # The largest errors that the margin allows, but for what float32 itself rounds away. Huge ones are not exact.
    size = (margins.clamp(max=1.0) * 0.999 - 1e-5).clamp(min=0.0).unsqueeze(-1)
    for _ in range(4):
        signs = torch.randint(0, 2, logits.shape, generator=source) * 2.0 - 1.0
        assert torch.equal(draw((logits.double() + size * signs).float(), u, wanted), tokens)
    # The worst there are: all tokens before a bound, or before a cut, one way and all others the other way.
    ranks = logits.argsort(-1, descending=True).argsort(-1)
    for end in range(VOCABULARY):
        for places in (torch.arange(VOCABULARY).expand_as(ranks), ranks):
            signs = torch.where(places < end, 1.0, -1.0)
            for worst in (signs, -signs):
                assert torch.equal(draw((logits.double() + size * worst).float(), u, wanted), tokens)


@given(seed=seeds, temperature=st.floats(0.7, 3.0))
def test_the_margin_is_the_best_bound_where_nothing_is_cut(seed: int, temperature: float) -> None:
    logits, u, _ = some_logits(seed)
    wanted = Sampling(temperature=temperature)
    tokens, margins = draw(logits, u, wanted), draw_margins(logits, u, wanted)
    size = (margins * 1.001 + 1e-5).unsqueeze(-1)
    places = torch.arange(VOCABULARY).expand_as(logits)
    changed = torch.zeros_like(tokens, dtype=torch.bool)
    for end in (tokens, tokens + 1):
        signs = torch.where(places < end.unsqueeze(-1), 1.0, -1.0)
        for worst in (signs, -signs):
            changed |= draw((logits.double() + size * worst).float(), u, wanted) != tokens
    assert changed[margins < 1.0].all()


def test_a_tie_at_a_cut_has_no_margin() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    u = torch.tensor([0.1], dtype=torch.float64)
    assert draw_margins(logits, u, Sampling(top_k=2)).item() == 0
    assert draw_margins(logits, u, Sampling(top_k=3)).item() > 0


def test_one_likeliest_token_is_the_greedy_one() -> None:
    logits, u, _ = some_logits(3)
    for wanted in (Sampling(top_k=1), Sampling(top_p=1e-9)):
        assert torch.equal(draw(logits, u, wanted), logits.argmax(-1))


def test_nothing_is_drawn_that_was_cut() -> None:
    logits, _, _ = some_logits(4)
    last = torch.full((len(logits),), 1.0 - 2.0**-53, dtype=torch.float64)
    first = torch.zeros_like(last)
    for wanted in CUTS:
        for u in (first, last):
            assert (left(logits, wanted).gather(-1, draw(logits, u, wanted).unsqueeze(-1)) > 0).all()
            assert not draw_margins(logits, u, wanted).isnan().any()


def test_a_draw_does_not_depend_on_the_rows_beside_it() -> None:
    logits, u, _ = some_logits(5)
    for wanted in CUTS:
        alone = torch.cat([draw(logits[row : row + 1], u[row : row + 1], wanted) for row in range(len(u))])
        assert torch.equal(alone, draw(logits, u, wanted))


@pytest.mark.parametrize("few", [(4,), (2, 9), ()])
def test_looking_among_the_likeliest_alone_changes_nothing(few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, u, _ = some_logits(6, rows=64)
    wanted = Sampling(top_p=0.8)
    tokens, margins = draw(logits, u, wanted), draw_margins(logits, u, wanted)
    monkeypatch.setattr(module, "LIKELIEST", few)
    assert torch.equal(draw(logits, u, wanted), tokens)
    assert torch.allclose(draw_margins(logits, u, wanted), margins)


def test_numbers_depend_on_seed_prompt_and_place_alone() -> None:
    wanted = Sampling(seed=7)
    whole = uniforms(wanted, range(6), 20)
    assert torch.equal(uniforms(wanted, [4, 1], 5), whole[[4, 1], :5])
    assert not torch.equal(uniforms(Sampling(seed=8), range(6), 20), whole)
    assert len(set(whole.flatten().tolist())) == whole.numel()
    assert ((whole >= 0) & (whole < 1)).all()
