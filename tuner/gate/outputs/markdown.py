"""A gate as GitHub-flavoured Markdown: for a pull request's comment and a job's summary."""

from __future__ import annotations

from pipetune.tuner.gate.outputs.wording import LEGEND, TEXT_COLUMNS, story_of
from pipetune.tuner.gate.values import GateResult, Verdict
from pipetune.tuner.report.render.markdown import escaped

_MARKS = {Verdict.OK: "✅", Verdict.FAIL: "❌", Verdict.INCONCLUSIVE: "⚠️"}


def render_markdown(result: GateResult) -> str:
    """The whole text, last newline included; how it was measured is folded away."""
    story = story_of(result)
    out = [f"## {_MARKS[result.verdict]} pipetune gate · {escaped(story.headline)}", ""]
    if story.lines:
        out.append("| " + " | ".join(story.columns) + " |")
        out.append("|" + "|".join(" :--- " if name in TEXT_COLUMNS else " ---: " for name in story.columns) + "|")
        place = story.columns.index("verdict")
        for line in story.lines:
            cells = [escaped(cell) for cell in line.cells]
            cells[place] = f"{_MARKS[line.verdict]} {cells[place]}"
            out.append(f"| {' | '.join(cells)} |")
        out += ["", LEGEND, ""]
    if story.remarks:
        out += [*(f"- {escaped(remark)}" for remark in story.remarks), ""]
    # GitHub takes what follows the tags for Markdown only after an empty line.
    out += ["<details><summary>How it was measured</summary>", ""]
    out += [f"- **{escaped(label)}**: {escaped(text)}" for label, text in story.facts]
    return "\n".join([*out, "", "</details>", ""])
