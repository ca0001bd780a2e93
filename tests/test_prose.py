"""The checks of words, width and docstrings: what they find and what they leave."""

from __future__ import annotations

from tests.prose import WORDS, continued_docstrings, old_words, read_words, wide_lines, wrapped

LONG = "word " * 30


def test_old_words_are_found_as_whole_words_with_what_to_say() -> None:
    words = read_words("# a comment\n\nmoods? → drift\n")
    assert list(old_words("a.md", "the mood\nmoody\n", words)) == ["a.md:1: 'mood' is an old word; say 'drift'"]


def test_prose_is_narrow_and_tables_code_and_links_are_what_they_are() -> None:
    assert list(wide_lines("a.md", f"short\n{LONG}\n")) == [f"a.md:2: {len(LONG)} columns, at most 100"]
    assert not list(wide_lines("a.md", f"| {LONG} |\n```\n{LONG}\n```\n- [a](https://{'x' * 120})\n"))


def test_what_commands_write_is_wrapped_but_for_tables() -> None:
    text = f"| {LONG} |\n\n- {LONG}\n{LONG}"
    assert not list(wide_lines("a.md", wrapped(text)))
    assert wrapped(text).split() == text.split()
    assert wrapped(text).startswith(f"| {LONG} |\n\n- word")


def test_docstrings_of_fields_and_functions_stand_by_themselves() -> None:
    source = 'class A:\n    """Of one thing."""\n\n    x: int\n    """Of it."""\n\ndef f():\n    """Offers."""\n'
    assert len(list(continued_docstrings("a.py", source))) == 2


def test_the_list_is_well_formed() -> None:
    assert read_words(WORDS.read_text(encoding="utf-8"))
