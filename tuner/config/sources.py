"""Where settings come from: flags over environment over file over defaults, each value with its source."""

import contextlib
import difflib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipetune.bench.errors import ConfigError, explain
from pipetune.bench.load.traces import read_trace
from pipetune.bench.prompts.file import output_lens, read_requests, rereadable
from pipetune.bench.spec import SMOLLM2, Goodput, ModelSpec, device_kind
from pipetune.tuner.config.schema import GPU_DEFAULTS, TuneConfig, check_metrics, in_task
from pipetune.tuner.config.settings import ENVIRONMENT_PREFIX, KeyPath, Setting, leaves_of, section_of, settings_of

_COMMAND_LINE_ONLY = ("model", "trust_remote_code")
_MAX_PROBLEMS = 5

Below = tuple[Mapping[KeyPath, object], str]
"""Values, and the name of what they come from."""


def settings() -> dict[str, Setting]:
    """Settings of `TuneConfig` that have a flag and an environment variable, by name."""
    return settings_of(TuneConfig)


@dataclass(frozen=True)
class Resolved:
    """A config with the source of every value: `flag --seed`, `PIPETUNE_SEED`, `tune.yaml:3`, `default`."""

    config: TuneConfig
    sources: Mapping[KeyPath, str]
    warnings: tuple[str, ...] = ()

    def source(self, *path: str) -> str:
        """Where the value of a key comes from."""
        return self.sources.get(path, "default")


@dataclass
class _Layers:
    """Values merged so far; a later layer overwrites leaves of an earlier one."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[KeyPath, str] = field(default_factory=dict)

    def put(self, path: KeyPath, value: Any, source: str) -> None:
        """Sets the value of a key, over what an earlier layer said."""
        inner = self.values
        for key in path[:-1]:
            if inner.get(key) is None:
                # Left open so far, as by `sampling: null`.
                inner[key] = {}
            inner = inner[key]
        inner[path[-1]] = value
        self.sources[path] = source

    def put_file(self, path: Path) -> None:
        """Sets what a YAML file says."""
        for key, value, place in _read_yaml(path):
            self.put(key, value, place)

    def config(self, *, elsewhere: str = "") -> TuneConfig:
        """The config that the values make; `elsewhere` is the place of a key that nothing set."""
        try:
            return TuneConfig.model_validate(self.values)
        except ValidationError as error:
            raise ConfigError(_explain(error, self.sources, elsewhere=elsewhere)) from None

    def drop(self, section: str, source: str) -> None:
        """Forgets what one source said of a section."""
        for path in [path for path, place in self.sources.items() if path[0] == section and place == source]:
            del self.sources[path]
            inner = self.values
            for key in path[:-1]:
                inner = inner[key]
            del inner[path[-1]]


def resolve(
    *,
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
    recorded: Path | None = None,
    below: Below = ({}, ""),
) -> Resolved:
    """Merges all sources into one config; ConfigError names key and place of a file that cannot be read, an unknown
    key, or a value that does not fit. Flags go by the names of `settings`, None being not given, and before the user's
    YAML file; below that lie `recorded`, the `study.yaml` of a study that is resumed, and `below`, such as values of a
    plan file."""
    layers = _Layers()
    if recorded is not None:
        layers.put_file(recorded)
    values, below_name = below
    for key, value in values.items():
        layers.put(key, value, below_name)
    warnings = _put_given(layers, file, flags or {}, environ)
    if layers.sources.get(("model", "name")) != below_name:
        # Another model is meant than the one that the plan file knows: its revision and the like do not go with it.
        layers.drop("model", below_name)
    source = layers.sources.get(_COMMAND_LINE_ONLY, "")
    if source and not source.startswith("--") and layers.values["model"]["trust_remote_code"] is not False:
        raise ConfigError(
            f"{source}: model.trust_remote_code runs code from the model's folder; "
            "it must be given on the command line, as --trust-remote-code"
        )
    if "name" not in layers.values.get("model", {}):
        raise ConfigError("model.name: no model is given; use --model ID_OR_FOLDER, or model: {name: …} in a --config")
    config = layers.config()
    config = config.model_copy(update={"model": _from_anywhere(config.model)})
    return Resolved(config=config, sources=layers.sources, warnings=tuple(warnings))


def _from_anywhere(model: ModelSpec) -> ModelSpec:
    """The model by a name that means it from any directory: a folder's or file's full path, its last link kept."""
    path = Path(model.name).expanduser()
    if path.is_absolute() or model.name == SMOLLM2 or not path.exists():
        return model
    place = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    return model.model_copy(update={"name": str(place)})


def given(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a command's parameters; those that were not given are left out."""
    return {
        name: list(value) if isinstance(value, (list, tuple)) else value
        for name, value in params.items()
        if name in settings() and value is not None and value not in ([], ())
    }


