"""Forms that a prompt is given in: JSON of pipetune, vLLM, OpenAI and ShareGPT, and what Python code passes."""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from pipetune.bench.errors import ConfigError

Prompts = str | Sequence[int] | Sequence[str | Sequence[int]]
"""One prompt as text or token ids, or several; arrays and tensors of ids will do."""

_FORMS = '{"prompt": "text"}, {"prompt_token_ids": [1, 2]}, {"messages": […]} or {"conversations": […]}'
_LENGTH = re.compile(r"(?i:lens?|lengths?|tokens|toks|predict|output|\b[io]sl)(?![a-z]|_penalty)")
_OUTPUT_LENGTH = re.compile(r"max(_new|_completion|_output)?_tokens|output_(len|length|tokens)|nu?m?_predict")


class Chat(NamedTuple):
    """Messages that the model's chat template makes a prompt of, and what it is given besides."""

    messages: list[dict[str, Any]]
    options: dict[str, Any]


Prompt = str | list[int] | Chat
"""One prompt before it is tokenized."""


class Request(NamedTuple):
    """A prompt, and how many tokens its line wants generated; None where it does not say."""

    prompt: Prompt
    output_len: int | None


def requests_of(value: Any, place: str) -> list[Request]:
    """Requests of one JSON value: none for a conversation in which no human speaks, as vLLM leaves it out. ConfigError
    for another form, a length that is none of an output, or half a character."""
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: a {type(value).__name__} is no prompt; write {_FORMS}")
    output_len = None
    for key, length in _lengths(value):
        if not _OUTPUT_LENGTH.fullmatch(key):
            raise ConfigError(f"{place}: {key}={length}: no length of an output; take it out, or name it output_tokens")
        if not re.fullmatch(r"[1-9]\d{0,8}", str(length)):
            raise ConfigError(f"{place}: {key}={length}: must be a whole number of tokens, at least 1")
        if output_len not in (None, int(length)):
            raise ConfigError(f"{place}: {key}={length}, and another key says {output_len}; leave one of them")
        output_len = int(length)
    # A line of OpenAI's batches holds the request as its body.
    body = value["body"] if isinstance(value.get("body"), dict) else value
    given: Any = next((body[key] for key in ("prompt", "prompt_token_ids", "messages") if body.get(key)), None)
    turns = body.get("conversations")
    if given is None and isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        human = [turn for turn in turns if turn.get("from", turn.get("role")) in ("human", "user")]
        given = [text for turn in human if (text := turn.get("value", turn.get("content")))][:1]
    several = isinstance(given, list) and all(isinstance(one, (str, list)) for one in given)
    return [Request(_prompt(one, body, place), output_len) for one in (given if several else [given])]


def _prompt(given: Any, body: Mapping[str, Any], place: str) -> Prompt:
    if given and isinstance(given, str):
        return whole(given, place)
    if given and isinstance(given, list) and all(type(token) is int for token in given):
        return list(given)
    if given and isinstance(given, list) and all(isinstance(message, dict) for message in given):
        messages = [_message(message, f"{place}: messages[{index}]") for index, message in enumerate(given)]
        options = body.get("chat_template_kwargs")
        known = ("tools", "add_generation_prompt", "continue_final_message")
        given_too = {key: body[key] for key in known if key in body}
        return Chat(messages, given_too | (options if isinstance(options, dict) else {}))
    raise ConfigError(f"{place}: no text, token ids or messages in {', '.join(body) or 'it'}; write {_FORMS}")


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    """A message whose content is one text: parts are put together, as vLLM does for templates that take text."""
    content = message.get("content")
    if isinstance(content, list):
        content = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "\n".join(content) if all(isinstance(part, str) for part in content) else content
    if not isinstance(content, str) and (content is not None or "tool_calls" not in message):
        raise ConfigError(f"{place}.content: must be text; images and sounds cannot be given")
    return {**message, "content": content and whole(content, place)}


def _lengths(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys that look like lengths, with numbers, wherever they stand outside of lists."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _lengths(inner)
        elif _LENGTH.search(key) and re.fullmatch(r"-?\d+(\.\d+)?", str(inner)):
            yield key, inner


def whole(text: str, place: str) -> str:
    """The text, unless it holds half a character, which no tokenizer takes and a `ConfigError` names."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!a} at character {error.start + 1}"
        raise ConfigError(f"{place}: {half} is a lone surrogate, half a character; write the whole one") from None
    return text


def prompts_of_call(given: Any) -> list[str | list[int]]:
    """Prompts as Python code passes them; one alone is one, whether as text or as ids. TypeError for anything else,
    such as a batch of a tokenizer or messages of a chat; ConfigError for half a character."""
    listed = _listed(given, "prompts")
    if isinstance(listed, str) or (listed and all(type(one) is int for one in listed)):
        listed = [listed]
    places = [f"prompts[{index}]" for index in range(len(listed))]
    prompts = [_listed(one, place) for one, place in zip(listed, places, strict=True)]
    for prompt, place in zip(prompts, places, strict=True):
        if isinstance(prompt, str):
            whole(prompt, place)
        elif other := [token for token in prompt if type(token) is not int]:
            raise _not_a_prompt(place, other[0])
    return prompts


def _listed(given: Any, place: str) -> Any:
    """A string, or a list of what arrays, tensors, tuples and generators hold; whole numbers as Python's."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, str):
        return str(given)
    if isinstance(given, (Mapping, Set, bytes, bytearray)) or not hasattr(given, "__iter__"):
        raise _not_a_prompt(place, given)
    return [one.tolist() if getattr(one, "shape", None) == () else one for one in given]


def _not_a_prompt(place: str, found: object) -> TypeError:
    return TypeError(
        f"{place}: a {type(found).__name__}; give strings, or lists of token ids, as tokenizer(texts).input_ids "
        "are (not padded), or tokenizer.apply_chat_template(messages, return_dict=False) for a chat"
    )
