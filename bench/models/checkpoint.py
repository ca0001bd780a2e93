"""A checkpoint folder: is it whole, and what is the hash of its content. Reads files alone, loads no weights."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from pipetune.bench.errors import ModelError
from pipetune.bench.models.folders import what_is_there
from pipetune.bench.spec import DTYPE_BYTES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FULL_HASH_BYTES = 2 * 2**30
"""Weights up to this size are hashed whole, which takes about a second a gigabyte at most."""

HASHED = (
    "config.json",
    "generation_config.json",
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
"""What beside weights a model's content is."""

UNQUANTIZED = "pipetune runs float32, bfloat16 and float16 checkpoints: choose the unquantized one"
"""What to do about a checkpoint of another kind."""
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization", "quant_config")
_METHOD_KEYS = ("quant_method", "quant_algo", "format", "qformat_weight", "version")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`; ModelError where it is missing or is no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        found = what_is_there(folder, is_whole) or "; give the folder of a checkpoint"
        raise ModelError(f"model.name: {folder} holds no config.json{found}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return config


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that `from_pretrained` would read; ModelError if missing, cut short or of another kind."""
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
    stored_tensors(files)
    return files


class StoredTensor(NamedTuple):
    """A weight in a checkpoint, by its header."""

    file: Path
    dtype: str
    """As safetensors calls it: `BF16`, `F8_E4M3` …"""
    shape: tuple[int, ...]


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All that safetensors files hold, by name; ModelError for one that cannot be read, is cut short or none at all."""
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    found[name] = StoredTensor(file, tensor.get_dtype(), tuple(tensor.get_shape()))
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error}; the checkpoint is incomplete") from error
        except SafetensorError as error:
            raise ModelError(
                f"{file}: is no whole safetensors file ({error}); a Git LFS pointer or broken download? Fetch it again"
            ) from error
    return found


def stored_dtype(config: dict[str, Any], weights: tuple[Path, ...]) -> str:
    """What `dtype="auto"` means to transformers: what the config says, else the first weight; float32 for others."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if named := part.get("dtype") or part.get("torch_dtype"):
            return str(named) if named in DTYPE_BYTES else "float32"
    first = next(iter(stored_tensors(weights[:1]).values()), None)
    return {"BF16": "bfloat16", "F16": "float16"}.get(first.dtype if first else "", "float32")


def quantization_method(folder: Path, config: dict[str, Any]) -> str | None:
    """How weights are quantized, as the config or a file beside it says; None where nothing says so."""
    sources: list[Any] = [config]
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "params.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        is_bare = name in ("quantize_config.json", "quant_config.json")
        sources.append({"quantization_config": found} if is_bare else found)
    for part in (part for source in sources for part in _parts(source)):
        for method in filter(None, map(part.get, _QUANTIZATION_KEYS)):
            named = map(method.get, _METHOD_KEYS) if isinstance(method, dict) else [method]
            return str(next(filter(None, named), "by an unknown method"))
    return None


def _parts(config: Any) -> Iterator[dict[str, Any]]:
    """A config and those inside of it."""
    if isinstance(config, dict):
        yield config
        for value in config.values():
            yield from _parts(value)


def is_whole(folder: Path, *, weights: bool = True) -> bool:
    """Whether a folder holds a checkpoint, which, fetched or saved in part, it may not."""
    try:
        read_config(folder)
        return not weights or bool(weight_files(folder))
    except ModelError:
        return False


def refuse_adapter(folder: Path) -> None:
    """Refuses, by a ModelError, a LoRA adapter, alone or beside weights: transformers would load another model."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model.name: {folder} is a LoRA adapter (adapter_config.json); merge it into its base model with "
            "`PeftModel.from_pretrained(base, …).merge_and_unload().save_pretrained(…)` and give the result"
        )


def content_revision(folder: Path, weights: tuple[Path, ...]) -> str:
    """A hash that changes with what a run would read from this folder, of which weights are none where they are dummy.

    Config and tokenizer files count whole. So do weights of up to 2 GiB together (`sha256:…`). Of larger ones
    (`quick:…`) names, sizes, times of change and headers count: enough to notice a changed checkpoint, but a copy
    with new times gets another revision.
    """
    digest = hashlib.sha256()
    for name in HASHED:
        if (path := folder / name).is_file():
            digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    whole = sum(file.stat().st_size for file in weights) <= FULL_HASH_BYTES
    for file in weights:
        digest.update(f"{file.name}\0".encode())
        with file.open("rb") as stream:
            if whole:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                status, header = file.stat(), stream.read(int.from_bytes(stream.read(8), "little"))
                digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode() + header)
    return f"{'sha256' if whole else 'quick'}:{digest.hexdigest()[:16]}"


def _why_not(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    others = [name for name in pickles if not name.startswith(("training_args", "optimizer", "scheduler", "rng_state"))]
    if others and not others[0].startswith("consolidated"):
        return (
            f", but {others[0]}: pipetune reads safetensors only, since pickles can run code; "
            "convert it with `AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)` if you trust it"
        )
    return what_is_there(folder, is_whole) or "; for random weights from its config.json alone say --load-format dummy"
