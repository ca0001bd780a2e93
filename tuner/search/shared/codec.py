"""A record as text that other processes of a study can read, and back, with the reader's names for the devices.

The processes work on devices of their own, alike place by place. A plan means the same on each of them, so a record
from elsewhere says the reader's names throughout: one plan is then one plan in the search, the ranking and the finals.
Which devices it really ran on stays beside it.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pipetune.bench.errors import StudyError
from pipetune.bench.record import Record

_DEVICE = re.compile(r"\b(?:cpu|cuda):\d+\b")
_VERBATIM = frozenset({"detail", "source_devices"})
"""Ends of logs and tracebacks stay as they were."""


def pack(record: Record) -> str:
    """Text for a database: JSON, compressed, in base64."""
    return base64.b64encode(zlib.compress(record.model_dump_json().encode(), level=6)).decode("ascii")


def unpack(text: str, *, theirs: Sequence[str], ours: Sequence[str]) -> Record:
    """The record, with devices renamed place by place.

    Args:
        theirs: devices of the process that measured it.
        ours: devices that stand in the same places here.

    Raises:
        StudyError: it is no record of this version.
    """
    assert len(theirs) == len(ours), f"{theirs} and {ours} are no pairs"
    try:
        values = json.loads(zlib.decompress(base64.b64decode(text, validate=True)))
        return Record.model_validate(_renamed(values, dict(zip(theirs, ours, strict=True))))
    except (ValueError, zlib.error) as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) if isinstance(error, ValidationError) else ""
        raise StudyError(
            f"another process of the study wrote a record that cannot be read here{f' ({where})' if where else ''}; "
            "all of them need the same version of pipetune"
        ) from None


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _DEVICE.sub(lambda match: names.get(match[0], match[0]), value)
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    if isinstance(value, dict):
        return {key: part if key in _VERBATIM else _renamed(part, names) for key, part in value.items()}
    return value
