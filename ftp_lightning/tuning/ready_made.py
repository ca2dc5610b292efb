"""From the folder of a tuning to a ready-made pruner of this package.

python -m ftp_lightning.tuning.ready_made runs/tune smollm2-135m-instruct "100 instructions of Stanford Alpaca"
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ftp_lightning.disk import ready
from ftp_lightning.errors import UserError
from ftp_lightning.json_file import read_json
from ftp_lightning.models import title
from ftp_lightning.products import read_provenance
from ftp_lightning.pruning import TokenPruner

LARGEST = 5_000_000
"""Bytes that a ready-made pruner may have."""
_LARGEST_RECORD = 64_000_000
_SHOWN = ("keep", "recipe", "chosen", "confirmed", "held_out", "curve", "prompts", "sentences")


def make_ready(folder: str | Path, name: str, prompts: str) -> Path:
    """Copy the pruner that `tune` wrote into the package, with a card of what it measured. Returns its new folder.

    Args:
        folder: of a finished tuning of model `name`.
        prompts: what the prompts were, in words.

    Raises:
        UserError: a tuning of another model, one that is not finished, or a pruner of more than `LARGEST` bytes.
    """
    folder = Path(folder).expanduser()
    record = read_provenance(folder) or {}
    if record.get("stage") != "tune":
        raise UserError(f"{folder} holds no finished tuning\nGive the folder that `ftp-lightning tune` wrote.")
    found: Any = read_json(folder / "tune.json", _LARGEST_RECORD)
    pruner = TokenPruner.load(folder / "pruned")
    base = (pruner._base or {}).get("base")
    if base != name:
        raise UserError(f"{folder} is a tuning of {base}, not of {name}\nGive its own name.")
    size = sum(file.stat().st_size for file in (folder / "pruned").iterdir())
    if size > LARGEST:
        raise UserError(f"the pruner has {size:,} bytes, a ready-made one at most {LARGEST:,}\nLower its rank.")
    target = ready.READY / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / "pruned", target)
    origin = {"made_from": record["parts"]["model"] if " " in record["parts"]["model"] else title(name)}
    card = {"name": name, **origin, "measured_on": prompts} | {key: found[key] for key in _SHOWN} | {"bytes": size}
    (target / ready.CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return target


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print("three arguments are needed: FOLDER NAME PROMPTS, as in\n" + (__doc__ or "").strip(), file=sys.stderr)
        return 2
    try:
        print(make_ready(*arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
