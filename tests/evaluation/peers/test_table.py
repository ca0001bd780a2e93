"""The table says what the cells hold."""

from __future__ import annotations

from tests.evaluation.peers.cell_factory import make_cell, make_round
from tests.evaluation.peers.table import render
from tests.evaluation.peers.values import Replan


def test_rows_carry_ratio_spread_and_verdict() -> None:
    durations = [(2.0, 4.0, 3.0), (2.0, 5.0, 3.0), (2.0, 3.0, 3.0)]
    cell = make_cell(
        [
            make_round(number, {"pipeline": ours, "hf_one": peer, "single": single})
            for number, (ours, peer, single) in enumerate(durations)
        ],
        absent={"hf_pp": "OSError: no | gloo <here>\nat all"},
    )
    cell = cell.model_copy(
        update={"replans": (Replan(from_cut=3, to_cut=5, ready_s=1.5, load_s=0.2, check_s=1.0, layers=2),)}
    )
    lines = render([cell]).splitlines()
    row = next(line for line in lines if "| HF generate, one worker's cores |" in line)
    assert row.startswith("| some-model, balanced | ours, two stages | 20.0 |")
    assert "**2.00** (1.50–2.50, n=3) | – | 0.50 | 1.33 | ≥ 1.85 | met |" in row
    row = next(line for line in lines if "| ours, one stage on one worker |" in line)
    assert "**1.50**" in row
    assert "missed by 14%" in row
    row = next(line for line in lines if "pp_size=2" in line and line.startswith("|"))
    assert "not run: OSError: no \\| gloo &lt;here> at all" in row
    row = next(line for line in lines if "cut 3 ⇄ 5" in line)
    assert "**1.50 s**" in row
    assert "missed by 50%" in row
    assert not any("ScheduleGPipe" in line for line in lines)
    widths = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert widths == {12}


def test_other_tokens_are_told() -> None:
    cell = make_cell([make_round(0, {"pipeline": 2.0, "hf_one": 4.0})])
    frozen = cell.frozen["hf_one"].model_copy(update={"tokens_differ": 3})
    cell = cell.model_copy(update={"frozen": {**cell.frozen, "hf_one": frozen}})
    assert "met; HF generate, one worker's cores: other tokens for 3 prompts" in render([cell])


def test_another_processor_has_a_column_of_its_own() -> None:
    quoted = {
        "processor": "Other, 4 cores",
        "date": "2026-11",
        "command": "peers --pairs 4",
        "ratios": {"some-model, balanced": {"pipeline/hf_one": 1.82}, "some-model, odd": {"pipeline/hf_all": 0.94}},
    }
    here = make_cell([make_round(0, {"pipeline": 2.0, "hf_one": 4.0})])
    lines = render([here], [quoted]).splitlines()
    hardware = here.machine.hardware
    columns = f"{hardware.cpu_model}, {hardware.cpu_cores} cores (2026-01-01) | Other, 4 cores (2026-11)"
    assert f"| model, workload | ours | against | {columns} |" in lines
    assert "| some-model, balanced | ours, two stages | HF generate, one worker's cores | 2.00 | 1.82 |" in lines
    assert "| some-model, odd | ours, two stages | HF generate, all cores | – | 0.94 |" in lines
    assert "- Other, 4 cores: `peers --pairs 4`, whose raw measurements were not kept" in lines


def test_nothing_measured_is_said() -> None:
    assert render([]) == "Nothing was measured yet.\n"
