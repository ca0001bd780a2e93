"""From a model's name to a local folder with everything that is needed, and to a revision that pins its content."""

import contextlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipetune.bench.errors import ModelError
from pipetune.bench.models import checkpoint, smollm2
from pipetune.bench.models.folders import HUB_FOLDER, cached_snapshot
from pipetune.bench.models.gguf import find_gguf, gguf_folder, gguf_revision
from pipetune.bench.spec import ModelSpec, Value

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CONFIG_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class ResolvedModel(Value):
    """A model that was found: everything a worker needs to build it, without asking anyone again."""

    spec: ModelSpec
    """With `revision` filled in."""
    folder: Path
    """Holds `config.json`, and the weights and the tokenizer where there are any."""
    architecture: str
    """The class that `AutoModelForCausalLM` builds, by name."""
    model_type: str
    checkpoint_bytes: int | None = None
    """Size of the weight files."""
    untied: tuple[str, ...] = ()
    """Weights that the config ties to others, while the checkpoint holds other values for both."""
    embedding_in_head: bool = False
    """The checkpoint holds the embedding under the name of the head that is tied to it."""


def resolve_model(spec: ModelSpec, *, on_progress: Callable[[str], None] | None = None) -> ResolvedModel:
    """Finds a model: a local folder or GGUF file, `smollm2-135m`, or a Hugging Face id in the local cache or else on
    the hub. A GGUF is converted once, into the user's cache.

    The revision is the commit for models of the hub, else a hash of the content (see `content_revision`).
    If the spec has one already, exactly that is demanded. `on_progress` is told, in words, what takes long.

    ModelError for no such model, files that are incomplete or of the wrong kind, and what is not a causal LM.
    """
    say = on_progress or (lambda message: None)
    folder, revision = _locate(spec, say)
    checkpoint.refuse_adapter(folder)
    config = checkpoint.read_config(folder)
    architecture = _architecture(spec, config)
    if method := checkpoint.quantization_method(folder, config):
        if spec.load_format != "dummy":
            raise ModelError(f"model.name: {spec.name!r} is quantized ({method}); {checkpoint.UNQUANTIZED}")
        say(f"{spec.name} is quantized ({method}); sizes and times are those of unquantized {spec.kept_dtype} weights")
    weights = () if spec.load_format == "dummy" else checkpoint.weight_files(folder)
    if weights == (folder / checkpoint.SINGLE,) and (folder / checkpoint.INDEX).is_file():
        say(f"{folder}: {checkpoint.SINGLE} is read, as transformers does; {checkpoint.INDEX} and its shards are not")
    stored = checkpoint.stored_dtype(config, weights)
    if spec.dtype == "auto":
        say(f"{spec.name} is computed in {stored}, as its checkpoint is kept")
        spec = spec.model_copy(update={"dtype": stored})
    elif stored != "float32" and "dtype" not in spec.model_fields_set:
        say(f"{spec.name} is kept in {stored}: in float32, the default, it takes twice the memory; dtype auto keeps it")
    if revision is None:
        revision = checkpoint.content_revision(folder, weights)
        _demand_revision(spec, folder, revision)
    return ResolvedModel(
        spec=spec.model_copy(update={"revision": revision}),
        folder=folder,
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        checkpoint_bytes=sum(file.stat().st_size for file in weights) if weights else None,
    )


