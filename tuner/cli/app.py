"""The commands by name; each lives in a file of its own and loads what it needs when it runs."""

from importlib import import_module
from typing import Annotated

import typer

from pipetune.tuner.cli.options import SettingsCommand

app = typer.Typer(
    name="pipetune",
    help="Finds, by measuring, the best way to split a causal language model over several devices.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
_COMMANDS = "demo tune plan bench serve gate rollout compare history report collect export doctor profile join metrics"
"""Each is a function of its name in a file of its name."""
for command in _COMMANDS.split():
    app.command(cls=SettingsCommand)(getattr(import_module(f"pipetune.tuner.cli.{command}"), command))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"pipetune {version('pipetune')}")
        except PackageNotFoundError:
            typer.echo("pipetune, run in place: not installed")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Finds, by measuring, the best way to split a causal language model over several devices."""
