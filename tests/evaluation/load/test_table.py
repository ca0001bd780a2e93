"""The table of the parts."""

from __future__ import annotations

from pipetune.bench.record import Hardware, Machine, Software
from tests.evaluation.load.table import render
from tests.evaluation.load.values import Part, Row

MACHINE = Machine(
    hostname="here",
    hardware_id="0",
    hardware=Hardware(cpu_model="Some CPU", cpu_cores=2, memory_bytes=1),
    software=Software(python="3.11", packages={"torch": "2.0"}, os="Linux", pipetune="0"),
)


def part(number: int, *rows: Row, quick: bool = False) -> Part:
    """Measured in two minutes."""
    return Part(
        number=number,
        title=f"part {number}",
        machine=MACHINE,
        started_at="2026-01-01T00:00:00+00:00",
        took_s=120.0,
        load_before=0.1,
        load_after=2.0,
        quick=quick,
        rows=rows,
    )


def test_each_row_tells_its_aim_its_count_and_its_interval() -> None:
    text = render(
        [
            part(3, Row(name="order", value=61.0, low=60.0, high=62.0, n=500, of="steps", aim=50, at_least=False)),
            part(1, Row(name="ratio", value=1.5, n=2, of="rounds", aim=1.3, note="a model")),
        ]
    )
    assert "| 1 | ratio (a model) | 1.5 | – | 2 rounds | ≥ 1.3 | met |" in text
    assert "| 3 | order | 61.0 | 60.0–62.0 | 500 steps | ≤ 50.0 | missed by 22% |" in text
    assert text.index("| 1 |") < text.index("| 3 |")
    assert text.startswith("Some CPU, 2 cores; torch 2.0.")
    assert "load 0.1 before, 2.0 after" in text


def test_a_small_number_is_none() -> None:
    assert "| 2.22 % | 0–2.5 |" in render(
        [part(5, Row(name="error", value=2.222, low=1e-14, high=2.5, n=9, of="runs", unit="%"))]
    )


def test_quick_runs_are_named_and_nothing_is_a_line() -> None:
    assert "a quick run" in render([part(1, Row(name="ratio", value=1.0, n=1, of="rounds"), quick=True)])
    assert render([]) == "Nothing was measured yet.\n"
