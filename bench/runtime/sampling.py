"""Tokens drawn at random, alike for every split: each draw depends on the seed, the prompt and the place alone.

One number u in [0, 1) belongs to every prompt and place before the pass begins. The token is the one at which the
cumulated probability, in the order of the vocabulary, passes u (inverse transform sampling) among those that `top_k`
and `top_p` leave. Kernels that round differently move the bounds of a token by little, so that a draw differs only if
u lies next to one.

Shapes: B rows, V vocabulary, n tokens that may be drawn.
"""

import hashlib
from collections.abc import Sequence

import torch

from pipetune.bench.spec import Sampling

# How many of the likeliest tokens `top_p` is looked for among, before the whole vocabulary is sorted, which on a CPU
# takes longer than a decode step of a small model.
LIKELIEST = (1024, 8192)


def uniforms(sampling: Sampling, numbers: Sequence[int], output_len: int) -> torch.Tensor:
    """`[len(numbers), output_len]` numbers in [0, 1), float64 on the host, one row for each prompt's number. A longer
    output begins with the numbers of a shorter one."""
    rows = []
    for number in numbers:
        digest = hashlib.sha256(f"{sampling.seed}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        rows.append(torch.rand(output_len, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def draw(logits: torch.Tensor, u: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Tokens `[B]` for logits `[B, V]` and `u` `[B]`, float64."""
    weights, tokens = _weights(logits, sampling)
    place, _ = _place(weights, u)
    return place if tokens is None else tokens.gather(-1, place.unsqueeze(-1)).squeeze(-1)


def draw_margins(logits: torch.Tensor, u: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """`[B]`, float64: the draw stays the same as long as no logit is off by this much.

    Logits that are off by up to e change the log-odds of any set of tokens by at most 2 e / T, and by as much where
    those inside are off by +e and those outside by -e. So the distance of u from the nearest bound of its token, as
    log-odds and times T / 2, is a bound on e: the best there is. The tokens left by `top_k` and `top_p` stay the same
    if those next to the cut cannot change sides, which takes half their distance, and if the sums that `top_p` lies
    between cannot pass it, for which the same holds as for u.
    """
    weights, _ = _weights(logits, sampling)
    place, cumulated = _place(weights, u)
    above = cumulated.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    before = (place - 1).clamp(min=0).unsqueeze(-1)
    below = torch.where(place > 0, cumulated.gather(-1, before).squeeze(-1), 0.0)
    total = cumulated[:, -1]
    margin = _log_odds_distance(below / total, u, above / total)
    vocabulary = logits.shape[-1]
    most = sampling.top_k if 0 < sampling.top_k < vocabulary else vocabulary
    if most < vocabulary or sampling.top_p < 1.0:
        ordered, _, shares = _likeliest(logits, sampling)
        count = torch.full_like(place, most)
        if sampling.top_p < 1.0:
            count = _stays(shares, sampling).sum(-1)
            last = (count - 1).unsqueeze(-1)
            sums = shares.cumsum(-1).gather(-1, last).squeeze(-1)
            without = sums - shares.gather(-1, last).squeeze(-1)
            threshold = torch.full_like(sums, sampling.top_p)
            margin = torch.minimum(margin, _log_odds_distance(without, threshold, sums))
        edge = count.clamp(max=ordered.shape[-1] - 1).unsqueeze(-1)
        gap = (ordered.gather(-1, edge - 1) - ordered.gather(-1, edge)).squeeze(-1)
        margin = torch.where(count < vocabulary, torch.minimum(margin, gap), margin)
    return margin * (sampling.temperature / 2.0)


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[n]`, fp32, of one token at each of n positions with logits `[n, V]`."""
    logits = logits.float()
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def _weights(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights `[B, n]` of the tokens that may be drawn, in the vocabulary's order, and these tokens; None for all."""
    if not 0 < sampling.top_k < logits.shape[-1] and sampling.top_p == 1.0:
        return (logits.float() / sampling.temperature).softmax(-1), None
    _, tokens, shares = _likeliest(logits, sampling)
    tokens = tokens[:, : shares.shape[-1]]
    if sampling.top_p < 1.0:
        shares = shares.where(_stays(shares, sampling), 0.0)
    tokens, place = tokens.sort(-1)
    return shares.gather(-1, place), tokens


def _likeliest(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The likeliest tokens, in falling order, at least one more than may be drawn where there are more: their logits
    over the temperature, their ids, and the probability `[B, n]`, float64, of those that `top_k` leaves."""
    scaled = logits.float() / sampling.temperature
    vocabulary = scaled.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        ordered, tokens = scaled.topk(sampling.top_k + 1, dim=-1)
        return ordered.double(), tokens, ordered[:, :-1].double().softmax(-1)
    top = scaled.amax(-1, keepdim=True)
    # Summed in float64 from terms of float32: exact enough even where nearly all lies on one token, and cheap.
    total = (scaled - top).exp().sum(-1, keepdim=True, dtype=torch.float64)
    # A GPU sorts quickly, and must not wait for the host to look.
    counts = [] if scaled.is_cuda else [count for count in LIKELIEST if count < vocabulary]
    while True:
        count = counts.pop(0) if counts else vocabulary
        ordered, tokens = scaled.topk(count, dim=-1)
        shares = (ordered.double() - top.double()).exp() / total
        if count == vocabulary or not bool(_stays(shares, sampling)[:, -1].any()):
            return ordered.double(), tokens, shares


def _stays(shares: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Which of the likeliest tokens, in falling order, `top_p` leaves: those before which less than `top_p` lies. So
    the likeliest always stays (nucleus sampling, Holtzman et al. 2020)."""
    return shares.cumsum(-1) - shares < sampling.top_p


def _place(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which weight u falls upon `[B]`, and the cumulated weights `[B, n]`, float64."""
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1]
    # Never the sum itself, which a product may be rounded to: behind it lie only tokens that cannot be drawn.
    sought = torch.minimum(u * total, total.nextafter(torch.zeros_like(total)))
    place = torch.searchsorted(cumulated, sought.unsqueeze(-1), right=True).squeeze(-1)
    # Where the logits are no numbers, no place is found.
    return place.clamp(max=weights.shape[-1] - 1), cumulated


def _log_odds_distance(below: torch.Tensor, value: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """How far a probability lies, in log-odds, from the nearer of two that enclose it; 0 and 1 are at infinity."""
    odds = value.logit()
    up = torch.where(above < 1.0, above.logit() - odds, torch.inf)
    down = torch.where(below > 0.0, odds - below.logit(), torch.inf)
    # One that rounding puts on the wrong side is as near as can be.
    return torch.minimum(up, down).clamp(min=0.0)
