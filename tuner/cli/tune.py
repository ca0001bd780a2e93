"""`pipetune tune`: searches for the best plan by running plans, or goes on with a search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipetune.tuner.cli import options as o

if TYPE_CHECKING:
    from pipetune.tuner.config.schema import TuneConfig
    from pipetune.tuner.progress import Reporter
    from pipetune.tuner.report.data import Report


@o.settings("Model", "Workload", "Search", "output_dir", "study_name", before="resume")
@o.settings("Study", before="show_config")
def tune(
    ctx: typer.Context,
    config: o.Config = None,
    resume: o.Resume = False,
    show_config: o.ShowConfig = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Find the best plan for a model: measure the un-pipelined baseline, then plans, then the best ones again."""
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.dry_run import dry_run_of
    from pipetune.tuner.config import sources
    from pipetune.tuner.config.resolve import resolve_settings
    from pipetune.tuner.progress import make_reporter
    from pipetune.tuner.study.store import study_folder

    recorded = _recorded(ctx.params) if resume else None
    resolved = resolve_settings(ctx.params, recorded=recorded / "study.yaml" if recorded else None, warn=common.warn)
    if show_config:
        if json:
            places = {".".join(path): source for path, source in resolved.sources.items()}
            common.print_json({"config": sources.shown_values(resolved.config), "sources": places})
        else:
            typer.echo(sources.show(resolved), nl=False)
        return 0
    folder = recorded or study_folder(resolved.config)
    reporter = make_reporter(common.err(), silent=no_progress)
    if dry_run:
        with reporter:
            intended = dry_run_of(folder, resolved.config, reporter)
        if json:
            common.print_json(intended.json())
        else:
            common.show(intended.document())
        return 0
    return _tune(folder, resolved.config, reporter, resume=resume, json=json)


def _tune(folder: Path, config: TuneConfig, reporter: Reporter, *, resume: bool, json: bool) -> int:
    from pipetune.bench.errors import PipetuneError, UserError
    from pipetune.tuner.cli import common
    from pipetune.tuner.search.driver import run_study
    from pipetune.tuner.study.store import StudyStore

    with StudyStore.resume(folder, config) if resume else StudyStore.create(folder, config) as store:
        try:
            with reporter:
                finished = run_study(store, reporter)
        except UserError:
            store.discard_if_empty()
            raise
        except PipetuneError:
            # What was measured before the fault is kept, and shown.
            if store.has_measurements:
                common.err().print(f"what was measured so far is reported in {folder}", markup=False, soft_wrap=True)
                _conclude(folder)
            raise
        if not store.records:
            store.discard_if_empty()
            raise KeyboardInterrupt
        return common.show_study(_conclude(folder), json=json, interrupted=not finished)


def _conclude(folder: Path) -> Report:
    """Exports and reports; how long they took stands in the search's log, though not in the reports themselves."""
    from pipetune.tuner.commands.conclude import conclude
    from pipetune.tuner.study.files import SEARCH_FILE
    from pipetune.tuner.study.search_log import SearchLogWriter

    log = SearchLogWriter(folder / SEARCH_FILE)
    with log.spend("reports"):
        report = conclude(folder)
    log.save_if_there()
    return report


def _recorded(params: Mapping[str, Any]) -> Path:
    """The folder of the study to resume.

    Raises:
        ConfigError: nothing says which.
        StudyError: it holds no study.
    """
    from pipetune.bench.errors import ConfigError, StudyError
    from pipetune.tuner.config import sources
    from pipetune.tuner.config.resolve import given

    output_dir, name = sources.place_of(params.get("config"), given(params))
    if output_dir is None and name is None:
        raise ConfigError("--resume: which study? Give its folder with -o, or its name with --study-name")
    folder = Path(output_dir) if output_dir is not None else Path("results") / str(name)
    if not (folder / "study.yaml").is_file():
        raise StudyError(f"{folder} holds no study to resume; leave --resume out to begin one there")
    return folder
