"""When a gate looks at its pairs, and with how much of its error rates: group-sequential looks under exact tests.

Each look may spend some of the chance of a false alarm that the whole gate has; the sum over looks and hypotheses is
never more than that, whatever depends on what (Bonferroni). What a look cannot use, since so few pairs cannot give so
small a p, goes to the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipetune.tuner.stats.signed_rank import least_p

PAIRS = (8, 12, 16, 24)
"""At which numbers of pairs a gate looks."""
FALSE_ALARM = 0.01
"""Chance that a gate whose sides are equal says FAIL, over all its hypotheses and looks."""
MISSED = 0.05
"""Chance that a gate says OK of a hypothesis that is really worse by the margin, over all its looks."""
_SHARES = (0.4, 0.2, 0.2, 0.2)
"""Shares of the chance of a false alarm, by look."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """One look at one hypothesis."""

    pairs: int
    alpha_fail: float
    """p up to which the look says FAIL."""
    alpha_ok: float
    """p up to which it says OK; 0 where it could not have said FAIL."""

    @property
    def can_fail(self) -> bool:
        """Whether the least p possible at this look is within its share."""
        return least_p(self.pairs) <= self.alpha_fail


def looks_for(hypotheses: int) -> tuple[Look, ...]:
    """The looks of each of so many hypotheses.

    OK is not corrected for their number: a gate is OK only if all its hypotheses are, so that one which is worse by the
    margin lets it be so no more often than itself (intersection-union; Berger 1982, Technometrics 24, 295-300).
    """
    assert hypotheses >= 1
    looks, saved = [], 0.0
    for pairs, share in zip(PAIRS, _SHARES, strict=True):
        saved += FALSE_ALARM * share / hypotheses
        can_fail = least_p(pairs) <= saved
        looks.append(Look(pairs=pairs, alpha_fail=saved, alpha_ok=MISSED / len(PAIRS) if can_fail else 0.0))
        if can_fail:
            saved = 0.0
    assert any(look.can_fail for look in looks), f"{hypotheses} hypotheses are too many for {PAIRS[-1]} pairs"
    return tuple(looks)
