"""Make docs/pictures/readme.png: the first screens of README as a page shows it, by a headless Chromium.

python docs/readme_picture.py [--height 2600]
"""

import argparse
from pathlib import Path

from markdown import markdown
from screenshots import shoot

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "readme.png"
STYLE = """body {font: 16px/1.5 sans-serif; max-width: 830px; margin: 32px auto; color: #1f2328} img {max-width: 100%}
h1, h2 {border-bottom: 1px solid #d1d9e0; padding-bottom: .3em} code {background: #f0f1f3; font-size: 85%}
pre {background: #f6f8fa; padding: 14px; overflow: auto} pre code {background: none; padding: 0} a {color: #0969da}
table {border-collapse: collapse} td, th {border: 1px solid #d1d9e0; padding: 6px 13px}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=2600, help="pixels of the picture, from the top")
    body = markdown((ROOT / "README.md").read_text(encoding="utf-8"), extensions=["fenced_code", "tables"])
    page = f'<meta charset="utf-8"><base href="{ROOT.as_uri()}/"><style>{STYLE}</style>{body}'
    shoot(page, PICTURE, 900, parser.parse_args().height)


if __name__ == "__main__":
    main()
