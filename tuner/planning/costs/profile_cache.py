"""Profiles kept from command to command: measured once for a machine, a model and a grid, then read from the cache."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pipetune.bench.errors import ConfigError, explain
from pipetune.bench.files import CACHE_VARIABLE, cache_root, read_text, write_durably
from pipetune.bench.profile import PROFILE_METHOD, Profile, ProfileGrid
from pipetune.bench.spec import ModelSpec, SchemaVersion, Value, Workload, device_host, device_kind

if TYPE_CHECKING:
    from pipetune.bench.fleet.fleet import Fleet

MOST_ROWS = 8
"""Sizes of micro-batches that a grid has at most."""
MAX_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens of the largest task profiled, by kind of device: beyond it time grows as the tokens do."""


class ProfileKey(Value):
    """What a profile depends on: only one with an equal key may stand for a new one."""

    schema_version: SchemaVersion = 1
    method: int = PROFILE_METHOD
    hardware_id: str
    devices: tuple[str, ...]
    worker_env: dict[str, dict[str, str]]
    """Variables of single devices' workers, which may change what they compute with."""
    model: ModelSpec
    packed_weights: bool
    cuda_graphs: bool
    grid: ProfileGrid
    versions: dict[str, str]
    """Versions of pipetune and of the packages that compute."""


class KeptProfile(Value):
    """A file of the cache."""

    key: ProfileKey
    profile: Profile


def profile_for(
    fleet: "Fleet", grid: ProfileGrid, *, packed_weights: bool = True, cuda_graphs: bool = True, refresh: bool = False
) -> Profile:
    """The profile of a fleet's model on its devices: from the cache but to refresh it, or measured now and kept. One
    that something disturbed is not kept, so that the next command measures anew. With several hosts the links are
    measured each time: a cache does not know what lies between them. FleetError where the workers failed at it."""
    key = profile_key(fleet, grid, packed_weights=packed_weights, cuda_graphs=cuda_graphs)
    if not refresh and (kept := read_kept(key)) is not None:
        has_hosts = len(set(map(device_host, fleet.devices))) > 1
        return kept.model_copy(update={"links": fleet.time_links()}) if has_hosts else kept
    profile = fleet.profile(grid, packed_weights=packed_weights, cuda_graphs=cuda_graphs)
    if profile.disturbances:
        return profile.model_copy(
            update={"notes": (*profile.notes, f"doubtful, and not kept: {'; '.join(profile.disturbances)}")}
        )
    return keep(key, profile)


def profile_key(fleet: "Fleet", grid: ProfileGrid, *, packed_weights: bool, cuda_graphs: bool) -> ProfileKey:
    """What a profile of this fleet would depend on."""
    software = fleet.machine.software
    return ProfileKey(
        hardware_id=fleet.machine.hardware_id,
        devices=fleet.devices,
        worker_env=fleet.worker_env,
        model=_timed(fleet.model),
        packed_weights=packed_weights,
        cuda_graphs=cuda_graphs,
        grid=grid,
        versions={
            "pipetune": software.pipetune,
            **{name: software.packages.get(name, "") for name in ("torch", "transformers")},
        },
    )


def kept_folder() -> Path:
    """Where profiles are kept: in the user's cache for pipetune."""
    return cache_root() / "profiles"


def kept_path(key: ProfileKey) -> Path:
    """Where a profile is kept."""
    name = "".join(char if char.isalnum() or char in "._-" else "-" for char in Path(key.model.name).name)
    return kept_folder() / f"{name.lstrip('.')[:40]}-{key.digest(exclude_defaults=False)}.json"


def read_kept(key: ProfileKey) -> Profile | None:
    """The profile that is kept; None where there is none, or none that can be read: it is measured anew then."""
    kept = _read(kept_path(key))
    return kept.profile if kept is not None and kept.key == key else None


