"""Settings as a schema's fields state them: name, type, default and help of each flag and environment variable."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from pipetune.bench.spec import Flag

KeyPath = tuple[str, ...]
ENVIRONMENT_PREFIX = "PIPETUNE_"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field that a flag and an environment variable set."""

    name: str
    """`num_prompts`: the flag without its dashes."""
    flag: Flag
    path: KeyPath
    """Keys that lead to the field in YAML: `("workload", "num_prompts")`."""
    kind: type[bool] | type[int] | type[float] | type[str]
    """Type of the option's value; a list or a choice is read from text."""
    default: object

    @property
    def option(self) -> str:
        """`--num-prompts`."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def declaration(self) -> str:
        """`--num-prompts`, or `--check/--no-check` for a switch that is on by default."""
        return f"{self.option}/--no-{self.option.removeprefix('--')}" if self.default is True else self.option

    @property
    def default_text(self) -> str:
        """The default as it is typed: `8`, `0.5,0.9`, `on`; empty where it is left open."""
        if isinstance(self.default, bool):
            return "on" if self.default else ""
        values = self.default if isinstance(self.default, tuple) else (self.default,)
        return ",".join(str(one) for one in values if one is not None)

    @property
    def variable(self) -> str:
        """`PIPETUNE_NUM_PROMPTS`."""
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def paths(self) -> tuple[KeyPath, ...]:
        """Keys of all fields that are set, the setting's own first."""
        return (self.path, *(tuple(key.split(".")) for key in self.flag.also))


@functools.cache
def settings_of(schema: type[BaseModel]) -> dict[str, Setting]:
    """Settings of a schema and of the sections within it by name, in the order of their options."""
    found = {setting.name: setting for setting in _walk(schema, ())}
    order = list(found)
    for setting in found.values():
        if setting.flag.before is not None:
            order.remove(setting.name)
            order.insert(order.index(setting.flag.before), setting.name)
    return {name: found[name] for name in order}


def section_of(schema: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model of a nested section, which may be left open; None for a plain value."""
    kinds = _members(schema.model_fields[key].annotation)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def leaves_of(values: Mapping[str, Any], above: KeyPath = ()) -> dict[KeyPath, Any]:
    """Plain values by their keys; a section within a section is taken apart as well."""
    leaves: dict[KeyPath, Any] = {}
    for key, value in values.items():
        leaves |= leaves_of(value, (*above, key)) if isinstance(value, dict) else {(*above, key): value}
    return leaves


def _walk(schema: type[BaseModel], above: KeyPath) -> Iterator[Setting]:
    for key, field in schema.model_fields.items():
        if (section := section_of(schema, key)) is not None:
            yield from _walk(section, (*above, key))
        for flag in field.metadata:
            if isinstance(flag, Flag):
                default = None if field.is_required() else field.get_default(call_default_factory=True)
                yield Setting(name=flag.name or key, flag=flag, path=(*above, key), kind=_kind(field), default=default)


def _kind(field: FieldInfo) -> type[bool] | type[int] | type[float] | type[str]:
    kinds = [kind for kind in _members(field.annotation) if kind is not type(None)]
    if _is_text((*field.metadata, field.annotation)):
        return str
    return next((kind for kind in (bool, int, float) if kinds == [kind]), str)


def _is_text(parts: Iterable[object]) -> bool:
    """Whether values are read from text, whatever they become; parts of an annotation may lie within others."""
    return any(isinstance(one, BeforeValidator) or _is_text(get_args(one)) for one in parts)


def _members(annotation: Any) -> list[Any]:
    """The types that a value may have, without what annotates them."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _members(part)]
    return [annotation]
