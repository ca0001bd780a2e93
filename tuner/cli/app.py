"""The commands by name; each lives in a file of its own and loads what it needs when it runs."""

from typing import Annotated

import typer

from pipetune.tuner.cli.bench import bench
from pipetune.tuner.cli.collect import collect
from pipetune.tuner.cli.compare import compare
from pipetune.tuner.cli.demo import demo
from pipetune.tuner.cli.doctor import doctor
from pipetune.tuner.cli.export import export
from pipetune.tuner.cli.gate import gate
from pipetune.tuner.cli.history import history
from pipetune.tuner.cli.join import join
from pipetune.tuner.cli.metrics import metrics
from pipetune.tuner.cli.options import SettingsCommand
from pipetune.tuner.cli.plan import plan
from pipetune.tuner.cli.profile import profile
from pipetune.tuner.cli.report import report
from pipetune.tuner.cli.rollout import rollout
from pipetune.tuner.cli.serve import serve
from pipetune.tuner.cli.tune import tune

app = typer.Typer(
    name="pipetune",
    help="Finds, by measuring, the best way to split a causal language model over several devices.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
_COMMANDS = (
    demo,
    tune,
    plan,
    bench,
    serve,
    gate,
    rollout,
    compare,
    history,
    report,
    collect,
    export,
    doctor,
    profile,
    join,
    metrics,
)
for command in _COMMANDS:
    app.command(cls=SettingsCommand)(command)


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
