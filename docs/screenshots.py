"""Pictures of report pages in a real browser, light and dark, and whether its console is free of errors.

    python docs/screenshots.py PAGE NAME [PAGE NAME ...] [--output docs/pictures] [--browser chromium]

PAGE is a report.html, NAME the stem of its pictures: NAME-light.png and NAME-dark.png, the whole page at half size;
NAME-head.png, its beginning; and where the page has a slider over blocks NAME-slider.png, that part of it with one
block chosen. Exit status 1 where the console said something, or the page could be scrolled sideways. Chromium is driven
by its own protocol over a pipe: nothing else has to be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", "no-first-run", "disable-dev-shm-usage",
         "remote-debugging-pipe")  # fmt: skip
WIDTH, HEAD = 1280, 1420


def shoot(page: str, picture: Path, width: int, height: int) -> None:
    """A picture of a page's text, as HTML or SVG, of so many pixels."""
    program = find_browser()
    assert program is not None, "no Chromium is installed"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("page.svg" if page.lstrip().startswith("<svg") else "page.html")
        file.write_text(page, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"]
        subprocess.run([program, *flags, f"--screenshot={picture}", file.as_uri()], check=True, capture_output=True)


class Browser:
    """One tab of a headless Chromium. `complaints`: what the console was told as a warning or an error."""

    def __init__(self, program: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True)
        to_browser, self.write_to = os.pipe()
        self.read_from, from_browser = os.pipe()
        flags = [*FLAGS, f"user-data-dir={self.folder.name}"]
        command = [program, *(f"--{flag}" for flag in flags)]

        def connect() -> None:
            """Chromium reads its commands from descriptor 3 and answers on 4."""
            ends = os.dup(to_browser), os.dup(from_browser)  # so that neither lies under the other's new number
            os.dup2(ends[0], 3), os.dup2(ends[1], 4)

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=connect, **quiet)
        os.close(to_browser), os.close(from_browser)
        self.buffer, self.number, self.session, self.complaints = b"", 0, None, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait(10)
        os.close(self.write_to), os.close(self.read_from)
        self.folder.cleanup()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the DevTools protocol; RuntimeError where the browser refuses it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def receive(self) -> dict[str, Any]:
        """The next message, an answer or an event; complaints are remembered."""
        while b"\0" not in self.buffer:
            piece = os.read(self.read_from, 1 << 16)
            if not piece:
                raise RuntimeError("the browser has gone")
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        found = json.loads(message)
        if complaint := complaint_of(found.get("method", ""), found.get("params", {})):
            self.complaints.append(complaint)
        return found

    def wait_for(self, event: str) -> None:
        while self.receive().get("method") != event:
            pass

    def open(self, page: Path) -> None:
        self.ask("Page.navigate", url=page.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def dress(self, scheme: str, height: int = 900) -> None:
        """Light or dark, in a window WIDTH wide."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)

    def picture(self, selector: str = "html", scale: float = 1.0, most: float = 1e9) -> bytes:
        """The element as a PNG, `most` pixels of its height."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        script = f"(r => [r.x + scrollX, r.y + scrollY, r.width, r.height])({box})"
        x, y, width, height = self.run(script)
        clip = {"x": x, "y": y, "width": width, "height": min(height, most), "scale": scale}
        return b64decode(self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])


def complaint_of(event: str, found: dict[str, Any]) -> str | None:
    """What an event of the browser has against the page; None for others."""
    if event == "Runtime.exceptionThrown":
        return str(found["exceptionDetails"].get("exception", found["exceptionDetails"]))
    if event == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
        return " ".join(str(part.get("value", part.get("description"))) for part in found["args"])
    if event == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
        return found["entry"]["text"]
    return None


def photograph(browser: Browser, page: Path, name: str, folder: Path) -> list[str]:
    """Writes the pictures of one page. Returns what is wrong with it: the console's complaints, a page too wide."""
    browser.complaints.clear()
    browser.open(page)
    for scheme in ("light", "dark"):
        browser.dress(scheme)
        (folder / f"{name}-{scheme}.png").write_bytes(browser.picture(scale=0.5))
    browser.dress("light")
    (folder / f"{name}-head.png").write_bytes(browser.picture(most=HEAD))
    if browser.run("!!document.getElementById('block')"):
        said = browser.run(SLIDE)
        if not said.startswith("block "):
            browser.complaints.append(f"the slider says {said!r}")
        (folder / f"{name}-slider.png").write_bytes(browser.picture("#story"))
    wide = browser.run("document.documentElement.scrollWidth")
    return [*browser.complaints, *([f"the page is {wide} wide, the window {WIDTH}"] if wide > WIDTH else [])]


SLIDE = """(() => { const s = document.getElementById('block');
  const words = [...document.querySelectorAll('#story-text [data-keep]')].map(w => w.dataset.keep);
  const kept = [...words[0]].map((_, l) => words.filter(w => w[l] == '1').length / words.length);
  s.value = 1 + kept.indexOf(kept.reduce((a, b) => Math.abs(a - .5) < Math.abs(b - .5) ? a : b));
  s.dispatchEvent(new Event('input')); return document.getElementById('block-name').textContent; })()"""
"""Chooses the block that nearest to half of the tokens skip; returns what the slider says of it."""


def find_browser(given: str | None = None) -> str | None:
    """The program to drive: the one given, else the first of BROWSERS that is installed."""
    return next(filter(None, map(which, [given] if given else BROWSERS)), None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", metavar="PAGE NAME", help="report.html and the stem of its pictures")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument("--browser", help=f"program to drive; else the first there is of {', '.join(BROWSERS)}")
    given = parser.parse_args(arguments)
    program = find_browser(given.browser)
    if not program or len(given.pages) % 2:
        print("no browser was found: install chromium" if not program else "every PAGE needs a NAME", file=sys.stderr)
        return 2
    given.output.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with Browser(program) as browser:
        for page, name in zip(given.pages[::2], given.pages[1::2]):
            if not Path(page).is_file():
                print(f"there is no {page}", file=sys.stderr)
                return 2
            for complaint in photograph(browser, Path(page), name, given.output):
                wrong += 1
                print(f"{page}: {complaint}", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
