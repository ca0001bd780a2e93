"""Pages of sections: headings, remarks, tables, figures, in the looks of a study's report; no scripts, no requests."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table."""

    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    text_columns: frozenset[str] = frozenset()
    """Those that hold words: set to the left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A figure, as data URIs for light and for dark pages."""

    alt: str
    light: str
    dark: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of a page."""

    heading: str
    remarks: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()
    pictures: tuple[Picture, ...] = ()


def picture(alt: str, light: bytes, dark: bytes) -> Picture:
    """From PNGs."""
    return Picture(alt=alt, light=data_uri(light), dark=data_uri(dark))


def data_uri(png: bytes) -> str:
    """A PNG as a page holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def environment() -> Environment:
    """Templates with everything escaped, in which a missing value is an error."""
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page."""
    return environment().get_template("page.html.j2").render(title=title, facts=facts, sections=sections)
