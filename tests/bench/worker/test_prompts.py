"""Chat messages become ids by the model's template, and say what they need; damaged files of text are named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipetune.bench.errors import ConfigError, ModelError
from pipetune.bench.spec import Workload
from pipetune.bench.worker.prompts import check_text_files, load_prompts

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ message.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
)


def load(folder: Path, role: str, template: str | None) -> tuple[tuple[int, ...], ...]:
    path = folder / "p.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": "ab"}]}))
    tokenizer = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate("<>!ab")}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    fast.chat_template = template
    workload = Workload(prompts_file=str(path), num_prompts=1)
    return load_prompts(workload, tokenizer=fast, vocab_size=5, max_positions=None)


def test_messages_by_the_models_template(tmp_path: Path) -> None:
    assert load(tmp_path, "user", TEMPLATE) == ((0, 3, 4, 1, 2),)


@pytest.mark.parametrize(
    ("role", "template", "message"),
    [("user", None, ":1: messages need a chat template"), ("system", TEMPLATE, ":1: .*does not take.*no system")],
)
def test_messages_without_a_template_that_takes_them(
    tmp_path: Path, role: str, template: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, role, template)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate("ab")}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)  # type: ignore[no-untyped-call]
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    return folder


DAMAGED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("damage", ["empty", "cut", "list", "bytes", "folder", "pipe", "dangling"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_beside_the_weights_is_named(original: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    check_text_files(folder)
    path = folder / name
    text = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "dangling":
        path.symlink_to("nowhere")
    else:
        path.write_bytes({"empty": b"", "cut": text[:9], "list": b"[1]", "bytes": b"\xff\xfe{}"}[damage])
    if name.endswith(".jinja") and damage in ("empty", "cut", "list"):
        # Any text may be a template; what does not take messages is named with them.
        check_text_files(folder)
        return
    with pytest.raises(ModelError, match=f"{name}: cannot be read: "):
        check_text_files(folder)


@pytest.mark.parametrize("values", [{"eos_token_id": "</s>"}, {"eos_token_id": [1, "2"]}, {"max_new_tokens": "many"}])
def test_a_generation_config_of_wrong_types_is_named(original: Path, tmp_path: Path, values: dict[str, object]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"generation_config\.json: "):
        check_text_files(folder)
