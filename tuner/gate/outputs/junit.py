"""A gate as JUnit XML: a suite for every case, a test for every metric; INCONCLUSIVE is an error, never a skip."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from pipetune.bench.record import Machine
from pipetune.tuner.gate.outputs.wording import interval_text, signed
from pipetune.tuner.gate.values import SIDES, Finding, GateResult, Verdict

_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no way to say."""


def render_junit(result: GateResult) -> str:
    """The whole document, XML declaration and last newline included."""
    names = list(dict.fromkeys(finding.case for finding in result.findings))
    suites = [_suite(result, name, [one for one in result.findings if one.case == name]) for name in names]
    root = ET.Element(
        "testsuites", {"name": "pipetune gate", **_counts(result.findings), "time": f"{result.took_s:.3f}"}
    )
    root.extend(suites)
    ET.indent(root, " ")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _suite(result: GateResult, name: str, findings: Sequence[Finding]) -> ET.Element:
    took_s = _took_s(result, name)
    suite = ET.Element(
        "testsuite",
        {
            "name": _legal(f"pipetune.gate.{name}"),
            **_counts(findings),
            "skipped": "0",
            "timestamp": result.started_at,
            "time": f"{took_s:.3f}",
        },
    )
    hostname = next((machine.hostname for machine in result.machines.values() if machine is not None), None)
    if hostname is not None:
        suite.set("hostname", _legal(hostname))
    properties = ET.SubElement(suite, "properties")
    facts: dict[str, object] = {"method": result.method, "order_seed": result.order_seed}
    facts |= {f"{side}.{key}": value for side, machine in result.machines.items() for key, value in _facts(machine)}
    for key, value in facts.items():
        ET.SubElement(properties, "property", {"name": key, "value": _legal(str(value))})
    for finding in findings:
        suite.append(_case(finding, took_s / len(findings)))
    return suite


def _took_s(result: GateResult, case: str) -> float:
    """What the runs of a case took; where the baseline is stored those of the candidate, whose session is the last."""
    paired = [pair.side(name) for pair in result.pairs if pair.case == case for name in SIDES]
    sessions = [session.samples for session in result.sessions if session.case == case]
    return sum(run.wall_s for run in (*paired, *(sessions[-1] if sessions else ())))


def _case(finding: Finding, took_s: float) -> ET.Element:
    """A test. All metrics come from the same runs: each takes its share of their time, since readers add it up."""
    attributes = {"classname": _legal(f"pipetune.gate.{finding.case}"), "name": _legal(finding.metric)}
    case = ET.Element("testcase", {**attributes, "time": f"{took_s:.3f}"})
    said = {"message": _legal(finding.text), "type": finding.reason.value}
    if finding.verdict is not Verdict.OK:
        problem = ET.SubElement(case, "failure" if finding.verdict is Verdict.FAIL else "error", said)
        problem.text = _legal(_details(finding))
    else:
        ET.SubElement(case, "system-out").text = _legal(f"{finding.text}\n{_details(finding)}")
    return case


def _details(finding: Finding) -> str:
    lines = [f"verdict: {finding.verdict.value} ({finding.reason.value})"]
    if finding.estimate is not None:
        lines.append(f"worse by: {signed(finding.estimate)} (margin {100 * finding.margin:g} %; negative is better)")
    if finding.interval is not None:
        lines.append(f"95 % interval: {interval_text(finding.interval)}")
    if finding.floor is not None:
        lines.append(f"noise floor: {100 * finding.floor:.1f} %")
    lines += [f"pairs: {finding.pairs}", f"baseline: {finding.baseline}", f"candidate: {finding.candidate}"]
    if finding.differences:
        lines.append("log differences: " + " ".join(f"{one:+.5f}" for one in finding.differences))
    return "\n".join(lines)


def _counts(findings: Sequence[Finding]) -> dict[str, str]:
    return {
        "tests": str(len(findings)),
        "failures": str(sum(finding.verdict is Verdict.FAIL for finding in findings)),
        "errors": str(sum(finding.verdict is Verdict.INCONCLUSIVE for finding in findings)),
    }


def _facts(machine: Machine | None) -> list[tuple[str, str]]:
    if machine is None:
        return []
    software = machine.software
    packages = " ".join(f"{name}=={version}" for name, version in software.packages.items())
    return [
        ("hardware_id", machine.hardware_id),
        ("software", f"pipetune {software.pipetune}, python {software.python}, {packages}"),
        ("git_revision", software.git_revision or "unknown"),
    ]


def _legal(text: str) -> str:
    return _ILLEGAL.sub("�", text)
