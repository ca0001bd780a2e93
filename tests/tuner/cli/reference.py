"""`python -m tests.tuner.cli.reference [--write docs/cli.md]`: the reference page, made of the real commands."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from pipetune.tuner.cli.app import app
from pipetune.tuner.cli.options import examples_of, groups_of
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import GPU_DEFAULTS
from pipetune.tuner.config.settings import KeyPath, section_of

WIDTH = 100
_INTRODUCTION = """
This page is made of the commands themselves: `pipetune COMMAND --help` says the same.

A setting is given by its flag, by its environment variable, or by its key in a YAML file (`--config FILE`); a flag
overrides a variable, and a variable overrides the file. `--show-config` prints every setting with the place that it
comes from. `model.trust_remote_code` alone is taken from its flag and from nowhere else.
"""
_SETTINGS = """
Flag, environment variable and key of each, with its default in parentheses where it has one. The commands above say
which flags they take; variables and keys are read by all.
"""
_KEYS = "Keys of the YAML file that have no flag."


def page() -> str:
    """The whole page in Markdown, wrapped at `WIDTH` columns."""
    lines = ["# The command line", *_prose(_INTRODUCTION), *_commands()]
    lines += ["", "## Settings", *_prose(_SETTINGS), *_settings()]
    lines += ["", "## Further keys", *_prose(_KEYS), "", *_keys()]
    return "\n".join(lines) + "\n"


def _commands() -> Iterator[str]:
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        chosen = {setting.name for _, settings in groups_of(command.callback) for setting in settings()}
        context = typer.Context(command, info_name=name)
        parameters = command.get_params(context)
        yield from ("", f"## pipetune {name}", *_prose(command.help), "", "```", *examples_of(name), "```", "")
        for one in parameters:
            if one.name not in chosen and "--help" not in one.opts:
                default = "" if getattr(one, "is_flag", True) else _default(one.default)
                yield from _item(_typed(one, context) + default, one.help)
        taken = [f"`{one.opts[0]}`" for one in parameters if one.name in chosen]
        if taken:
            yield from ("", *_wrapped(f"[Settings](#settings): {', '.join(taken)}."))


def _settings() -> Iterator[str]:
    known = sorted(sources.settings().values(), key=lambda setting: setting.flag.panel == "Study")
    for panel in dict.fromkeys(setting.flag.panel for setting in known):
        yield from ("", f"### {panel}", "")
        for one in known:
            if one.flag.panel == panel:
                flag, short = one.declaration.replace("/", "`, `"), f"`{one.flag.short}`, " if one.flag.short else ""
                value = "" if one.kind is bool else f" {one.flag.metavar or one.kind.__name__.upper()}"
                key = ".".join(one.path)
                default = _default(one.default)
                if one.path in GPU_DEFAULTS:
                    default = default.replace(")", f"; on GPUs `{GPU_DEFAULTS[one.path]}`)")
                names = f"`{flag}{value}`, {short}`{one.variable}`, `{key}`{default}"
                yield from _item(names, one.flag.help)


def _keys() -> Iterator[str]:
    flagged = {setting.path for setting in sources.settings().values()}
    flagged |= {path for setting in sources.settings().values() for path in setting.paths}
    for path, default, meaning in _fields(vars(sources)["TuneConfig"], ()):
        if path not in flagged:
            yield from _item(f"`{'.'.join(path)}`{_default(default)}", meaning)


def _fields(schema: type[BaseModel], above: KeyPath) -> Iterator[tuple[KeyPath, object, str]]:
    """Plain fields with their defaults and docstrings, sections taken apart."""
    said = _docstrings(schema)
    for key, field in schema.model_fields.items():
        section = section_of(schema, key)
        if section is not None:
            yield from _fields(section, (*above, key))
        else:
            yield (*above, key), field.get_default(call_default_factory=True, validated_data={}), said.get(key, "")


def _docstrings(schema: type[BaseModel]) -> dict[str, str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: str(text.value.value)
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _default(value: object) -> str:
    """A default in parentheses; nothing for what is left open, or too long for a line."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr, ensure_ascii=False)
    return "" if text in ("null", "[]", "{}") or len(text) > WIDTH // 2 else f" (`{text}`)"


def _typed(parameter: Any, context: typer.Context) -> str:
    """An option or argument as it is typed: `--output FILE`, `-o`."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    kind = parameter.metavar or parameter.display_type(context).strip("<>").partition(" ")[0].upper()
    value = "" if parameter.is_flag else f" {kind}"
    names = [f"`{name}{value if name.startswith('--') else ''}`" for name in sorted(parameter.opts, reverse=True)]
    names = [*(one for one in names if one.startswith("`--")), *(one for one in names if not one.startswith("`--"))]
    return ", ".join([*names, *(f"`{name}`" for name in parameter.secondary_opts)])


def _prose(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        yield from ("", *_wrapped(paragraph))


def _item(names: str, meaning: str) -> list[str]:
    return _wrapped(f"{names}: {meaning}" if meaning else names, "- ")


def _wrapped(text: str, first: str = "") -> list[str]:
    """Lines of one paragraph; code is not broken."""
    text = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), " ".join(text.split()))
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [line.replace("\0", " ") for line in lines]


def main() -> None:
    """Prints the page, or writes it into a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.tuner.cli.reference", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    path = parser.parse_args().write
    if path is None:
        print(page(), end="")
    else:
        path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
