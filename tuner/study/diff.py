"""What differs between two values of one kind, leaf by leaf, in words for people."""

from __future__ import annotations

import yaml
from pydantic import BaseModel

from pipetune.tuner.config.settings import leaves_of


def differences(before: BaseModel, now: BaseModel) -> list[str]:
    """`key: before → now` for every leaf that differs; keys are dotted."""
    old, new = leaves_of(before.model_dump(mode="json")), leaves_of(now.model_dump(mode="json"))
    return [
        f"{'.'.join(key)}: {_brief(old.get(key))} → {_brief(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _brief(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