def resolve_settings(
    params: Mapping[str, Any],
    *,
    recorded: Path | None = None,
    below: Below = ({}, ""),
    reads_trace: bool = False,
    warn: Callable[[str], None],
) -> Resolved:
    """Settings from all sources, with devices made concrete and the number of prompts fitted to their file. Where it
    `reads_trace`, recorded arrivals and lengths become the workload's. ConfigError as in `resolve`, and for prompts
    that cannot be read, or objectives and constraints that the workload cannot serve."""
    resolved = resolve(file=params.get("config"), flags=given(params), recorded=recorded, below=below)
    for warning in resolved.warnings:
        warn(warning)
    if resolved.config.devices == "auto":
        from pipetune.bench.fleet.fleet import available_devices

        space = resolved.config.space
        most = space.max_stages and space.max_stages * max(space.replicas or (1,))
        resolved = _with(resolved, {("devices",): list(available_devices()[:most])}, "auto")
    if all(device_kind(device) == "cuda" for device in resolved.config.concrete_devices):
        for path, value in GPU_DEFAULTS.items():
            if path not in resolved.sources:
                resolved = _with(resolved, {path: value}, "default on GPUs")
    if resolved.config.workload.arrivals is not None and "request_rate" not in params:
        raise ConfigError(
            "workload.arrivals: this command gives all prompts at once; `pipetune bench` measures under arrivals, "
            "and `pipetune plan` predicts them"
        )
    if reads_trace:
        resolved = _with_trace(resolved, warn)
        limited = [constraint.metric for constraint in resolved.config.constraints]
        if "max_request_rate" in (*resolved.config.objectives, *limited):
            resolved = with_rate_search(resolved, "max_request_rate")
    place = resolved.sources.get(("workload", "prompts_file"))
    if place is not None and "prompts" in params and not place.startswith(f"{recorded}:"):
        resolved = _with_prompts(resolved, place)
    check_metrics(resolved.config)
    return resolved


def with_rate_search(resolved: Resolved, source: str) -> Resolved:
    """Each measurement looks for the highest rate that is sustained."""
    return _with(resolved, {("workload", "arrivals", "slo_attainment"): resolved.config.slo_attainment}, source)


def _with_trace(resolved: Resolved, warn: Callable[[str], None]) -> Resolved:
    """The trace's times, lengths and prompts; all of them, unless a number is given."""
    workload = resolved.config.workload
    if (arrivals := workload.arrivals) is None or (path := arrivals.trace) is None:
        return resolved
    limit = workload.num_prompts if ("workload", "num_prompts") in resolved.sources else None
    rows, failed = read_trace(path, time_scale=arrivals.time_scale, limit=limit)
    if failed:
        warn(f"{path}: {failed} requests had failed when it was recorded, and are left out")
    values: dict[KeyPath, object] = {
        ("workload", "num_prompts"): len(rows),
        ("workload", "arrivals", "times_s"): [row.at_s for row in rows],
        ("workload", "output_lens"): [row.output_len or workload.output_len for row in rows],
    }
    if given := next((row for row in rows if row.prompt is not None), None):
        if lacking := next((row for row in rows if row.prompt is None), None):
            raise ConfigError(f"{lacking.place}: has no prompt, and {given.place} has one; give all of them, or none")
        values["workload", "prompts_file"] = path
    else:
        values["workload", "input_lens"] = [row.input_len for row in rows]
    return _with(resolved, values, path)


