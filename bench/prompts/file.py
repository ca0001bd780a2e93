"""The file that prompts are given in: its text, whatever wrote it; and a copy that stands in for a pipe."""

import hashlib
import json
import stat
from functools import cache
from pathlib import Path
from typing import Any

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import cache_root, write_durably
from pipetune.bench.prompts.forms import Request, requests_of
from pipetune.bench.spec import Workload

_PIPE = "-"


def read_text(path: str | Path) -> str:
    """The text, with plain newlines and without a byte order mark, which editors and systems change as they like.
    ConfigError for a file that cannot be read, or holds no text."""
    try:
        with open(0 if path == _PIPE else path, "rb", closefd=path != _PIPE) as file:
            data = file.read()
        text = data.decode(json.detect_encoding(data))
    except UnicodeError as error:
        raise _unreadable(
            path, f"no UTF-8 text ({error}); is it compressed? Then unpack it: --prompts <(zcat FILE)"
        ) from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def sha256_of(text: str) -> str:
    """What tells one file's text from another's."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def rereadable(given: str) -> str:
    """A path that each process can read as often as it likes: the given one, or a copy of what a pipe gives once. `-`
    is what comes in. ConfigError where it cannot be read, or not be kept."""
    path = Path(given)
    try:
        mode = path.stat().st_mode if given != _PIPE else stat.S_IFIFO
    except (OSError, ValueError) as error:
        raise _unreadable(given, error) from None
    if stat.S_ISREG(mode):
        # What a number of this process stands for is another file in others.
        return str(path.resolve()) if given.startswith(("/dev/", "/proc/")) else given
    if stat.S_ISCHR(mode):
        raise _unreadable(given, "a device has no end; give a file, or - for what comes in")
    text = read_text(given)
    if not text.strip():
        raise ConfigError(f"{given}: holds no prompt; did what was to write it fail?")
    copy = cache_root() / "prompts" / f"{sha256_of(text)[:16]}.jsonl"
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_durably(copy, text)
    except OSError as error:
        raise ConfigError(f"{copy}: cannot keep the prompts of {given}: {error.strerror or error}") from None
    return str(copy)


def _unreadable(path: str | Path, why: Exception | str) -> ConfigError:
    return ConfigError(f"{path}: cannot read the prompts: {getattr(why, 'strerror', None) or why}")


def read_requests(path: str | Path) -> list[tuple[str, Request]]:
    """Requests and their places, from a JSON object a line, or from one JSON array of them.

    Only a newline ends a line: other separators may stand within a string. ConfigError for a file that cannot be read,
    holds something else, or holds no prompt.
    """
    text = read_text(path)
    whole = _parsed(text)
    if isinstance(whole, list):
        values = [(f"{path}[{index}]", value) for index, value in enumerate(whole)]
    else:
        lines = [(f"{path}:{number}", line.strip("\ufeff \t")) for number, line in enumerate(text.split("\n"), start=1)]
        values = [(place, _parsed(line, place)) for place, line in lines if line.strip()]
    if not (found := [(place, request) for place, value in values for request in requests_of(value, place)]):
        raise ConfigError(f"{path}: holds no prompt; write one JSON object a line")
    return found


def output_lens(workload: Workload, requests: list[tuple[str, Request]]) -> tuple[int, ...] | None:
    """Tokens to generate for each prompt of a workload; None where the file says nothing else than the workload.
    ConfigError where it says it for texts that are scored."""
    used = requests[: workload.num_prompts]
    if workload.kind == "score":
        if place := next((place for place, request in used if request.output_len is not None), None):
            raise ConfigError(f"{place}: nothing is generated where texts are scored; take the output's length out")
        return None
    lens = tuple(request.output_len or workload.output_len for _, request in used)
    return lens if set(lens) != {workload.output_len} else None


def _parsed(text: str, place: str | None = None) -> Any:
    """A JSON value; None for what is none, where no place is given to complain of."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if place is None:
            return None
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ConfigError(f'{place}: not JSON: {why}; write {{"prompt": "text"}}') from None
