"""A checkpoint folder: is it whole, and what is the hash of its content. Reads files alone, loads no weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipetune.bench.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FULL_HASH_BYTES = 2 * 2**30
"""Weights up to this size are hashed whole, which takes about a second a gigabyte at most."""

_DESCRIBING = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        ModelError: it is missing or is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"model.name: {folder} holds no config.json; give the folder of a checkpoint") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return config


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that `from_pretrained` would read, checked to be there and not cut short.

    Raises:
        ModelError: the weights are missing, in another format, or damaged.
    """
    named = read_config(folder).get("transformers_weights")
    candidates = [str(named)] if named else [SINGLE, INDEX]
    found = next((name for name in candidates if (folder / name).is_file()), None)
    if found is not None and found.endswith(".index.json"):
        index = folder / found
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: is no safetensors index: {error!r}") from error
    elif found is not None:
        names = [found]
    else:
        raise ModelError(f"model.name: {folder} holds no {candidates[0]}{_why_not(folder)}")
    files = tuple(folder / name for name in names)
    for file in files:
        _read_header(file)
    return files


def refuse_adapter(folder: Path) -> None:
    """Refuses a LoRA adapter, alone or beside weights: transformers would load another model than the folder's.

    Raises:
        ModelError: says how to merge it.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model.name: {folder} is a LoRA adapter (adapter_config.json); merge it into its base model with "
            "`PeftModel.from_pretrained(base, …).merge_and_unload().save_pretrained(…)` and give the result"
        )


def content_revision(folder: Path, weights: tuple[Path, ...]) -> str:
    """A hash that changes with what a run would read from this folder.

    Config and tokenizer files count whole. So do weights of up to 2 GiB together (`sha256:…`). Of larger ones
    (`quick:…`) names, sizes, times of change and headers count: enough to notice a changed checkpoint, but a copy
    with new times gets another revision.

    Args:
        weights: the files to include; none for dummy weights.
    """
    digest = hashlib.sha256()
    for name in (*_DESCRIBING, *_TOKENIZER):
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    whole = sum(file.stat().st_size for file in weights) <= FULL_HASH_BYTES
    for file in weights:
        digest.update(f"{file.name}\0".encode())
        if whole:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            status = file.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode() + _read_header(file))
    return f"{'sha256' if whole else 'quick'}:{digest.hexdigest()[:16]}"


def _read_header(file: Path) -> bytes:
    """A safetensors file's header; compares the sizes it tells with the file's own."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length) if length < size else b""
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}; the checkpoint is incomplete") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{file}: is no safetensors file; a Git LFS pointer or a broken download?") from error
    if 8 + length + end != size:
        raise ModelError(f"{file}: has {size} bytes and should have {8 + length + end}; download it again")
    return header


def _why_not(folder: Path) -> str:
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if others:
        return (
            f", but {others[0]}: pipetune reads safetensors only, since pickles can run code; "
            "convert it with `AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)` if you trust it"
        )
    return "; for random weights from its config.json alone say --load-format dummy"
