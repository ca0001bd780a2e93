"""Documents as self-contained pages: no scripts, and not a single request to anywhere."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipetune.tuner.report.document import Document, Part

_TEMPLATES = Path(__file__).with_name("templates")


def render_html(document: Document) -> str:
    """The page; everything in the document is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"kind": _kind, "data_uri": _data_uri}
    return environment.get_template("page.html.j2").render(document=document)


def _kind(part: Part) -> str:
    """Which macro draws a part."""
    return type(part).__name__


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
