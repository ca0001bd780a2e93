"""The table of families in `docs/models.md`: written from surveys, and read again to be held to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from tests.families.result import VERDICTS, Survey
from tests.prose import wrapped

COMMAND = "make models-table"
_ROW = re.compile(r"^\| `([^`]+)` \| .*$", re.MULTILINE)
_REFUSAL = re.compile(r"^model_type '[^']*' cannot be split over devices: (.*?)(; choose another model)?$")


def write_table(surveys: Sequence[Survey], versions: Mapping[str, str], *, before: str = "") -> str:
    """The whole document.

    Args:
        surveys: one a family.
        versions: what it was found with, by package.
        before: an earlier document; its rows stay for families that `surveys` leaves out.
    """
    rows = _rows(before) | {survey.family: _row(survey) for survey in surveys}
    verdicts = read_verdicts("\n".join(rows.values()))
    counts = Counter(verdicts.values())
    tested_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Models",
        "",
        f"Every causal-LM family that transformers knows ({len(rows)}), split and compared with itself unsplit. "
        f"With {tested_with}.",
        "",
        "| verdict | families | what it says |",
        "|---|---:|---|",
        *(f"| {verdict} | {counts[verdict]} | {says} |" for verdict, says in VERDICTS.items() if counts[verdict]),
        "",
        "How a family is tried: a tiny random model with its own kinds of layer in every order, fp32 on a CPU, is cut "
        "into two, three and four uneven stages and at every allowed place at once, with dummy weights, and once more "
        "loaded from a saved checkpoint. Prompts of 13, 9 and 2 tokens padded on the left, and of 11 and 11 without "
        "padding, are prefilled, then five forced tokens are decoded from the cache; windows are 6 tokens. The logits "
        "of every step are compared with those of transformers with its own cache. Plans with a forbidden cut must be "
        "refused. The error is the largest difference of two logits over the largest logit.",
        "",
        f"`{COMMAND}` writes this file; `make test-families` holds the code to it.",
        "",
        "| family | class | verdict | max error | notes |",
        "|---|---|---|---:|---|",
        *(rows[family] for family in sorted(rows)),
    ]
    return wrapped("\n".join(lines)) + "\n"


def read_verdicts(document: str) -> dict[str, str]:
    """Family → verdict, from the document's table."""
    return {family: row.split(" | ")[2] for family, row in _rows(document).items()}


def _rows(document: str) -> dict[str, str]:
    return {match[1]: match[0] for match in _ROW.finditer(document)}


def _row(survey: Survey) -> str:
    error = "" if survey.max_error is None else "0" if survey.max_error == 0.0 else f"{survey.max_error:.0e}"
    refusal = _REFUSAL.match(survey.reason)
    reason = refusal[1] if refusal else survey.reason
    notes = "; ".join(part for part in (reason, *survey.notes) if part).replace("|", "\\|")
    return f"| `{survey.family}` | {survey.architecture} | {survey.verdict} | {error} | {notes} |"
