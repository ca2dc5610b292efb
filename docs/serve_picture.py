"""The picture of the server's page, docs/pictures/serve.png: a long prompt on a real model, as it is measured.

    python docs/serve_picture.py [--tokens 4000] [--budget 0.33] [--output docs/pictures/serve.png]

It serves the ready-made pruner of SmolLM2 (`make models`), and asks it in Chromium by `docs/screenshots.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from screenshots import Browser, find_browser

from ftp_lightning.data.sources import load_documents
from ftp_lightning.models import load_tokenizer

MODEL = "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--budget", type=float, default=0.33)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pictures/serve.png")
    asked = parser.parse_args()
    tokenizer = load_tokenizer(MODEL)
    ids = tokenizer.encode(" ".join(load_documents("embedded", "test")), verbose=False)
    prompt = json.dumps(tokenizer.decode(ids[: asked.tokens]))
    command = [sys.executable, "-m", "ftp_lightning", "serve", "--port", "0", "--pruned", MODEL]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    program = find_browser()
    assert program is not None, "no Chromium is installed"
    try:
        url = next(server.stdout or iter([])).split()[1]
        with Browser(program) as browser:
            browser.dress("light")
            browser.ask("Page.navigate", url=url)
            browser.wait_for("Page.loadEventFired")
            fill = f"at('prompt').value = {prompt}; at('budget').value = {asked.budget}; show()"
            for script in (fill, "both()", "scrollTo(0, 0)"):
                browser.ask("Runtime.evaluate", expression=script, awaitPromise=True)
            asked.output.write_bytes(browser.picture())
            print(browser.run("[...document.querySelectorAll('.first')].map(one => one.textContent).join('; ')"))
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
