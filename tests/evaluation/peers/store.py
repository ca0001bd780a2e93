"""Cells on disk: one JSON file each, written whole after every step, and taken up again where nothing has changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from pipetune.bench.files import write_durably
from pipetune.bench.record import Machine
from pipetune.bench.spec import ModelSpec, Workload
from tests.evaluation.peers.table import short_name
from tests.evaluation.peers.values import SCHEMA_VERSION, Cell

VERSIONED = ("torch", "transformers")
"""A comparison goes on only with the same versions of these: they are what the peers are made of."""


def identity_of(
    *,
    model: ModelSpec,
    workload: Workload,
    seed: int,
    quick: bool,
    packages: Mapping[str, str],
    config_text: str,
    sides: Sequence[str] = (),
) -> str:
    """Digest of all that must be equal for a cell to go on.

    Args:
        config_text: the model's `config.json` where it is a folder: dummy weights are made of it.
        sides: those that were asked for; none means all.
    """
    parts = {
        "schema": SCHEMA_VERSION,
        "model": model.digest(),
        "workload": workload.digest(),
        "seed": seed,
        "quick": quick,
        "versions": {name: packages.get(name) for name in VERSIONED},
        "config": config_text,
        "sides": sorted(sides),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def path_of(folder: Path, model: ModelSpec, workload_name: str, *, quick: bool) -> Path:
    """`<model>-<workload>.json`, and `…-quick.json` for the short version: they never mix."""
    return folder / f"{short_name(model.name)}-{workload_name}{'-quick' if quick else ''}.json"


def folder_of(folder: Path, machine: Machine) -> Path:
    """`amd-epyc-2-cores` in the folder: what one processor measured stays beside what another did."""
    hardware = machine.hardware
    return folder / re.sub(r"[^a-z0-9]+", "-", f"{hardware.cpu_model} {hardware.cpu_cores} cores".lower()).strip("-")


def load(path: Path, *, identity: str, machine: Machine) -> Cell | None:
    """A cell to go on with; None where there is none, or one of another question, version or machine."""
    cell = read(path)
    if cell is None or cell.identity != identity or cell.machine.hardware_id != machine.hardware_id:
        return None
    return cell


def read(path: Path) -> Cell | None:
    """A cell to look at; None where the file is missing or of another schema."""
    try:
        return Cell.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def save(path: Path, cell: Cell) -> None:
    """Writes a cell durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, cell.model_dump_json() + "\n")
