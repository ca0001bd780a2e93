"""`pipetune metrics`: what objectives and constraints may name."""

from typing import Annotated

import typer

from pipetune.tuner.cli import options as o


def metrics(
    part: Annotated[str, typer.Argument(metavar="[PART]", help="Only names that hold this, such as ttft.")] = "",
    json: o.Json = False,
) -> int:
    """List the metrics that --objective and --constraint know: which way is better, and what each means."""
    from pipetune.bench.metrics import definitions
    from pipetune.tuner.cli import common
    from pipetune.tuner.report.document import Document, Table, Text, left, rows_of

    found = [(names, text, better) for names, text, better in definitions() if any(part in name for name in names)]
    rows = rows_of((Text("\n".join(names)), better, text) for names, text, better in found)
    columns = (left("metric"), left("better"), left("definition", "prose"))
    note = "A percentile needs samples in its tail: 10 prompts for p90, 100 for p99."
    values = [{"names": names, "better": better, "definition": text} for names, text, better in found]
    common.give(values, Document(parts=(Table(columns=columns, rows=rows, ruled=True), Text(note, "faint"))), json=json)
    return 0
