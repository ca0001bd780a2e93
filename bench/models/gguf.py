"""A GGUF file becomes an ordinary checkpoint folder, once: dequantised, saved as safetensors, kept in the cache."""

import dataclasses
import hashlib
import importlib.metadata
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from pipetune.bench.errors import ModelError
from pipetune.bench.files import CACHE_VARIABLE, build_once, cache_root
from pipetune.bench.models import checkpoint

CONVERSION = 1
"""Counts changes of `convert`: folders that an older one made are not used any more."""

_SPLIT_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")
_PLAIN_SPLITS = frozenset({None, "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"})
"""Byte-level pre-tokenizers (`tokenizer.ggml.pre`) that split text as GPT-2 does, which is what transformers makes."""
_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Those that take every digit for a piece of its own first; transformers does not know them."""
_UNREAD = {
    "context_length": "max_position_embeddings",
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Sizes that transformers leaves at its defaults for some architectures, and what its configs call them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a GGUF file says of itself, apart from its weights."""

    architecture: str
    kind: str
    """`model`, `adapter`, `mmproj` …"""
    num_splits: int
    has_tokenizer: bool
    pre_tokenizer: str | None
    sizes: dict[str, int]
    """By the config's names: those of `_UNREAD` that the file tells."""
    num_values: int
    """Numbers in all tensors together."""
    dtype: str
    """Holds every value exactly: float32 for quantised files, else what the file is written in."""


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a user's path means: the file itself, or the one in a folder without safetensors.

    Projectors of multimodal models (`mmproj`) do not count. Of a split file it is the first part. A folder with several
    is a ModelError.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if any((path / name).is_file() for name in (checkpoint.SINGLE, checkpoint.INDEX)):
        return None
    files = sorted(file for file in path.glob("*.gguf") if "mmproj" not in file.name.lower())
    stems = {match[1] if (match := _SPLIT_NAME.fullmatch(file.name)) else file.name for file in files}
    if len(stems) > 1:
        raise ModelError(
            f"model.name: {path} holds several GGUF files ({', '.join(file.name for file in files)}); "
            f"name the one to use, as in {files[0]}"
        )
    return files[0] if files else None


def gguf_revision(file: Path) -> str:
    """Changes with the file's content, and with what the conversion makes of it. Files of up to 2 GiB are hashed whole.
    Of larger ones size, time of change and the first MiB count."""
    digest = hashlib.sha256()
    status = file.stat()
    with file.open("rb") as stream:
        if status.st_size <= checkpoint.FULL_HASH_BYTES:
            digest = hashlib.file_digest(stream, "sha256")
        else:
            digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode() + stream.read(2**20))
    return f"gguf-{digest.hexdigest()[:12]}-{CONVERSION}"


def gguf_folder(file: Path, revision: str, say: Callable[[str], None], *, weights: bool = True) -> Path:
    """The converted checkpoint in the user's cache; a changed file, by its `gguf_revision`, is converted anew.

    Without weights it has config and tokenizer, which are enough for dummy ones. ModelError for a file that cannot be
    read or converted, and as `kept`.
    """
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", file.stem)[:64]
    stem += f"-{revision}{'' if weights else '-config'}"
    return kept(file.name, stem, lambda partial: convert(file, partial, say, weights=weights), say)


def kept(
    name: str, stem: str, build: Callable[[Path], None], say: Callable[[str], None], *, other: str = "another folder"
) -> Path:
    """A converted checkpoint in the user's cache, which `build` makes at the first call in the folder it is given.
    ModelError where the cache cannot be written; it says to name an `other` one."""
    folder = cache_root() / "models" / stem
    try:
        return build_once(folder, build, on_wait=lambda: say(f"{name}: another process is converting it; waiting"))
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"model.name: {name} cannot be kept under {folder.parent}: {error}; name {other} in {CACHE_VARIABLE}"
        ) from error


def convert(
    file: Path, folder: Path, say: Callable[[str], None], *, weights: bool = True, name: str | None = None
) -> None:
    """Writes config, weights and tokenizer of a GGUF file into an empty folder, as a checkpoint.

    Values are exact: quantised ones become float32, others keep their dtype. The config calls the model by `name`, or
    else as the file is called. ModelError where transformers cannot read the file, or does not find all weights in it.
    """
    header = read_header(file)
    _check(file, header)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    from pipetune.bench.models.layers import check_family

    place: dict[str, Any] = {"gguf_file": file.name}
    with _explained(file, header):
        config: Any = AutoConfig.from_pretrained(file.parent, **place)
    check_family(config.model_type)
    for key, size in header.sizes.items():
        if hasattr(config, key):
            setattr(config, key, size)
    config.name_or_path = name or file.name
    if not weights:
        config.save_pretrained(folder)
    else:
        size = header.num_values * getattr(torch, header.dtype).itemsize
        _need_room(file, folder, size)
        say(f"{file.name}: converting to safetensors, once: {size / 2**30:.1f} GiB in {header.dtype}")
        loader: Any = AutoModelForCausalLM
        model: Any
        with _explained(file, header):
            model, info = loader.from_pretrained(
                file.parent,
                **place,
                config=config,
                dtype=getattr(torch, header.dtype),
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"{file}: transformers finds no values for {len(missing)} weights of {type(model).__name__}, "
                f"{missing[0]} first; give the safetensors checkpoint that the file was made from"
            )
        if (unused := header.num_values - model.num_parameters()) > 0:
            say(f"{file.name}: transformers made no use of {unused} of its {header.num_values} values")
        # It is an ordinary checkpoint now; these marks would make `save_pretrained` refuse it.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.name_or_path = name or file.name
        model.save_pretrained(folder)
    if header.has_tokenizer:
        _save_tokenizer(file, header, folder, config, say)


