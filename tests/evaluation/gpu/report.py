"""The check's report as Markdown: aims first, then each section's table. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.evaluation.gpu.values import Aim, Cell, Report, Section


def render(report: Report) -> str:
    """The whole report."""
    hardware, software = report.machine.hardware, report.machine.software
    gpus = ", ".join(f"{gpu.name} ({(gpu.memory_bytes or 0) / 2**30:.0f} GiB)" for gpu in hardware.gpus) or "no GPU"
    versions = [f"{name} {software.packages[name]}" for name in ("torch", "transformers") if name in software.packages]
    versions += [
        f"{name} {version}"
        for name, version in (("driver", software.driver), ("CUDA", software.cuda), ("NCCL", software.nccl))
        if version
    ]
    lines = [
        "# GPU check",
        "",
        f"{gpus} · {', '.join(versions)} · {software.git_revision or 'no git revision'} · {report.started_at} · "
        f"{report.wall_s:.0f} s. Made by `make gpu-check`.",
        "",
        *_aims(report.sections),
    ]
    for section in report.sections:
        lines += ["", *_section(section)]
    return "\n".join(lines) + "\n"


def aim_line(aim: Aim) -> str:
    """One aim for a terminal: `met     decode at batch 1 …: 7.9×`."""
    return f"{'met' if aim.is_met else 'MISSED':7} {aim.text}: {aim.seen}"


def _aims(sections: Iterable[Section]) -> list[str]:
    rows: list[dict[str, Cell]] = [
        {"aim": aim.text, "seen": aim.seen, "": "met" if aim.is_met else "**missed**"}
        for section in sections
        for aim in section.aims
    ]
    return ["## Aims", "", *(_table(rows) if rows else ["None was examined."])]


def _section(section: Section) -> list[str]:
    lines = [f"## {section.name}", "", f"{section.status}, {section.seconds:.0f} s"]
    if section.error:
        lines += ["", "```", section.error.rstrip(), "```"]
    if section.rows:
        lines += ["", *_table(section.rows)]
    if section.notes:
        lines += ["", *(f"- {_escaped(note)}" for note in section.notes)]
    return lines


def _table(rows: Sequence[dict[str, Cell]]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(_text(row.get(name)) for name in columns) + " |" for row in rows]


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return _escaped(str(cell))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