def _locate(spec: ModelSpec, say: Callable[[str], None]) -> tuple[Path, str | None]:
    """Folder and, where it is known without reading the files, revision."""
    name = spec.name
    if name == smollm2.ALIAS:
        return _locate_smollm2(spec, say)
    path = Path(name).expanduser()
    gguf = find_gguf(path)
    # Dummy weights need no more than a config; the one beside the file is as good.
    if gguf is not None and not (spec.load_format == "dummy" and (path / "config.json").is_file()):
        revision = gguf_revision(gguf)
        _demand_revision(spec, gguf, revision)
        return gguf_folder(gguf, revision, say, weights=spec.load_format != "dummy"), revision
    if HUB_FOLDER.fullmatch(path.name) and (path / "snapshots").is_dir():
        folder = cached_snapshot(path.resolve(), spec.revision, _wholeness(spec), say)
        return folder, folder.name
    if path.is_dir():
        return path.resolve(), None
    if path.is_file():
        raise ModelError(f"model.name: {name!r} is a file; give the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(name):
        remedy = f"give a folder, an id such as Qwen/Qwen3-0.6B, or {smollm2.ALIAS}"
        raise ModelError(f"model.name: {name!r} is no folder here and no Hugging Face id; {remedy}")
    folder = _from_cache(name, spec) or _from_hub(name, spec, say)
    return folder, folder.name


def _wholeness(spec: ModelSpec) -> Callable[[Path], bool]:
    return partial(checkpoint.is_whole, weights=spec.load_format != "dummy")


def _demand_revision(spec: ModelSpec, place: Path, revision: str) -> None:
    if spec.revision not in (None, revision):
        why = "its files were changed since: bring the old ones back, or start anew without a revision"
        raise ModelError(f"model.revision: {place} now holds {revision} and {spec.revision} is asked for; {why}")


def _locate_smollm2(spec: ModelSpec, say: Callable[[str], None]) -> tuple[Path, str | None]:
    cached = None if spec.revision == smollm2.REVISION else _from_cache(smollm2.HUB_ID, spec)
    if cached is None and spec.revision in (None, smollm2.REVISION):
        return smollm2.smollm2_folder(say), smollm2.REVISION
    folder = cached or _from_hub(smollm2.HUB_ID, spec, say)
    return folder, folder.name


def _patterns(spec: ModelSpec) -> dict[str, Any]:
    files = [*_CONFIG_FILES]
    if spec.load_format != "dummy":
        files.append("*.safetensors")
    if spec.trust_remote_code:
        files.append("*.py")
    # Folders inside hold other formats of the same weights; `consolidated` files are such a format, too.
    return {"allow_patterns": files, "ignore_patterns": ["*/*", "consolidated*"]}


def _from_cache(hub_id: str, spec: ModelSpec) -> Path | None:
    """The snapshot in the local Hugging Face cache, if it is there and whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, revision=spec.revision, local_files_only=True, **_patterns(spec)))
    except HFValidationError as error:
        raise ModelError(f"model.name: {hub_id!r} is no folder here and no Hugging Face id: {error}") from error
    except LocalEntryNotFoundError:
        return None
    # Snapshots that were fetched in part, for example for a tokenizer alone, look like others.
    return folder if _wholeness(spec)(folder) else None


def _from_hub(hub_id: str, spec: ModelSpec, say: Callable[[str], None]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    say(f"{hub_id}: fetching from the Hugging Face hub")
    where = f"model.name: {hub_id!r}"
    try:
        folder = Path(snapshot_download(hub_id, revision=spec.revision, **_patterns(spec)))
    except GatedRepoError as error:
        raise ModelError(f"{where} is gated; accept its terms on the hub and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{where} is neither a folder here nor a model on the hub (private ones need a login)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision: {spec.revision!r} is no revision of {hub_id}") from error
    # No network, no such host, a proxy, a full disk: the errors come from several libraries and share no class.
    except Exception as error:
        repository = Path(constants.HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}")
        with contextlib.suppress(ModelError):
            return cached_snapshot(repository, spec.revision, _wholeness(spec), say)
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ModelError(
            f"{where} is neither a folder here nor whole in the local Hugging Face cache, and the hub did not give it "
            f"({reason}); check the name, fetch it where there is a network with `hf download {hub_id}`, "
            f"give a folder, or take {smollm2.ALIAS}"
        ) from error
    assert _COMMIT.fullmatch(folder.name), f"{folder} is not named after a commit"
    checkpoint.refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{where} holds no config.json; of a repository of GGUF files fetch one with `hf download {hub_id} FILE` "
            "and give its path; in place of one in a format of its own (params.json) take the one for transformers"
        )
    return folder


def _architecture(spec: ModelSpec, config: dict[str, Any]) -> str:
    """The class name, after checks that need no more than the config's own words."""
    from pipetune.bench.models.hf_private import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    own_code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if own_code and spec.trust_remote_code:
        return str(own_code).rpartition(".")[2]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    if known is None and own_code:
        why = "brings code of its own; if you trust it, say --trust-remote-code"
        raise ModelError(f"model.name: {spec.name!r} (model_type {model_type!r}) {why}")
    if known is None:
        why = "which is no causal language model that the installed transformers knows"
        raise ModelError(f"model.name: {spec.name!r} has model_type {model_type!r}, {why}")
    return known if isinstance(known, str) else str(known[0])
