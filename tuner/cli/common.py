"""What commands share: consoles, and output for people and machines."""

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipetune.bench.errors import harmless

if TYPE_CHECKING:
    from pipetune.tuner.report.data import Report
    from pipetune.tuner.report.document import Document


def out() -> Console:
    """Console of results, on stdout."""
    return Console(file=sys.stdout, highlight=False)


def err() -> Console:
    """Console of progress and messages, on stderr."""
    return Console(file=sys.stderr, highlight=False)


def show(document: "Document") -> None:
    """Prints a document on stdout."""
    from pipetune.tuner.report.render.rich import render_rich

    out().print(render_rich(document))


def print_json(document: Any) -> None:
    """The one JSON document of `--json`."""
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def give(values: Any, document: "Document", *, json: bool) -> None:
    """A result on stdout: its values as JSON, or its document for people."""
    if json:
        print_json(values)
    else:
        show(document)


def warn(text: str) -> None:
    """Says on stderr what a user should look at."""
    err().print(f"pipetune: {harmless(text)}", markup=False, soft_wrap=True)


def warn_unread(*reports: "Report") -> None:
    """Says on stderr which files of studies are damaged and left out."""
    for text in (text for report in reports for text in report.unread):
        warn(f"not read: {text}")


def show_study(report: "Report", *, json: bool, interrupted: bool = False, goes_on: bool = False) -> int:
    """Prints a study for people or machines, and returns the exit code it amounts to."""
    from pipetune.tuner.commands import conclude

    code = conclude.exit_code(report.ranking, interrupted=interrupted)
    if json:
        warn_unread(report)
        print_json(conclude.document(report, interrupted=interrupted))
    else:
        from pipetune.tuner.report.ranking import screen_of

        show(screen_of(report, goes_on=goes_on))
    if not interrupted and (why := conclude.why_nothing(report.ranking)) is not None:
        warn(why)
    return code
