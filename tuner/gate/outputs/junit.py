"""A gate as JUnit XML: a suite for every case, a test for every metric; INCONCLUSIVE is an error, never a skip."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from pipetune.bench.record import Machine
from pipetune.tuner.gate.outputs.wording import interval_text, margin_text, signed, value_text
from pipetune.tuner.gate.values import SIDES, Finding, GateResult, Verdict

_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no way to say."""


def render_junit(result: GateResult) -> str:
    """The whole document, XML declaration and last newline included."""
    root = ET.Element(
        "testsuites", {"name": "pipetune gate", **_counts(result.findings), "time": f"{result.took_s:.3f}"}
    )
    for name in dict.fromkeys(finding.case for finding in result.findings):
        root.append(_suite(result, name, [one for one in result.findings if one.case == name]))
    for element in root.iter():
        element.attrib = {key: _ILLEGAL.sub("�", value) for key, value in element.attrib.items()}
        element.text = element.text and _ILLEGAL.sub("�", element.text)
    ET.indent(root, " ")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _suite(result: GateResult, name: str, findings: Sequence[Finding]) -> ET.Element:
    # Where the baseline is stored the runs of the candidate, whose session is the last.
    paired = [pair.side(side) for pair in result.pairs if pair.case == name for side in SIDES]
    sessions = [session.samples for session in result.sessions if session.case == name]
    took_s = sum(run.wall_s for run in (*paired, *(sessions[-1] if sessions else ())))
    attributes = {"name": f"pipetune.gate.{name}", **_counts(findings), "skipped": "0"}
    suite = ET.Element("testsuite", {**attributes, "timestamp": result.started_at, "time": f"{took_s:.3f}"})
    hostname = next((machine.hostname for machine in result.machines.values() if machine is not None), None)
    if hostname is not None:
        suite.set("hostname", hostname)
    properties = ET.SubElement(suite, "properties")
    facts: dict[str, object] = {"method": result.method, "order_seed": result.order_seed}
    facts |= {f"{side}.{key}": value for side, machine in result.machines.items() for key, value in _facts(machine)}
    for key, value in facts.items():
        ET.SubElement(properties, "property", {"name": key, "value": str(value)})
    for finding in findings:
        suite.append(_case(finding, took_s / len(findings)))
    return suite


def _case(finding: Finding, took_s: float) -> ET.Element:
    """A test. All metrics come from the same runs: each takes its share of their time, since readers add it up."""
    attributes = {"classname": f"pipetune.gate.{finding.case}", "name": finding.metric, "time": f"{took_s:.3f}"}
    case = ET.Element("testcase", attributes)
    if finding.verdict is not Verdict.OK:
        said = {"message": finding.text, "type": finding.reason.value}
        problem = ET.SubElement(case, "failure" if finding.verdict is Verdict.FAIL else "error", said)
        problem.text = _details(finding)
    else:
        ET.SubElement(case, "system-out").text = f"{finding.text}\n{_details(finding)}"
    return case


def _details(finding: Finding) -> str:
    lines = [f"verdict: {finding.verdict.value} ({finding.reason.value})"]
    if finding.change is not None:
        lines.append(f"change: {signed(finding.change)} (margin {margin_text(finding)})")
    if finding.change_interval is not None:
        lines.append(f"95 % interval: {interval_text(finding.change_interval)}")
    if finding.floor is not None:
        lines.append(f"noise floor: {100 * finding.floor:.1f} %")
    sides = {"baseline": finding.baseline, "candidate": finding.candidate}
    lines += [f"pairs: {finding.pairs}", *(f"{side}: {value_text(finding.metric, of)}" for side, of in sides.items())]
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