def find_profile(
    *, hardware_id: str, devices: Sequence[str], model: ModelSpec, packed_weights: bool, cuda_graphs: bool, scores: bool
) -> Profile | None:
    """The newest profile kept of a model (of this revision; dummy weights may be any) on these devices, whatever its
    grid and versions; None where there is none."""
    found = []
    for path in kept_folder().glob("*.json"):
        kept = _read(path)
        if kept is None or kept.key.worker_env or kept.key.method != PROFILE_METHOD:
            continue
        key = kept.key
        wanted = (hardware_id, tuple(devices), _timed(model), packed_weights, cuda_graphs, scores)
        if wanted == (key.hardware_id, key.devices, key.model, key.packed_weights, key.cuda_graphs, key.grid.scores):
            found.append(kept.profile)
    return max(found, key=lambda profile: profile.measured_at, default=None)


def read_profile(path: Path) -> Profile:
    """Reads a profile that `pipetune profile --json` wrote, or a file of the cache; ConfigError where it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        is_kept = isinstance(values, dict) and "profile" in values
        return Profile.model_validate(values["profile"] if is_kept else values)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the profile: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: no profile of this version ({explain(error)}); `pipetune profile --json` writes one"
        ) from None


def keep(key: ProfileKey, profile: Profile) -> Profile:
    """Keeps a profile; where that is not possible, it says so itself and is as good as any other."""
    path = kept_path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, KeptProfile(key=key, profile=profile).model_dump_json(indent=1) + "\n")
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None else str(error)
        note = f"not kept: {path.parent}: {reason}; {CACHE_VARIABLE} names another folder"
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return profile.model_copy(update={"notes": (*profile.notes, note)})
    return profile


def grid_for(
    workload: Workload,
    prompt_lens: Sequence[int],
    micro_batch_sizes: Iterable[int],
    prefill_sizes: Iterable[int],
    chunk_sizes: Iterable[int | None] = (),
    *,
    devices: Sequence[str] = (),
) -> ProfileGrid:
    """What predictions need of a workload's plans, which may have these sizes, and no more: with all prompts' tokens,
    chunks of tokens that may be prefilled together (None for whole prompts), and the fleet's devices, which decide how
    large a task may be."""
    longest, mean = max(prompt_lens), round(sum(prompt_lens) / len(prompt_lens))
    sizes = {min(size, len(prompt_lens)) for size in (*micro_batch_sizes, *prefill_sizes)}
    # A study's own largest task is worth timing, if it takes no more than twice as long as the largest that is enough.
    enough = most_tokens_on(devices)
    largest = max(sizes) * longest
    most_tokens = largest if enough < largest <= 2 * enough else enough
    chunks = sorted({size for size in chunk_sizes if size is not None and size < longest})
    lengths = sorted({min(length, most_tokens) for length in (mean, longest, *chunks)})
    # In a micro-batch of unlike prompts the longest one decides; short ones come together, at the end.
    if longest > 2 * min(prompt_lens):
        lengths = sorted({*lengths, min(prompt_lens)})
    return ProfileGrid(
        rows=spread(sorted(sizes), MOST_ROWS),
        lengths=tuple(lengths),
        pasts=tuple(sorted({mean, longest + workload.generated_len - 1})) if workload.generated_len > 1 else (),
        chunks=tuple((size, past) for size in chunks for past in sorted({size, (longest - 1) // size * size})),
        max_tokens=most_tokens,
        scores=workload.kind == "score",
        padded=len(set(prompt_lens)) > 1,
        # Draws of another seed take as long.
        sampling=None if workload.sampling is None else workload.sampling.model_copy(update={"seed": 0}),
    )


def most_tokens_on(devices: Sequence[str]) -> int:
    """Rows × tokens of the largest task to time on all of these devices."""
    return min((MAX_TOKENS[device_kind(device)] for device in devices), default=MAX_TOKENS["cpu"])


def _timed(model: ModelSpec) -> ModelSpec:
    """What of a model times depend on: which random weights it has, no kernel can tell."""
    return model.model_copy(update={"seed": 0}) if model.load_format == "dummy" else model


def _read(path: Path) -> KeptProfile | None:
    try:
        return KeptProfile.model_validate_json(read_text(path))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None


def spread(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many of some sorted sizes, the least and the largest among them, as evenly as their logarithms are."""
    chosen = list(sizes)
    while len(chosen) > most:
        gaps = [math.log(chosen[place + 1] / chosen[place - 1]) for place in range(1, len(chosen) - 1)]
        del chosen[1 + gaps.index(min(gaps))]
    return tuple(chosen)
