"""Documents as self-contained pages: no scripts, and not a single request to anywhere."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipetune.bench.errors import harmless
from pipetune.tuner.report.document import Document
from pipetune.tuner.report.render.plot import DARK, render_png

_TEMPLATES = Path(__file__).with_name("templates")


def render_html(document: Document) -> str:
    """The page; everything in the document is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "kind": lambda part: type(part).__name__,
        "light": lambda chart: _data_uri(render_png(chart)),
        "dark": lambda chart: _data_uri(render_png(chart, DARK)),
    }
    return environment.get_template("page.html.j2").render(document=document)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
