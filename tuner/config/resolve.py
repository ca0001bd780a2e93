"""Settings of a command: all sources merged, devices made concrete, prompts counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipetune.bench.errors import ConfigError, explain
from pipetune.bench.fleet.fleet import available_devices
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import check_metrics
from pipetune.tuner.config.settings import KeyPath
from pipetune.tuner.config.sources import Resolved


def given(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a command's parameters; those that were not given are left out."""
    return {
        name: list(value) if isinstance(value, (list, tuple)) else value
        for name, value in params.items()
        if name in sources.settings() and value is not None and value not in ([], ())
    }


def resolve_settings(
    params: Mapping[str, Any],
    *,
    recorded: Path | None = None,
    below: Mapping[KeyPath, object] | None = None,
    below_name: str = "",
    warn: Callable[[str], None],
) -> Resolved:
    """Settings from all sources, with devices made concrete and the number of prompts fitted to their file.

    Raises:
        ConfigError: see `sources.resolve`; or objectives and constraints that the workload cannot serve.
    """
    resolved = sources.resolve(
        file=params.get("config"), flags=given(params), recorded=recorded, below=below, below_name=below_name
    )
    for warning in resolved.warnings:
        warn(warning)
    resolved = _fit_prompts(resolved)
    if resolved.config.devices == "auto":
        space = resolved.config.space
        most = space.max_stages and space.max_stages * max(space.replicas or (1,))
        devices = available_devices()[:most]
        resolved = _with(resolved, ("devices",), list(devices), "auto")
    check_metrics(resolved.config)
    return resolved


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
    values = resolved.config.model_dump(mode="json")
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        config = type(resolved.config).model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{'.'.join(path)} ({source}): {explain(error)}") from None
    return Resolved(config=config, sources={**resolved.sources, path: source}, warnings=resolved.warnings)
