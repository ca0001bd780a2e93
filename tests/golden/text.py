"""What is left of a command's output when all is taken out that differs from machine to machine and run to run."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import struct
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import yaml

RULES = re.compile("[─━│┃╭╮╰╯┌┐└┘├┤═]+")
_MASKS = (
    (re.compile(r"\d{4}-\d\d-\d\d[T -]?[\d:]*(\.\d+)?(\+00:00|Z)?"), "TIME"),
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,}\b"), "HASH"),
    (re.compile(r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?"), "#"),
    (re.compile(r"# ?(?:ns|µs|ms|s|min|h)\b"), "# TIME"),
    (re.compile(r"# ?(?:B|bytes|KiB|MiB|GiB|TiB|[kMG]B)(?!\w)"), "# BYTES"),
    (re.compile(r"# ±#"), "#"),
    (re.compile(r"[<~]#"), "#"),
    (re.compile(r"\bLinux\S+"), "Linux"),
    (re.compile(r"[▁▂▃▄▅▆▇█]+"), "▁"),
)
_VOLATILE = re.compile(
    r"""(?:[·;]\ |note:\ |pipetune:\ )?(?:
        this\ machine\ is\ busy:\ (?=other|the\ hypervisor)
      | \.\ What\ is\ measured\ now\ is\ doubtful:\ end\ them(?:,\ or\ wait\ by\ --wait-for-quiet\ MINUTES)?
      | the\ study's\ profile\ is\ doubtful:
      | load\ ok\ others\ take\ little | load\ warning\ (?=other|the\ hypervisor)
      | ,\ with\ warnings:\ load(?=\ )
      | \#\ of\ at\ most\ \#\ (?:runs|pairs)(?:\ ·\ about\ \#\ TIME\ left)?
      | profile\ \#\ %(?:\ ·\ about\ \#\ TIME\ left)?
      | the\ hypervisor\ took\ \#\ CPU\ cores\ away
      | doubtful,\ and\ not\ kept:\ (?=other)
      | other\ processes\ took\ \#\ CPU\ cores:\ \S+\ \(pid\ \#\)(?:,\ \S+\ \(pid\ \#\))*
      | cores:\ \#\ workers?\ may\ use\ \#\ of\ the\ machine's\ \#(?:\ \([\w' ]+\))?
        (?:\ and\ wait\ for\ each\ other;\ take\ fewer\ devices)?
      | never\ steady:\ passes\ of\ the\ same\ work\ (?:differ|vary)\ by\ more\ than\ \#\ ?%
      | \#\ of\ \#\ kinds\ of\ tasks\ vary\ by\ more\ than\ \#\ ?%\ between\ their\ quartiles:\ was\ [^?]*\?
      | \#\ of\ the\ runs\ used\ were\ disturbed;\ see\ the\ notes\ in\ report\.html
      | The\ un-pipelined\ model\ is\ faster\ here:\ this\ plan\ does\ not\ pay\ for\ this\ workload\.
    )""",
    re.VERBOSE,
)
"""What a run of some milliseconds says on a busy machine and not on a quiet one, or when it is fast by chance."""
_IMAGE = re.compile(r'data:image/png;base64,[^"]*')


def words(text: str) -> str:
    """A text without rules and line breaks: what is left where columns may be wider and lines break elsewhere."""
    return " ".join(RULES.sub(" ", text).split())


def masked(text: str) -> str:
    """Words with every number, time, size and hash replaced by its kind; a sentence or cell a line."""
    text = words(text)
    for pattern, kind in _MASKS:
        text = pattern.sub(kind, text)
    return re.sub(r"(?<=[.:;]) +", "\n", _VOLATILE.sub(" ", text).strip())


def shape(document: Any) -> str:
    """Keys and types of a JSON document: a line for each leaf, lists as `[]`, keys that are numbers as `*`."""
    found: dict[str, set[str]] = {}
    for place, kind in _leaves(document, ""):
        found.setdefault(place, set()).add(kind)
    lines = []
    for place, kinds in sorted(found.items()):
        known = kinds - {"null", "empty"} or kinds
        lines.append(f"{place or '.'}: {'|'.join(sorted(known))}")
    return "\n".join(lines)


def same_shape(left: str, right: str) -> tuple[str, str]:
    """Two shapes without what either has as null or empty, and what stands below where that is all it has."""
    sides = [dict(line.rpartition(": ")[::2] for line in text.splitlines()) for text in (left, right)]
    untold = [{place for place, kinds in side.items() if set(kinds.split("|")) <= {"null", "empty"}} for side in sides]
    bare = {
        place
        for side, places in zip(sides, untold, strict=True)
        for place in places
        if not any(other.startswith((f"{place}.", f"{place}[")) for other in side)
    }

    def told(place: str) -> bool:
        below = any(place.startswith((f"{one}.", f"{one}[")) for one in bare)
        return not below and not any(place in places for places in untold)

    first, second = ("\n".join(f"{p}: {k}" for p, k in side.items() if told(p)) for side in sides)
    return first, second


def _leaves(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            name = "*" if str(key).isdigit() else str(key).replace(".", "·")
            yield from _leaves(inner, f"{place}.{name}".removeprefix("."))
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _leaves(inner, f"{place}[]")
    elif value is None or value in ({}, []):
        yield place, "null" if value is None else "empty"
    elif isinstance(value, bool):
        yield place, "bool"
    else:
        yield place, "number" if isinstance(value, int | float) else "str"


def outline(path: Path) -> tuple[str, str]:
    """How a written file is compared, `shape` or `exact`, and what of it: keys, header, headings, never a value."""
    text = (
        path.read_text(encoding="utf-8") if path.suffix in {".json", ".yaml", ".jsonl", ".md", ".html", ".csv"} else ""
    )
    match path.suffix:
        case ".json":
            return "shape", shape(json.loads(text))
        case ".jsonl":
            return "shape", shape([json.loads(line) for line in text.splitlines()])
        case ".yaml":
            return "shape", shape(yaml.safe_load(text))
        case ".gz":
            return "shape", shape(json.loads(gzip.decompress(path.read_bytes())))
        case ".csv":
            return "exact", "\n".join(next(csv.reader(io.StringIO(text))))
        case ".md":
            found = re.findall(r"(?m)^(?:#.*|\|.*(?=\n\|[ :-]*-))", text)
            return "exact", masked_lines(iter(found))
        case ".html":
            tags = re.findall(r"<(h[1-4]|th|summary|figcaption)\b[^>]*>(.*?)</\1>", text, re.DOTALL)
            return "exact", masked_lines(f"{tag} {unescape(re.sub('<[^>]*>', '', inner))}" for tag, inner in tags)
        case ".safetensors":
            raw = path.read_bytes()
            header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
            return "shape", "\n".join(f"{name}: tensor" for name in sorted(header))
        case ".png":
            raw = path.read_bytes()
            drawn = raw.startswith(b"\x89PNG") and len(raw) > 5_000
            return "exact", "a PNG" if drawn else "no PNG, or an empty one"
        case _:
            return "exact", "there" if path.stat().st_size else "there, and empty"


def content(path: Path) -> tuple[str, str]:
    """How a file derived from kept data is compared: byte for byte where it is text, pictures apart."""
    if path.suffix == ".png":
        return outline(path)
    if path.suffix == ".gz":
        return "exact", hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    return "exact", _IMAGE.sub("PNG", path.read_text(encoding="utf-8"))


def masked_lines(lines: Iterator[str]) -> str:
    """Lines masked one by one, without doubles in a row."""
    found = [masked(line).replace("\n", " ") for line in lines]
    return "\n".join(line for index, line in enumerate(found) if index == 0 or line != found[index - 1])
