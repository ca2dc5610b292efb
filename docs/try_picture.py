"""Make docs/pictures/try.png, what `ftp-lightning try --budget 0.2` prints, by a headless Chromium.

python docs/try_picture.py [--pairs N]
"""

import argparse
import re
from pathlib import Path

from rich.console import Console
from screenshots import shoot

from ftp_lightning.cli.coloured import print_continued
from ftp_lightning.stages.first_look import REAL, TryStage
from ftp_lightning.stages.inputs import load_model

BUDGET = 0.2
PICTURE = Path(__file__).parent / "pictures" / "try.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="timings, dense and pruned in turn")
    settings = TryStage(model=REAL, budget=BUDGET, pairs=parser.parse_args().pairs)
    console = Console(record=True, width=118, force_terminal=True, color_system="truecolor", highlight=False)
    print_continued(settings.continued(*load_model(settings)), REAL, settings._pruner_name(), console)
    svg = console.export_svg(title=f"ftp-lightning try --budget {BUDGET}")
    width, height = (round(float(size)) for size in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    shoot(svg, PICTURE, width, height)


if __name__ == "__main__":
    main()
