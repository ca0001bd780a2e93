"""Pages of studies, comparisons and histories in a real browser: a phone, paper, and people who use no mouse."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipetune.tuner.cli import run
from tests.browser import CHROMIUM, NO_CHROMIUM, Browser, axe_source
from tests.study_factory import make_log, make_profile, write_study

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]
PHONE, DESK = 390, 1280
BESIDE_THE_PAGE = """
[...document.querySelectorAll("body *")]
    .filter(one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .filter(one => !one.closest(".scroll, pre, figure.wide"))
    .map(one => one.outerHTML.slice(0, 200))
"""
VIOLATIONS = "axe.run().then(found => found.violations.map(one => `${one.id}: ${one.nodes[0].html.slice(0, 200)}`))"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    one = write_study(folder / "one", log=make_log(), profile=make_profile())
    other = shutil.copytree(one, folder / "other")
    assert run(["report", str(one), "--compare", str(other)]) == 0
    assert run(["compare", str(one), str(other), "-o", str(folder / "compared")]) == 0
    assert run(["history", str(folder), "-o", str(folder / "trend")]) == 0
    return {path.stem: path for path in folder.glob("*/*.html")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.mark.parametrize("name", ["report", "compare", "history"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows_and_nothing_is_complained_of(
    pages: dict[str, Path], browser: Browser, name: str, width: int, dark: bool
) -> None:
    browser.show(pages[name], width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(BESIDE_THE_PAGE) == []
    assert browser.complaints == []


@pytest.mark.parametrize("name", ["report", "compare", "history"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(pages: dict[str, Path], browser: Browser, name: str, width: int, dark: bool) -> None:
    if (source := axe_source()) is None:
        pytest.skip("no axe-core here: `npm install axe-core` in the checkout, or AXE_CORE names its axe.min.js")
    browser.show(pages[name], width, dark=dark)
    browser.evaluate(f"{source}; 0")
    assert browser.evaluate(VIOLATIONS) == []


def test_a_phone_shows_what_a_plan_gains_beside_the_plan(pages: dict[str, Path], browser: Browser) -> None:
    browser.show(pages["report"], PHONE)
    table = "[...document.querySelectorAll('table')].find(one => one.caption?.textContent.startsWith('Finals')).rows[0]"
    heads = browser.evaluate(f"[...{table}.cells].slice(0, 4).map(one => one.textContent)")
    assert heads == ["#", "plan", "tok/s", "×"]
    assert browser.evaluate(f"{table}.cells[2].getBoundingClientRect().right < innerWidth")


@pytest.mark.parametrize("name", ["report", "compare", "history"])
def test_paper_keeps_colours_and_cuts_nothing(pages: dict[str, Path], browser: Browser, name: str) -> None:
    browser.show(pages[name], 720, dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print")
    paper = browser.evaluate("getComputedStyle(document.body).getPropertyValue('--paper')")
    assert paper.strip() == "#ffffff"
    assert browser.evaluate("getComputedStyle(document.querySelector('section')).printColorAdjust") == "exact"
    assert browser.evaluate(BESIDE_THE_PAGE.replace(".scroll, pre, figure.wide", "none")) == []
    printed = base64.b64decode(browser.call("Page.printToPDF")["data"])
    assert printed.startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="")
