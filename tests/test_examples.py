"""The examples of docs/hosts.md are what Slurm, Kubernetes and Kubeflow's operator take."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipetune.tuner.cli import run

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/hosts.md").read_text(encoding="utf-8")
OPERATOR = ROOT / "tests/data/pytorchjob.json.gz"
"""Schema of PyTorchJob in Kubeflow's training operator 1.9.0 (Apache 2.0), without its descriptions."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def jobs() -> dict[str, Any]:
    return {one["kind"]: one for one in map(yaml.safe_load, blocks("yaml"))}


def test_the_indexed_job_is_one() -> None:
    kubernetes_validate.validate(jobs()["Job"], "1.31", strict=True)
    broken = jobs()["Job"] | {"specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.31", strict=True)


def test_the_pytorch_job_is_one_by_the_operators_definition() -> None:
    schema = json.loads(gzip.decompress(OPERATOR.read_bytes()))
    job = jobs()["PyTorchJob"]
    jsonschema.validate(job, schema)
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] = "one"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, schema)


def test_the_batch_script_is_bash() -> None:
    (script,) = blocks("bash")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_every_flag_of_the_page_is_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub(r"\\\n", " ", PAGE)
    lines = re.findall(r"pipetune (tune|join)\b([^\n]*)", text)
    assert len(lines) > 4
    for command in ("tune", "join"):
        assert run([command, "--help"]) == 0
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        used = {flag for name, rest in lines if name == command for flag in re.findall(r"--[a-z-]+", rest)}
        assert used <= known
