"""A rollout for people: the verdict, the chain from the smallest fleet to the largest, and the gate."""

import math
from collections.abc import Iterator

from pipetune.tuner.commands.plan_document import fleet_text
from pipetune.tuner.commands.rollout import PROMOTED_FILE, Rollout, RolloutRequest, Tried
from pipetune.tuner.gate.outputs import wording as gate_wording
from pipetune.tuner.report import document as doc
from pipetune.tuner.report import wording as w
from pipetune.tuner.report.files import write_documents

_LEGEND = "predicted: with the interval for 95 of 100 fleets; miss: measured over predicted; !: outside of the interval"
_FAR = math.log(2)
"""A miss from which on it is told as a factor."""


def document_of(rollout: Rollout, *, title: str = "") -> doc.Document:
    """The whole of it, for every medium."""
    style: doc.Style = "good" if rollout.promoted else "bad" if rollout.exit_code == 1 else "warning"
    facts = [("model", rollout.model), ("objective", w.with_unit(rollout.objective))]
    facts += [(f"{fleet_text(fleet.devices)} by", fleet.made_from) for fleet in rollout.fleets]
    if rollout.first_model is not None:
        layers = rollout.first_plan.stages[-1].end_layer
        about = f"{rollout.first_model}, {layers} layers with random weights; intervals begin twice as wide"
        facts.insert(1, ("tuned with", about))
    verdict = doc.Text(w.clean(rollout.verdict), style)
    numbers = (doc.Column("predicted", wrap="narrow"), *map(doc.Column, ("measured", "miss")))
    columns = (doc.left("fleet", "narrow"), doc.left("plan", "prose"), *numbers)
    chain = doc.Table(columns=columns, rows=doc.rows_of(_rows(rollout)), legend=_LEGEND, gap=1)
    parts: list[doc.Part] = [verdict, doc.GAP, chain, doc.GAP, doc.Facts(tuple(facts))]
    if failed := [one for fleet in rollout.fleets for one in fleet.tried if one.failure]:
        told = (w.clean(f"{one.predicted.effective.plan.describe()}: {one.failure}") for one in failed)
        parts += [doc.GAP, doc.Bullets(tuple(told))]
    if rollout.gate is not None:
        parts.append(doc.GAP)
        parts.append(doc.Section("Gate against what runs today", gate_wording.screen_of(rollout.gate).parts))
    if rollout.promoted:
        parts += [doc.GAP, doc.Text(f"The plan with its evidence is in {PROMOTED_FILE}.")]
    return doc.Document(title=title, parts=tuple(parts))


def _rows(rollout: Rollout) -> Iterator[tuple[str, ...]]:
    first = w.number_text(rollout.first_value)
    tuned = "(tuned)" if rollout.first_model is None else f"({rollout.first_plan.stages[-1].end_layer} layers)"
    yield (fleet_text(rollout.first_devices), rollout.first_plan.describe(), tuned, first, "")
    for fleet in rollout.fleets:
        for place, one in enumerate(fleet.tried):
            name = fleet_text(fleet.devices) if place == 0 else ""
            interval = f"{w.number_text(one.predicted.value)} [{w.number_text(one.low)}, {w.number_text(one.high)}]"
            yield name, one.predicted.effective.plan.describe(), interval, w.number_text(one.level), _miss(one)


def _miss(one: Tried) -> str:
    if one.miss is None:
        return "failed"
    far = abs(one.miss) > _FAR
    miss = f"× {math.exp(one.miss):.2g}" if far else f"{math.expm1(one.miss) * 100:+.1f} %"
    return miss + "!" * (not one.is_within)


def intended(request: RolloutRequest) -> doc.Document:
    """What would run, and what is there already."""
    rows = [(what, place, "there" if done else "to do") for what, place, done in request.steps()]
    columns = (doc.left("step", "prose"), doc.left("leaves", "narrow"), doc.left(""))
    return doc.Document(parts=(doc.Text(f"In {request.folder}:"), doc.Table(columns=columns, rows=doc.rows_of(rows))))


def write(rollout: Rollout, request: RolloutRequest) -> None:
    """Writes `rollout.json`, `.md` and `.html`."""
    whole = document_of(rollout, title=f"Rollout of {rollout.model}")
    write_documents(request.folder, "rollout", rollout, whole=whole, page=whole, figures={})
