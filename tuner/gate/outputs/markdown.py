"""A gate as GitHub-flavoured Markdown: for a pull request's comment and a job's summary."""

from __future__ import annotations

from tuner.gate.outputs.wording import COLUMNS, story_of
from tuner.gate.values import GateResult, Verdict
from tuner.report.markdown import escaped

_MARKS = {Verdict.OK: "✅", Verdict.FAIL: "❌", Verdict.INCONCLUSIVE: "⚠️"}
_TEXT_COLUMNS = ("case", "metric", "verdict")


def render_markdown(result: GateResult) -> str:
    """The whole text, last newline included."""
    story = story_of(result)
    out = [f"## {_MARKS[result.verdict]} pipetune gate: {escaped(story.headline)}", ""]
    out += [f"- **{escaped(label)}**: {escaped(text)}" for label, text in story.facts]
    if story.lines:
        out += ["", "| " + " | ".join(COLUMNS) + " |"]
        out += ["|" + "|".join(" :--- " if name in _TEXT_COLUMNS else " ---: " for name in COLUMNS) + "|"]
        for line in story.lines:
            *cells, verdict = (escaped(cell) for cell in line.cells)
            out.append(f"| {' | '.join(cells)} | {_MARKS[line.verdict]} {verdict} |")
    if story.remarks:
        out += ["", *(f"- {escaped(remark)}" for remark in story.remarks)]
    return "\n".join([*out, ""])
