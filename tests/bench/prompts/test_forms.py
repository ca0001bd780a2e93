"""Every form of a prompt is read as what is meant, or refused by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from pipetune.bench.errors import ConfigError
from pipetune.bench.prompts.forms import Chat, prompts_of_call, requests_of

USER = {"role": "user", "content": "Hello"}
BODY = {"model": "m", "messages": [USER], "max_tokens": 4, "temperature": 0.5}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
TURNS = [{"from": "system", "value": "s"}, {"from": "human", "value": "first"}, {"from": "human", "value": "second"}]


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ({"prompt": "text", "prompt_token_ids": [1]}, ["text"]),
        ({"prompt_token_ids": [1, 2]}, [[1, 2]]),
        ({"prompt": "text", "output_tokens": 4}, ["text"]),
        ({"prompt": [1, 2]}, [[1, 2]]),
        ({"prompt": ["a", "b"]}, ["a", "b"]),
        ({"prompt": [[1], [2, 3]]}, [[1], [2, 3]]),
        ({"messages": [USER]}, [Chat([USER], {})]),
        ({"prompt": [USER], "chosen": "x"}, [Chat([USER], {})]),
        ({"messages": [PARTS]}, [Chat([{"role": "user", "content": "a\nb"}], {})]),
        (
            {"messages": [USER], "tools": [{}], "chat_template_kwargs": {"x": 1}},
            [Chat([USER], {"tools": [{}], "x": 1})],
        ),
        ({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": BODY}, [Chat([USER], {})]),
        ({"id": "x", "conversations": TURNS}, ["first"]),
        ({"conversations": [{"role": "user", "content": "first"}]}, ["first"]),
        ({"conversations": [{"from": "gpt", "value": "alone"}]}, []),
        ({"prompt": "text", "max_tokens": None, "length_penalty": 1.0, "skip_special_tokens": True}, ["text"]),
    ],
)
def test_forms_that_are_read(value: dict[str, Any], prompts: list[object]) -> None:
    assert [request.prompt for request in requests_of(value, "p:1")] == prompts


@pytest.mark.parametrize(
    "given",
    [
        *({"prompt": "text", key: 7} for key in ("max_tokens", "output_len", "output_length", "num_predict")),
        {"prompt": "text", "output_tokens": "7"},
        {"prompt": "text", "sampling_params": {"max_tokens": 7, "max_new_tokens": 7}},
        {"body": {**BODY, "max_tokens": 7}},
    ],
)
def test_a_line_may_say_how_many_tokens_it_wants(given: dict[str, Any]) -> None:
    assert [request.output_len for request in requests_of(given, "p:1")] == [7]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "a str is no prompt"),
        ({}, "messages in it"),
        ({"text": "Hello", "id": 1}, "messages in text, id"),
        ({"prompt": ""}, "messages in prompt"),
        ({"prompt": ["a", 1]}, "no text, token ids or messages in prompt"),
        ({"prompt": [True]}, "no text, token ids or messages in prompt"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\].content: must be text"),
        ({"conversations": ["Hello"]}, "messages in conversations"),
        ({"prompt": "\ud83d"}, r"'\\ud83d' at character 1 is a lone surrogate"),
        ({"messages": [{"role": "user", "content": "a\udc00"}]}, "at character 2 is a lone surrogate"),
        *(
            ({"prompt": "text", key: 5}, f"{key}=5: no length of an output; take it out, or name it output_tokens")
            for key in ("outputLength", "min_new_tokens", "prompt_len", "input_length", "OSL")
        ),
        ({"prompt": "text", "output_tokens": 0}, "output_tokens=0: must be a whole number of tokens, at least 1"),
        ({"prompt": "text", "output_tokens": -3}, "output_tokens=-3: must be a whole number"),
        ({"prompt": "text", "output_tokens": 2.5}, "output_tokens=2.5: must be a whole number"),
        ({"prompt": "text", "output_tokens": 5, "max_tokens": 6}, "max_tokens=6, and another key says 5"),
    ],
)
def test_forms_that_are_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        requests_of(value, "p:1")
    assert str(caught.value).startswith("p:1: ")


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("Hello", ["Hello"]),
        (["a", (1, 2)], ["a", [1, 2]]),
        ([1, 2], [[1, 2]]),
        ([np.int64(1), torch.tensor(2)], [[1, 2]]),
        (range(3), [[0, 1, 2]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([torch.tensor([1]), np.array([2, 3])], [[1], [2, 3]]),
        (np.array(["a", "b"]), ["a", "b"]),
        (iter(["a", "b"]), ["a", "b"]),
        ([], []),
    ],
)
def test_prompts_of_a_call(given: Any, prompts: list[object]) -> None:
    assert prompts_of_call(given) == prompts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "prompts: a NoneType"),
        (5, "prompts: a int"),
        (b"Hello", "prompts: a bytes"),
        ({"a", "b"}, "prompts: a set"),
        (BatchEncoding({"input_ids": [[1]]}), "prompts: a BatchEncoding.*input_ids"),
        ([USER], r"prompts\[0\]: a dict.*apply_chat_template"),
        (torch.tensor([0.5]), r"prompts\[0\]: a float"),
        ([True, False], r"prompts\[0\]: a bool"),
        (["a", 1], r"prompts\[1\]: a int"),
        ([["a", "b"]], r"prompts\[0\]: a str"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"prompts\[0\]: a list"),
    ],
)
def test_calls_with_something_else(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        prompts_of_call(given)


def test_half_a_character_in_a_call_is_the_users() -> None:
    with pytest.raises(ConfigError, match=r"prompts\[1\].*lone surrogate"):
        prompts_of_call(["a", "\ud83d"])
