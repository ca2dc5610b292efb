"""Make docs/pictures/try.svg, what `ftp-lightning try` prints: python docs/try_picture.py [--pairs N]."""

import argparse
from pathlib import Path

from rich.console import Console

from ftp_lightning.cli.coloured import print_continued
from ftp_lightning.stages.first_look import REAL, TryStage
from ftp_lightning.stages.inputs import load_model

PICTURE = Path(__file__).parent / "pictures" / "try.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="timings, dense and pruned in turn")
    settings = TryStage(model=REAL, pairs=parser.parse_args().pairs)
    console = Console(record=True, width=118, force_terminal=True, color_system="truecolor", highlight=False)
    print_continued(settings.continued(*load_model(settings)), REAL, console)
    PICTURE.parent.mkdir(exist_ok=True)
    console.save_svg(str(PICTURE), title=f"ftp-lightning try --model {REAL}")


if __name__ == "__main__":
    main()
