"""What commands share: settings from flags, consoles, and output for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from tuner.report.data import Report
    from tuner.settings import KeyPath, Resolved


def out() -> Console:
    """For results."""
    return Console(file=sys.stdout, highlight=False)


def err() -> Console:
    """For progress and messages."""
    return Console(file=sys.stderr, highlight=False)


def print_json(document: Any) -> None:
    """The one JSON document of `--json`."""
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def given(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a command's parameters; those that were not given are left out."""
    from tuner.settings import FLAGS

    return {
        name: list(value) if isinstance(value, (list, tuple)) else value
        for name, value in params.items()
        if name in FLAGS and value is not None and value not in ([], ())
    }


def resolve_settings(
    params: Mapping[str, Any],
    *,
    recorded: Path | None = None,
    below: Mapping[KeyPath, object] | None = None,
    below_name: str = "",
) -> Resolved:
    """Settings from all sources, with devices made concrete and the number of prompts fitted to their file.

    Raises:
        ConfigError: see `settings.resolve`; or objectives and constraints that the workload cannot serve.
    """
    from tuner import settings
    from tuner.config import check_metrics

    resolved = settings.resolve(
        file=params.get("config"), flags=given(params), recorded=recorded, below=below, below_name=below_name
    )
    for warning in resolved.warnings:
        err().print(f"pipetune: {warning}", markup=False)
    resolved = _fit_prompts(resolved)
    if resolved.config.devices == "auto":
        from bench.launch import available_devices

        space = resolved.config.space
        most = space.max_stages and space.max_stages * max(space.replicas or (1,))
        devices = available_devices()[:most]
        resolved = _with(resolved, ("devices",), list(devices), "auto")
    check_metrics(resolved.config)
    return resolved


def show_study(report: Report, *, json: bool, interrupted: bool = False) -> int:
    """Prints a study for people or machines, and returns the exit code it amounts to."""
    from tuner import conclusion

    code = conclusion.exit_code(report.ranking, interrupted=interrupted)
    if json:
        print_json(conclusion.document(report, interrupted=interrupted))
    else:
        from tuner.report.tables import build_table, render_rich

        out().print(render_rich(build_table(report)))
    why = conclusion.why_nothing(report.ranking)
    if why is not None and not interrupted:
        err().print(f"pipetune: {why}", markup=False, soft_wrap=True)
    return code


def study_at(place: str) -> Path:
    """A study's folder by its path, or by its name under `results/`."""
    folder = Path(place)
    named = Path("results") / place
    return named if not folder.exists() and named.exists() else folder


def _fit_prompts(resolved: Resolved) -> Resolved:
    """A file with fewer prompts than the default number is used whole."""
    workload = resolved.config.workload
    if workload.prompts_file is None or not resolved.is_default("workload", "num_prompts"):
        return resolved
    try:
        text = Path(workload.prompts_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        # Whoever reads it next says what is wrong with it.
        return resolved
    count = sum(bool(line.strip()) for line in text.splitlines())
    if not 0 < count < workload.num_prompts:
        return resolved
    return _with(resolved, ("workload", "num_prompts"), count, f"{workload.prompts_file}: all its prompts")


def _with(resolved: Resolved, path: KeyPath, value: object, source: str) -> Resolved:
    from pydantic import ValidationError

    from bench.errors import ConfigError
    from tuner.config import TuneConfig
    from tuner.settings import Resolved

    values = resolved.config.model_dump(mode="json")
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        config: TuneConfig = TuneConfig.model_validate(values)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{'.'.join(path)} ({source}): {message}") from None
    return Resolved(config=config, sources={**resolved.sources, path: source}, warnings=resolved.warnings)
