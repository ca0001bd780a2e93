"""Options of commands: those of settings, built from the fields that they set, and those that commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import typer.main

if TYPE_CHECKING:
    from pipetune.tuner.config.settings import Setting

_OUTPUT = "Output"

Config = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file with any of the settings.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a study.", rich_help_panel="Study")]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print all settings and their sources.", rich_help_panel=_OUTPUT)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run.", rich_help_panel=_OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=_OUTPUT)]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Say nothing while working.", rich_help_panel=_OUTPUT)]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="Folder of a study, or its name under results/.")]

Function = Callable[..., int]


@dataclass(frozen=True, kw_only=True)
class SettingsGroup:
    """Settings that a command takes as options, listed in front of one of its own parameters."""

    names: tuple[str, ...]
    without: tuple[str, ...]
    before: str

    def settings(self) -> list[Setting]:
        """The settings in the order of their options; a name that means none is a fault of the command."""
        from pipetune.tuner.config import sources

        known = sources.settings()
        chosen: dict[str, Setting] = {}
        for name in self.names:
            found = [setting for setting in known.values() if setting.flag.panel == name]
            found = found or ([known[name]] if name in known else [])
            found = found or [setting for setting in known.values() if setting.path[0] == name]
            assert found, f"{name} is no panel, no setting and no section"
            chosen |= {one.name: one for one in found if not {one.name, one.path[0]} & {*self.without}}
        return list(chosen.values())


def settings(*names: str, before: str, without: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """A decorator that gives a command the options of settings; their values stand in the context's parameters.

    Args:
        names: panels as they are written in `--help`, single settings by name, or sections of the config.
        before: the command's own parameter that the options are listed in front of.
        without: settings and sections that are left out.
    """

    def add(function: Function) -> Function:
        group = SettingsGroup(names=names, without=without, before=before)
        vars(function)["settings_groups"] = (group, *groups_of(function))
        return function

    return add


def groups_of(function: object) -> tuple[SettingsGroup, ...]:
    """The groups that `settings` gave to a command, in the order in which they are written."""
    return getattr(function, "settings_groups", ())


class SettingsCommand(typer.core.TyperCommand):
    """A command that builds the options of settings when it is used, so that `pipetune --help` loads no schema."""

    _complete = False

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own parameters, those of settings, and `--help`."""
        if not self._complete:
            self._complete = True
            function, own = self.callback, [parameter.name for parameter in self.params]
            assert function is not None
            for group in groups_of(function):
                there = [parameter.name for parameter in self.params]
                options = [option for option in _options_of(group.settings()) if option.name not in there]
                self.params[there.index(group.before) : there.index(group.before)] = options
            self.callback = lambda **given: function(**{name: given[name] for name in own if name in given})
        return super().get_params(ctx)


def _options_of(chosen: Iterable[Setting]) -> list[Any]:
    """Options as typer makes them for a function with these parameters; none has a default, which is the config's."""

    def holder(**values: object) -> None: ...

    parameters = [
        inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(setting))
        for setting in chosen
    ]
    vars(holder)["__signature__"] = inspect.Signature(parameters)
    holder.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False)
    app.command()(holder)
    return typer.main.get_command(app).params


def _annotation(setting: Setting) -> Any:
    flag = setting.flag
    option = typer.Option(
        *filter(None, (flag.name, flag.short)), help=flag.help, metavar=flag.metavar, rich_help_panel=flag.panel
    )
    return Annotated[(list[str] if flag.repeats else setting.kind) | None, option]
