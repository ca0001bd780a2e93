"""`pipetune demo`: tunes a small real model in minutes, or shows again what it found."""

import typer

from pipetune.tuner.cli import options as o


@o.settings("devices", "output_dir", before="show_config")
def demo(
    ctx: typer.Context, show_config: o.ShowConfig = False, json: o.Json = False, no_progress: o.NoProgress = False
) -> int:
    """Tune a small real model that fits on no device alone, and show the pipeline; a second call shows it again."""
    from pipetune.tuner.cli import common
    from pipetune.tuner.cli.tune import tune_study
    from pipetune.tuner.commands import demo as work
    from pipetune.tuner.config import sources
    from pipetune.tuner.progress import make_reporter
    from pipetune.tuner.report.data import Report
    from pipetune.tuner.study.files import StudyFile, load_study
    from pipetune.tuner.study.store import study_folder

    (below, why), params = work.below(), {**ctx.params, "config": work.CONFIG, "prompts": None}
    if why is not None and ctx.params["devices"] is None:
        common.warn(why)
    resolved = sources.resolve_settings(params, below=below, warn=common.warn)
    if show_config:
        typer.echo(sources.show(resolved), nl=False)
        return 0
    folder = study_folder(resolved.config)
    begun = (folder / StudyFile.MACHINE).exists()
    if begun and work.is_finished(report := Report.of(load_study(folder))):
        code = common.show_study(report, json=json, goes_on=True)
    else:
        resume = (folder / StudyFile.CONFIG).exists()
        reporter = make_reporter(common.err(), silent=no_progress)
        code = tune_study(folder, work.named(resolved.config), reporter, resume=resume, json=json, goes_on=True)
    if code == 0 and not json:
        common.show(work.ending_of(Report.of(load_study(folder))))
    return code
