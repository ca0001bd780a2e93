"""Folders that are not the checkpoint asked for: what they hold, which checkpoint is near, and the way out."""

import re
from collections.abc import Callable
from pathlib import Path

from pipetune.bench.errors import ModelError

HUB_FOLDER = re.compile(r"models--(.+)")
_FOREIGN = {
    "adapter_config.json": "an adapter, which `merge_and_unload` joins with its model",
    "consolidated*.safetensors": "Mistral's own format",
    "consolidated*.pth": "Meta's own format",
    "*.distcp": "shards of a training run, which `accelerate merge-weights` joins",
    "zero_to_fp32.py": "shards of DeepSpeed, which its `--safe_serialization` joins",
    "latest_checkpointed_iteration.txt": "a checkpoint of Megatron",
    "*.onnx": "a model for ONNX",
    "model-*-of-*.safetensors": "shards without their index, model.safetensors.index.json",
    "*.safetensors": "weights of another name",
}
"""What a folder is, by a file in it; where several fit, the first."""


def what_is_there(folder: Path, is_whole: Callable[[Path], bool]) -> str:
    """What lies in or by a folder in place of a checkpoint in the form of transformers, and the way out; or nothing."""
    native = (folder / "params.json").is_file()
    if folder.parent.name == "snapshots" and HUB_FOLDER.fullmatch(folder.parent.parent.name) and not native:
        return f"; only a part of it was fetched: get the rest by `hf download {hub_id(folder.parent.parent)}`"
    children = _children(folder)
    if found := [child for child in children if (child / "config.json").is_file()]:
        whole = [child for child in found if is_whole(child)]
        named = f", the last {'whole ' if whole else ''}one of {len(found)}" if len(found) > 1 else ""
        return f"; give {(whole or found)[-1]}{named}"
    if (folder.parent / "config.json").is_file() and any(folder.parent.glob("model*.safetensors")):
        return f"; give {folder.parent}, which is a checkpoint"
    for pattern, what in _FOREIGN.items():
        if files := sorted(path.relative_to(folder) for place in (folder, *children) for path in place.glob(pattern)):
            beside = " and params.json" if native else ""
            return (
                f", but {files[0]}{beside}: {what}; give the model as `save_pretrained` writes it: config.json beside "
                "model.safetensors, or beside shards and their index"
            )
    models = [child.name for child in children if HUB_FOLDER.fullmatch(child.name)]
    return f", but {models[0]} and the like: a cache of the hub; give one of them, or an id" if models else ""


def hub_id(repository: Path) -> str:
    """The id of the model that a folder of the Hugging Face cache is of."""
    return repository.name.removeprefix("models--").replace("--", "/", 1)


def cached_snapshot(
    repository: Path, revision: str | None, is_whole: Callable[[Path], bool], say: Callable[[str], None]
) -> Path:
    """The snapshot of a revision in a folder of the Hugging Face cache: without one main's or, where the cache does not
    say which that is, the newest whole one; ModelError where there is none."""
    snapshots = [child for child in _children(repository / "snapshots", by_time=True) if is_whole(child)]
    ref = repository / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8", errors="replace").strip() if ref.is_file() else revision
    for snapshot in reversed(snapshots):
        if commit in (None, snapshot.name):
            if commit is None:
                say(f"{repository}: no snapshot is called main; {snapshot.name}, the newest whole one, is taken")
            return snapshot
    others = f", or say --revision {snapshots[-1].name}, which is whole" if snapshots else ""
    raise ModelError(
        f"model.name: {repository} holds no whole snapshot{f' of {commit}' if commit else ''}; get it by "
        f"`hf download {hub_id(repository)}`{others}"
    )


def _children(folder: Path, *, by_time: bool = False) -> list[Path]:
    """Folders in a folder, in the order of the numbers that they end in, or of their times of change."""

    def place(child: Path) -> tuple[float, str]:
        number = re.search(r"\d+$", child.name)
        return (child.stat().st_mtime if by_time else int(number[0]) if number else -1), child.name

    return sorted((child for child in folder.glob("*") if child.is_dir()), key=place)
