"""The pages in a real browser: the console is free of errors, nothing is wider than the window, the slider works."""

from pathlib import Path

import pytest
from made_up_run import BLOCKS, write_run
from made_up_study import write_study
from scripts import script

from ftp_lightning.report import build_comparison, build_report

screenshots = script("docs/screenshots.py")

pytestmark = pytest.mark.skipif(not screenshots.find_browser(), reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser():
    with screenshots.Browser(screenshots.find_browser()) as opened:
        yield opened


@pytest.mark.slow
def test_every_kind_of_page_is_free_of_complaints(browser, tmp_path: Path):
    first, second = (write_run(tmp_path / name) for name in ("first", "<script>alert(1)</script>".replace("/", "|")))
    study = build_report(write_study(tmp_path / "study"))
    pages = [build_report(first), study, build_comparison([first, second], tmp_path / "both")]
    for page in pages:
        assert screenshots.photograph(browser, page, page.parent.name, tmp_path) == []
    made = {f"{page.parent.name}-{kind}.png" for page in pages for kind in ("dark", "head", "light")}
    assert {path.name for path in tmp_path.glob("*.png")} == made | {"first-slider.png"}
    light, dark = ((tmp_path / f"first-{scheme}.png").read_bytes() for scheme in ("light", "dark"))
    assert light.startswith(b"\x89PNG") and light != dark


def test_the_slider_pales_what_its_block_skips(browser, tmp_path: Path):
    browser.open(build_report(write_run(tmp_path / "run", ("evaluate",))))
    for block in (1, BLOCKS):
        browser.run(f"s = document.getElementById('block'), s.value = {block}, s.dispatchEvent(new Event('input'))")
        pale = browser.run("document.querySelectorAll('#story-text .skip').length")
        skipped = f"[...document.querySelectorAll('#story-text span')].filter(w => w.dataset.keep[{block - 1}] == '0')"
        assert pale == browser.run(f"{skipped}.length")
    assert pale > 0


@pytest.mark.parametrize(
    "broken",
    ["<script>console.error('no')</script>", "<script>nothing()</script>", "<div style='width:3000px'>wide</div>",
     "<img src='missing.png'>"],
)  # fmt: skip
def test_a_broken_page_is_noticed(browser, tmp_path: Path, broken: str):
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><body>{broken}</body>")
    assert screenshots.photograph(browser, page, "page", tmp_path)