def _with_prompts(resolved: Resolved, place: str) -> Resolved:
    """Prompts that can be read again and are found right; few of them are all used, unless a number is given."""
    workload = resolved.config.workload
    if workload.prompts_file is None:
        return resolved
    path = rereadable(workload.prompts_file)
    resolved = _with(resolved, {("workload", "prompts_file"): path}, place)
    requests = read_requests(path)
    if len(requests) < workload.num_prompts and ("workload", "num_prompts") not in resolved.sources:
        resolved = _with(resolved, {("workload", "num_prompts"): len(requests)}, f"{path}: all its prompts")
    workload = resolved.config.workload
    if len(requests) >= workload.num_prompts and (lens := output_lens(workload, requests)) is not None:
        resolved = _with(resolved, {("workload", "output_lens"): lens}, path)
    return resolved


def _with(resolved: Resolved, values: Mapping[KeyPath, object], source: str) -> Resolved:
    layers = _Layers(resolved.config.model_dump(mode="json", exclude_unset=True), {**resolved.sources})
    for path, value in values.items():
        layers.put(path, value, source)
    try:
        config = TuneConfig.model_validate(layers.values)
    except ValidationError as error:
        raise ConfigError(f"{', '.join(map('.'.join, values))} ({source}): {explain(error)}") from None
    return Resolved(config=config, sources=layers.sources, warnings=resolved.warnings)


def place_of(params: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """`output_dir` and `name` as given, before anything else is known: a resume reads the rest from there; ConfigError
    for a file that cannot be read."""
    layers = _Layers()
    _put_given(layers, params.get("config"), given(params), os.environ)
    output_dir, name = layers.values.get("output_dir"), layers.values.get("name")
    try:
        return (in_task(str(output_dir)) if output_dir is not None else None, str(name) if name is not None else None)
    except ValueError as error:
        raise ConfigError(f"output_dir: {error}") from None


def show(resolved: Resolved) -> str:
    """The resolved config as YAML, with the source of each value behind it."""
    lines = []
    section: KeyPath = ()
    for path, value in leaves_of(shown_values(resolved.config)).items():
        above = path[:-1]
        shared = sum(itertools.takewhile(bool, (one == other for one, other in zip(above, section, strict=False))))
        lines += [(f"{'  ' * depth}{above[depth]}:", "") for depth in range(shared, len(above))]
        section = above
        lines.append((f"{'  ' * len(section)}{path[-1]}: {_brief(value)}", resolved.source(*path)))
    width = min(44, max(len(text) for text, _ in lines))
    return "".join(f"{text:<{width}}  # {source}\n" if source else f"{text}\n" for text, source in lines)


def shown_values(config: TuneConfig) -> dict[str, Any]:
    """All values as people may see them: a database's URL without its password."""
    values = config.model_dump(mode="json")
    if config.storage is not None:
        from pipetune.tuner.config.storage_url import shown

        values["storage"] = shown(config.storage)
    return values


def dump(config: TuneConfig) -> str:
    """The config as `study.yaml` holds it: no places (it may be moved), no URL (it may hold a password), no gate."""
    values = config.model_dump(mode="json", exclude={"name", "output_dir", "storage", "gate"})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load(path: Path) -> TuneConfig:
    """Reads a `study.yaml` back, as it was recorded; ConfigError where the file cannot be read or is no config."""
    layers = _Layers()
    layers.put_file(path)
    return layers.config(elsewhere=f"{path}: ")


def differences(before: BaseModel, now: BaseModel) -> list[str]:
    """`key: before → now` for every leaf in which two values of one kind differ; keys are dotted."""
    old, new = leaves_of(before.model_dump(mode="json")), leaves_of(now.model_dump(mode="json"))
    return [
        f"{'.'.join(key)}: {_brief(old.get(key))} → {_brief(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _brief(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _put_given(
    layers: _Layers, file: Path | None, flags: Mapping[str, object], environ: Mapping[str, str]
) -> list[str]:
    if file is not None:
        layers.put_file(file)
    known = {name.upper(): setting for name, setting in settings().items()}
    warnings = []
    for variable in sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX)):
        tail = variable.removeprefix(ENVIRONMENT_PREFIX)
        if tail in known:
            for key in known[tail].paths:
                layers.put(key, environ[variable], variable)
        elif near := difflib.get_close_matches(tail, known, n=1, cutoff=0.85):
            warnings.append(f"{variable} is not read; did you mean {ENVIRONMENT_PREFIX}{near[0]}?")
    for name, value in flags.items():
        if value is not None:
            setting = settings()[name]
            for key in setting.paths:
                layers.put(key, value, setting.option)
    return warnings