def read_header(file: Path) -> Header:
    """A file's metadata and its list of tensors, checked to be there; ModelError if it is no GGUF, or cut short."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)

        def value(key: str, default: Any) -> Any:
            return reader.fields[key].contents() if key in reader.fields else default

        architecture = str(value("general.architecture", ""))
        sizes = {name: value(f"{architecture}.{key}", None) for key, name in _UNREAD.items()}
        half = {tensor.tensor_type.name for tensor in reader.tensors} - {"F32"}
        return Header(
            architecture=architecture,
            kind=str(value("general.type", "model")),
            num_splits=int(value("split.count", 0)),
            has_tokenizer="tokenizer.ggml.model" in reader.fields,
            pre_tokenizer=value("tokenizer.ggml.pre", None),
            sizes={name: int(size) for name, size in sizes.items() if isinstance(size, int)},
            num_values=sum(int(tensor.n_elements) for tensor in reader.tensors),
            dtype={"F16": "float16", "BF16": "bfloat16"}.get(half.pop(), "float32") if len(half) == 1 else "float32",
        )
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from error
    # The reader trusts its input: what is damaged fails in numpy, in struct or in a decoder.
    except Exception as error:
        raise ModelError(
            f"{file}: is no GGUF file, or is cut short ({error}); a Git LFS pointer or a broken download?"
        ) from error


def _check(file: Path, header: Header) -> None:
    """Refuses what is no whole language model."""
    if header.num_splits > 1 or _SPLIT_NAME.fullmatch(file.name):
        raise ModelError(
            f"{file}: is one part of a split GGUF; join the parts with "
            f"`llama-gguf-split --merge {file.name} model.gguf` and name the result"
        )
    if header.kind == "adapter":
        raise ModelError(f"{file}: is a LoRA adapter; merge it into its base model with `llama-export-lora` first")
    if header.kind != "model" or header.architecture == "clip":
        what = header.kind if header.kind != "model" else header.architecture
        raise ModelError(f"{file}: holds a {what} and no language model")


def _need_room(file: Path, folder: Path, size: int) -> None:
    """Refuses before the work what would end in a full disk or a killed process."""
    free, available = shutil.disk_usage(folder).free, psutil.virtual_memory().available
    takes = f"{file}: its conversion takes {size / 2**30:.1f} GiB"
    if free < size:
        remedy = f"name a folder with more room in {CACHE_VARIABLE}"
        raise ModelError(f"{takes} and {folder.parent} has {free / 2**30:.1f}; {remedy}")
    if available < size:
        remedy = f"convert it on a larger machine and copy {CACHE_VARIABLE}, or give the safetensors checkpoint"
        raise ModelError(f"{takes} of memory and {available / 2**30:.1f} are available; {remedy}")


@contextmanager
def _explained(file: Path, header: Header) -> Iterator[None]:
    """What transformers says of a file that it cannot use, as a user's error."""
    try:
        yield
    # Wrong or new files fail in every way there is.
    except Exception as error:
        reason = f"{error}".strip().splitlines()
        raise ModelError(
            f"{file}: transformers {importlib.metadata.version('transformers')} cannot convert a GGUF of architecture "
            f"{header.architecture!r} ({reason[0] if reason else type(error).__name__}); "
            "give the safetensors checkpoint that it was made from"
        ) from error


def _save_tokenizer(file: Path, header: Header, folder: Path, config: Any, say: Callable[[str], None]) -> None:
    """Saves the tokenizer; a file whose tokenizer transformers cannot build is served with token ids alone."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        say(f"{file.name}: without a tokenizer, since transformers cannot build it ({error})")
        return
    backend = tokenizer.backend_tokenizer
    if header.pre_tokenizer in _DIGIT_SPLITS:
        # transformers would split as GPT-2 does and take two spaces before a number for other tokens.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and header.pre_tokenizer not in _PLAIN_SPLITS:
        say(f"{file.name}: text may be split otherwise than by {header.pre_tokenizer!r}, which transformers lacks")
    if getattr(config, "max_position_embeddings", None):
        tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
