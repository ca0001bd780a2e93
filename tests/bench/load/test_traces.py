"""Traces in each form that is read, and what is damaged named by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipetune.bench.errors import ConfigError
from pipetune.bench.load.traces import Arrival, read_trace

MOONCAKE = (
    '{"timestamp": 27000, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
    '{"timestamp": 30000, "input_length": 64, "output_length": 5, "hash_ids": []}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,0,1087,Conversation log\n"
    "118,GPT-4,417,276,693,API log\n"
)
PROMPTS = (
    '{"timestamp": 0, "prompt": "Hello", "output_length": 3}\n\n{"timestamp": 1500.5, "prompt_token_ids": [1, 2]}\n'
)


@pytest.mark.parametrize(
    ("text", "rows", "failed"),
    [
        (MOONCAKE, [(1, 0.0, 6955, 52, None), (2, 3.0, 64, 5, None)], 0),
        (AZURE, [(2, 0.0, 374, 44, None), (3, 4.314579, 396, 109, None)], 0),
        (BURSTGPT, [(2, 0.0, 472, 18, None), (4, 113.0, 417, 276, None)], 1),
        (PROMPTS, [(1, 0.0, None, 3, "Hello"), (3, 1.5005, None, None, [1, 2])], 0),
    ],
)
def test_known_forms(
    tmp_path: Path, text: str, rows: list[tuple[int, float, object, object, object]], failed: int
) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    trace = read_trace(path)
    assert trace.failed == failed
    assert [one._replace(at_s=round(one.at_s, 5)) for one in trace.arrivals] == [
        Arrival(f"{path}:{line}", round(at_s, 5), *rest)  # type: ignore[arg-type]
        for line, at_s, *rest in rows
    ]


def test_times_are_scaled_and_rows_limited(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(MOONCAKE)
    assert [one.at_s for one in read_trace(path, time_scale=0.5).arrivals] == [0.0, 1.5]
    assert len(read_trace(path, limit=1).arrivals) == 1
    with pytest.raises(ConfigError, match="time_scale=0: must be a number above 0"):
        read_trace(path, time_scale=0)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "trace: holds no request"),
        ("hello\n", "trace:1: neither JSON nor a known CSV"),
        ("a,b\n1,2\n", "trace:1: neither JSON nor a known CSV"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "trace: holds no request"),
        ('{"input_length": 5, "output_length": 5}\n', "trace:1: has no timestamp"),
        ('{"timestamp": "x", "input_length": 5, "output_length": 5}\n', "trace:1: timestamp='x' is no time"),
        ('{"timestamp": true, "input_length": 5, "output_length": 5}\n', "trace:1: timestamp=True is no time"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 5}\n', "trace:1: timestamp=nan is no time"),
        ('{"timestamp": 1, "input_length": -5, "output_length": 5}\n', "trace:1: input_length=-5: must be"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 0}\n', "trace:1: output_length=0: must be"),
        ('{"timestamp": 1, "input_length": 5}\n', "trace:1: output_length=None: must be"),
        ('{"timestamp": 1, "prompt": ["a", "b"]}\n', "trace:1: 2 prompts; a request has one"),
        ('{"timestamp": 1, "conversations": [{"from": "gpt", "value": "x"}]}\n', "trace:1: 0 prompts"),
        (
            MOONCAKE + '{"timestamp": 29000, "input_length": 5, "output_length": 5}\n',
            "trace:3: its time lies 1 s before",
        ),
        (AZURE + "2023-11-16 18:15:51,x,5\n", "trace:4: ContextTokens='x': must be"),
        (AZURE + "yesterday,5,5\n", "trace:4: TIMESTAMP='yesterday' is no time"),
        (AZURE + "2023-11-16 18:15:51\n", "trace:4: ContextTokens='': must be"),
        (BURSTGPT + "119,GPT-4,0,276,693,API log\n", "trace:5: Request tokens='0': must be"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_trace(tmp_path / "trace")
