"""`pipetune tune`: searches for the best plan by running plans, or goes on with a search."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipetune.tuner.cli import options as o

if TYPE_CHECKING:
    from pipetune.tuner.config.schema import TuneConfig
    from pipetune.tuner.progress import Reporter
    from pipetune.tuner.report.data import Report


@o.on_hosts
@o.settings("Model", "Workload", "Load", "Search", "Engine", "output_dir", "study_name", before="resume")
@o.settings("Study", before="show_config")
def tune(
    ctx: typer.Context,
    config: o.Config = None,
    resume: o.Resume = None,
    show_config: o.ShowConfig = False,
    dry_run: o.DryRun = False,
    wait_for_quiet: o.WaitForQuiet = None,
    json: o.Json = False,
    no_progress: o.NoProgress = False,
) -> int:
    """Find the best plan for a model: measure the un-pipelined baseline, then plans, then the best ones again."""
    from pipetune.tuner.cli import common
    from pipetune.tuner.commands.dry_run import DryRun
    from pipetune.tuner.config import sources
    from pipetune.tuner.progress import make_reporter
    from pipetune.tuner.study.store import study_folder

    recorded = _recorded(ctx.params, resume) if resume is not None else None
    resolved = sources.resolve_settings(
        ctx.params, recorded=recorded / "study.yaml" if recorded else None, reads_trace=True, warn=common.warn
    )
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
            intended = DryRun(folder, resolved.config, reporter)
        common.give(intended.json(), intended.document(), json=json)
        return 0
    return tune_study(
        folder, resolved.config, reporter, resume=recorded is not None, json=json, wait_for_quiet=wait_for_quiet
    )


def tune_study(
    folder: Path,
    config: "TuneConfig",
    reporter: "Reporter",
    *,
    resume: bool,
    json: bool,
    wait_for_quiet: float | None = None,
    goes_on: bool = False,
) -> int:
    """Runs what is left of a study, prints it, and returns the exit code."""
    from pipetune.bench.errors import PipetuneError, StudyError, UserError, disk_fault
    from pipetune.bench.record import Measurement
    from pipetune.tuner.cli import common
    from pipetune.tuner.progress import look_at_load
    from pipetune.tuner.search.driver import run_study
    from pipetune.tuner.study.store import StudyStore

    with StudyStore.resume(folder, config) if resume else StudyStore.create(folder, config) as store:
        try:
            with reporter:
                look_at_load(config.concrete_devices, reporter, wait_for_quiet)
                finished = run_study(store, reporter)
            if not store.records:
                store.discard_if_empty()
                raise KeyboardInterrupt
            return _conclude(folder, partial(common.show_study, json=json, interrupted=not finished, goes_on=goes_on))
        except UserError:
            store.discard_if_empty()
            raise
        except OSError as error:
            store.discard_if_empty()
            if not store.records or error.filename is None:
                raise
            kept = f"what was measured is kept; go on by `pipetune tune --resume -o {folder}`"
            raise StudyError(f"{disk_fault(error)}; {kept}") from error
        except PipetuneError:
            # What was measured before the fault is kept, and shown.
            if any(isinstance(record.result, Measurement) for record in store.records):
                common.err().print(f"what was measured so far is reported in {folder}", markup=False, soft_wrap=True)
                _conclude(folder)
            raise


def _conclude(folder: Path, show: "Callable[[Report], int]" = lambda report: 0) -> int:
    """Exports and reports; how long they took stands in the search's log, though not in the reports themselves."""
    from pipetune.tuner.commands.conclude import conclude
    from pipetune.tuner.study.files import StudyFile
    from pipetune.tuner.study.search_log import SearchLogWriter

    log = SearchLogWriter(folder / StudyFile.SEARCH)
    with log.spend("reports"):
        code = conclude(folder, show)
    log.save()
    return code


def _recorded(params: Mapping[str, Any], resume: str) -> Path | None:
    """The folder of the study to resume; None where there is none, and it may begin there."""
    from pipetune.bench.errors import ConfigError, StudyError
    from pipetune.tuner.config import sources

    if resume not in ("yes", "auto"):
        raise ConfigError(f"--resume={resume}: give it alone, or as --resume auto")
    output_dir, name = sources.place_of(params)
    if output_dir is None and name is None:
        raise ConfigError("--resume: which study? Give its folder with -o, or its name with --study-name")
    folder = Path(output_dir) if output_dir is not None else Path("results") / str(name)
    if not (folder / "study.yaml").is_file():
        if resume == "auto":
            return None
        raise StudyError(f"{folder} holds no study to resume; leave --resume out to begin one there")
    return folder
