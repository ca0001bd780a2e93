"""Options of commands: those of settings, built from the fields that they set, and those that commands share."""

import inspect
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import typer.main

if TYPE_CHECKING:
    from pipetune.tuner.config.settings import Setting

_OUTPUT, _COMMON_PANEL, _ADVANCED = "Output", "Common options", ", advanced"

Config = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file with any of the settings.")
]
Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="[auto]", help="Go on with a study; auto begins it where there is none."),
]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print all settings and their sources.", rich_help_panel=_OUTPUT)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run.", rich_help_panel=_OUTPUT)]
DeviceFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE|CARDS", help="YAML of devices that need not be here, or cards: 2xH100,2xA10."),
]
WaitForQuiet = Annotated[
    float | None, typer.Option("--wait-for-quiet", metavar="MINUTES", min=0.0, help="Wait so long for a quiet machine.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=_OUTPUT)]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Say nothing while working.", rich_help_panel=_OUTPUT)]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="Folder of a study, or its name under results/.")]

_COMMON = (
    *("model", "dtype", "num_prompts", "input_len", "output_len", "prompts", "devices", "output_dir"),
    *("n_trials", "timeout", "objective", "constraint", "max_memory_per_device"),
)
"""Settings that most users of a command need, which help lists first."""

Function = Callable[..., int]


def chosen(names: Iterable[str], without: Iterable[str] = ()) -> "list[Setting]":
    """Settings as `settings` names them, in the order of their options; a name that means none is a command's fault."""
    from pipetune.tuner.config import sources

    known, left_out = sources.settings(), {*without}
    found: dict[str, Setting] = {}
    for name in names:
        own = [setting for setting in known.values() if setting.flag.panel == name]
        own = own or ([known[name]] if name in known else [])
        own = own or [setting for setting in known.values() if setting.path[0] == name]
        assert own, f"{name} is no panel, no setting and no section"
        found |= {one.name: one for one in own if not {one.name, one.path[0]} & left_out}
    return list(found.values())


def settings(*names: str, before: str, without: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """A decorator that gives a command the options of settings: of panels as they are written in `--help`, single
    settings by name, or sections of the config, but for the settings and sections left out by `without`. They are
    listed in front of the command's own parameter `before`, and their values stand in the context's parameters."""

    def add(function: Function) -> Function:
        vars(function)["settings_groups"] = ((before, partial(chosen, names, without)), *groups_of(function))
        return function

    return add


def groups_of(function: object) -> "tuple[tuple[str, Callable[[], list[Setting]]], ...]":
    """The settings that a command was given, behind the parameter that they stand before, in the order written."""
    return getattr(function, "settings_groups", ())


def on_hosts(function: Function) -> Function:
    """A decorator that gives a command the options by which its workers are on several hosts."""
    vars(function)["is_on_hosts"] = True
    return function


def _host_options(
    listen: Annotated[str | None, typer.Option(metavar="ADDR:PORT", help="Where other hosts join this one.")] = None,
    nnodes: Annotated[
        int | None, typer.Option(min=1, help="Hosts that run this same command; the first leads.")
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="This host's number. [SLURM_NODEID and the like]")
    ] = None,
    master_addr: Annotated[str | None, typer.Option(metavar="ADDR", help="Address of host 0.")] = None,
    master_port: Annotated[int | None, typer.Option(help="Port of host 0. [29400]")] = None,
    host_ip: Annotated[str | None, typer.Option(help="This host's address for the others. [routes to host 0]")] = None,
) -> None: ...


class SettingsCommand(typer.core.TyperCommand):
    """A command that builds the options of settings when it is used, so that `pipetune --help` loads no schema."""

    _complete = False
    _function: Any = None

    def invoke(self, ctx: Any) -> Any:
        """Runs the command, or serves that of another host."""
        if vars(self._function).get("is_on_hosts"):
            from pipetune.bench.fleet.hosts import lead_or_join

            names = inspect.signature(_host_options).parameters
            if (code := lead_or_join(**{name: ctx.params[name] for name in names})) is not None:
                return code
        return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parses the command line; `--resume` may stand alone, or before `auto`; `--goodput` before several values."""
        followers = zip(args, [*args[1:], None], strict=False)
        whole = [f"{arg}=yes" if arg == "--resume" and after != "auto" else arg for arg, after in followers]
        takes_more = False
        for index, arg in enumerate(whole):
            own = index > 0 and whole[index - 1] == "--goodput"
            if takes_more and not own and re.fullmatch(r"\w+:\S*", arg):
                whole[index] = f"--goodput={arg}"
            takes_more = arg.startswith("--goodput") or (takes_more and ":" in arg)
        return super().parse_args(ctx, whole)

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own parameters, those of settings, and `--help`."""
        if not self._complete:
            self._complete = True
            function, own = self.callback, [parameter.name for parameter in self.params]
            assert function is not None
            self._function = function
            for before, settings_of in groups_of(function):
                there = [parameter.name for parameter in self.params]
                options = [option for option in _options_of(settings_of()) if option.name not in there]
                self.params[there.index(before) : there.index(before)] = options
            if vars(function).get("is_on_hosts"):
                self.params += _parameters_of(_host_options, "Several hosts" + _ADVANCED)
            self.callback = lambda **given: function(**{name: given[name] for name in own if name in given})
        return super().get_params(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes plain text, in which no flag is cut, whatever the width."""
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes examples, then what most users need, and what few do by panels."""
        with formatter.section("Examples"):
            formatter.write("".join(f"  {line}\n" for line in examples_of(self.name)))
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], _COMMON_PANEL: []}
        for parameter in sorted(self.get_params(ctx), key=lambda one: str(one.rich_help_panel).endswith(_ADVANCED)):
            panel = parameter.rich_help_panel or _COMMON_PANEL
            name, text = parameter.get_help_record(ctx)
            if parameter.param_type_name == "argument":
                panel, name = "Arguments", parameter.metavar
            panels.setdefault(panel, []).append(
                (re.sub(r" <(\w+)[^/]*", lambda kind: f" {kind[1].upper()}", name), text)
            )
        for panel, rows in panels.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)


def examples_of(name: str | None) -> tuple[str, ...]:
    """Lines that show a command's use."""
    lines = Path(__file__).with_name("examples.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line.split()[1:2] == [name])


def _options_of(chosen: "Iterable[Setting]") -> list[Any]:
    """Options as typer makes them for a function with these parameters; none has a default, which is the config's."""

    def holder(**values: object) -> None: ...

    parameters = [
        inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(setting))
        for setting in chosen
    ]
    vars(holder)["__signature__"] = inspect.Signature(parameters)
    holder.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return _parameters_of(holder)


def _parameters_of(function: Callable[..., None], panel: str | None = None) -> list[Any]:
    app = typer.Typer(add_completion=False)
    app.command()(function)
    found: list[Any] = typer.main.get_command(app).params
    for parameter in found if panel else ():
        parameter.rich_help_panel = panel
    return found


def _annotation(setting: "Setting") -> Any:
    from pipetune.tuner.config.schema import GPU_DEFAULTS

    flag, default = setting.flag, setting.default_text
    if setting.path in GPU_DEFAULTS:
        default += f"; on GPUs {GPU_DEFAULTS[setting.path]}"
    option = typer.Option(
        *filter(None, (setting.declaration, flag.short)),
        help=f"{flag.help} [{default}]" if default else flag.help,
        metavar=flag.metavar,
        rich_help_panel=_COMMON_PANEL if setting.name in _COMMON else flag.panel + _ADVANCED * (flag.panel != "Load"),
    )
    return Annotated[(list[str] if flag.repeats else setting.kind) | None, option]