_SURE_DEPTH = 2000


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """The text's tree and its values, by libyaml, which is quick; the other parser tells better what is wrong. libyaml
    ends the process on what is nested too deeply, which takes as many brackets, or a line as long."""
    deepest = text.count("[") + text.count("{") + max(map(len, text.splitlines()), default=0)
    with contextlib.suppress(yaml.YAMLError, ValueError, AttributeError):
        if deepest < _SURE_DEPTH:
            return yaml.compose(text, Loader=yaml.CSafeLoader), yaml.load(text, Loader=yaml.CSafeLoader)
    return yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)


def _read_yaml(path: Path) -> Iterator[tuple[KeyPath, Any, str]]:
    """Leaves of a YAML file, each with its place; refuses what no config has."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot read the config: {why}") from None
    try:
        node, values = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{place}: malformed YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: malformed YAML: {error}") from None
    if node is None:
        return
    yield from _walk(path, node, values, TuneConfig, ())


def _walk(
    path: Path, node: yaml.Node, values: Any, model: type[BaseModel], above: KeyPath
) -> Iterator[tuple[KeyPath, Any, str]]:
    place = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        what = ".".join(above) or "the config"
        raise ConfigError(f"{place}: {what} must be a mapping of keys to values, not {values!r}")
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = key_node.value
        place = f"{path}:{key_node.start_mark.line + 1}"
        dotted = ".".join((*above, str(key)))
        if not isinstance(key, str) or key not in model.model_fields:
            raise ConfigError(f"{place}: unknown key {dotted!r}; {_nearest(str(key), model)}")
        if key in seen:
            raise ConfigError(f"{place}: {dotted} is given twice; keep one")
        seen.add(key)
        inner = section_of(model, key)
        if inner is None or (inner is Goodput and not isinstance(value_node, yaml.MappingNode)):
            # Limits have a short form: `ttft:500 tpot:50`.
            yield (*above, key), values[key], place
        elif values[key] is not None:
            yield from _walk(path, value_node, values[key], inner, (*above, key))


def _nearest(key: str, model: type[BaseModel]) -> str:
    if close := difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5):
        return f"did you mean {close[0]}?"
    for section in model.model_fields:
        if (inner := section_of(model, section)) is not None and key in inner.model_fields:
            return f"did you mean {section}.{key}?"
    return f"there are {', '.join(model.model_fields)}"


def _explain(error: ValidationError, sources: Mapping[KeyPath, str], *, elsewhere: str) -> str:
    """One line per problem: place (`elsewhere` for a key that nothing set), key, what is wrong, and the value."""
    lines = []
    for problem in error.errors(include_url=False)[:_MAX_PROBLEMS]:
        location = tuple(str(part) for part in problem["loc"] if not str(part).startswith("tuple["))
        path = location
        while path and path not in sources:
            path = path[:-1]
        key = ".".join(path or location)
        place = f"{sources[path]}: " if path else elsewhere
        message = problem["msg"].removeprefix("Value error, ").removeprefix(f"{key}: ")
        # A flag or a variable says which setting it is, a message may; a line of a file does not.
        named = place.startswith(("--", ENVIRONMENT_PREFIX)) or not key or message.startswith(f"{key}.")
        line = f"{place}{message}" if named else f"{place}{key}: {message}"
        given = problem["input"]
        if isinstance(given, (str, int, float)) and str(given) not in message:
            line += f" (given: {json.dumps(given, default=str, ensure_ascii=False)})"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)
