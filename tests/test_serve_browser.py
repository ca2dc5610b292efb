"""The server's page in a real browser: two answers, coloured tokens, seconds to first token, and no complaint."""

from pathlib import Path

import pytest
from scripts import script
from served import address, embedded
from test_serve_answers import generated

screenshots = script("docs/screenshots.py")

pytestmark = pytest.mark.skipif(not screenshots.find_browser(), reason="no Chromium is installed")

ASK = """(async () => { document.getElementById('tokens').value = 8; await both();
  const said = id => document.querySelector(`#${id} .text`).textContent;
  const first = id => document.querySelector(`#${id} .first`).textContent;
  const spans = [...document.querySelectorAll('#map span')];
  return {dense: said('dense'), pruned: said('pruned'), first: [first('dense'), first('pruned')], tokens: spans.length,
    colours: new Set(spans.map(s => s.style.background)).size, prompt: document.getElementById('prompt').value}; })()"""


def run(browser, script: str):
    """The value of a promise in the page."""
    found = browser.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    return found["result"]["value"]


def test_the_page_shows_both_answers_and_colours_the_prompt():
    with address() as url, screenshots.Browser(screenshots.find_browser()) as browser:
        browser.ask("Page.navigate", url=url)
        browser.wait_for("Page.loadEventFired")
        found = run(browser, ASK)
        wide = browser.run("document.documentElement.scrollWidth > innerWidth")
    prompt = found["prompt"]
    assert found["dense"] == generated(prompt, 8) and found["pruned"] == generated(prompt, 8, pruned=True)
    assert all("s to first token" in said for said in found["first"]) and "% skipped" in found["first"][1]
    assert found["tokens"] == 1 + len(embedded()[1].encode(prompt, add_special_tokens=False)) and found["colours"] > 3
    assert not wide and browser.complaints == []


def test_the_page_says_what_the_server_refuses_and_sends_its_key():
    with address(key="secret-key") as url, screenshots.Browser(screenshots.find_browser()) as browser:
        browser.ask("Page.navigate", url=url)
        browser.wait_for("Page.loadEventFired")
        assert "Authorization" in run(browser, ASK)["dense"]
        browser.run("document.getElementById('key').value = 'secret-key'")
        assert run(browser, ASK)["dense"]


def test_the_page_is_small_and_loads_nothing_from_elsewhere():
    page = Path(screenshots.__file__).parents[1] / "ftp_lightning/serving/page.html"
    text = page.read_text()
    assert "://" not in text and len(text) < 12_000
