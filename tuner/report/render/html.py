"""Documents as self-contained pages: no scripts, and not a single request to anywhere."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipetune.tuner.report.chart import Chart
from pipetune.tuner.report.document import Document, Part
from pipetune.tuner.report.render.canvas import DARK, LIGHT
from pipetune.tuner.report.render.plot import render_png

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
    environment.filters |= {"kind": _kind, "light": _light, "dark": _dark}
    return environment.get_template("page.html.j2").render(document=document)


def _kind(part: Part) -> str:
    """Which macro draws a part."""
    return type(part).__name__


def _light(chart: Chart) -> str:
    return _data_uri(render_png(chart, LIGHT))


def _dark(chart: Chart) -> str:
    return _data_uri(render_png(chart, DARK))


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
