"""What methods are placed with, measured once on calibration text and kept in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftp_lightning.baselines.block_pruner import BlockPruner
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.lock import locked
from ftp_lightning.products import read_product
from ftp_lightning.schedule import Schedule
from ftp_lightning.stages.inputs import measured_rows
from ftp_lightning.stages.search import SearchStage
from ftp_lightning.stages.sensitivity import SensitivityStage
from ftp_lightning.studies.runner import is_finished
from ftp_lightning.whole_files import write_text

ORDER = "block_pruner.json"


def calibrated(
    loaded: tuple[Any, Any], folder: Path, peer_rows: int = 2, search: dict[str, Any] | None = None, **about: Any
) -> Setting:
    """The setting of one model: Block Influence, a searched schedule, calibration rows, BlockPruner's order so far.

    Args:
        loaded: model and tokenizer.
        folder: of what was found; finished parts are not done again, and several processes wait for each other.
        peer_rows: rows that BlockPruner removes parts on.
        search: settings of the search, see `SearchStage`.
        about: settings of both stages: model, data, split, seed ...
    """
    sensitivity = SensitivityStage(
        **about, levels=(0.6,), gradient=False, windows=8, output=str(folder / "sensitivity")
    )
    measured = str(folder / "sensitivity" / "sensitivity.json")
    own: dict[str, Any] = {"kv": "keep", "windows": 8, "generations": 6, "sensitivity": measured} | (search or {})
    searching = SearchStage(**about, **own, output=str(folder / "search"))
    for stage in (sensitivity, searching):
        with locked(stage.folder):
            if not is_finished(stage):
                stage.execute()
    influence = read_product(Path(measured).parent, Path(measured).name)["block_influence"]
    rows = measured_rows(searching, *loaded, peer_rows, 0.5)
    found = Setting(loaded[0], windows=rows, influence=tuple(influence))
    found.searched = Schedule.load(folder / "search" / "schedule.json")
    if (folder / ORDER).is_file():
        known = json.loads((folder / ORDER).read_text(encoding="utf-8"))
        found.memo[BlockPruner.ORDER] = [(block, part) for block, part in known]
    return found


def keep_order(setting: Setting, folder: Path) -> None:
    """Write the order in which BlockPruner has removed parts: it serves all cuts."""
    if order := setting.memo.get(BlockPruner.ORDER):
        write_text(folder / ORDER, json.dumps(order))
