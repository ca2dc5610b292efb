"""docs/studies.md shows what the published studies say, row by row; and they are studies of today's sweep files."""

import json
import lzma
import runpy
from pathlib import Path

import pytest
import yaml

from ftp_lightning.evaluation.statistics import paired
from ftp_lightning.report.study import is_sure, read_study
from ftp_lightning.studies.study_table import table

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = sorted(path.parent for path in (ROOT / "experiments" / "found" / "studies").glob("*/study.json"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_page_shows_what_was_found(folder):
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8").splitlines()
    written = table(json.loads((folder / "study.json").read_text(encoding="utf-8"))).splitlines()
    rows = [line for line in written if line.startswith("| ") and "---" not in line]
    assert len(rows) > 2 and not [row for row in rows if row not in page]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_it_answers_the_question_of_its_file(folder):
    file = ROOT / "sweeps" / f"{folder.name}.yaml"
    study, parameters = read_study(folder), yaml.safe_load(file.read_text())["parameters"]
    assert file.read_text().startswith(f"# {study['question']}\n")
    assert all(row["seeds"] == parameters["seed"]["values"] for row in study["rows"])
    labels = [one["label"] for one in parameters.get("config", {}).get("values", [])]
    assert not labels or labels == [row["label"] for row in study["rows"]]


def test_every_study_is_published():
    grids = {path.stem for path in (ROOT / "sweeps").glob("*.yaml") if "method: grid" in path.read_text()}
    assert {folder.name for folder in PUBLISHED} == grids


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_intervals_hold_what_seeds_vary(folder):
    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    renewed = json.loads(json.dumps(study))
    assert runpy.run_path(str(ROOT / "experiments" / "recomputed.py"))["renew"](renewed) == []
    assert renewed["sentence"] == study["sentence"]
    claimed = [one["label"] for one in study["compared"] if is_sure(one["kl"]) or is_sure(one["kept"])]
    assert all(f"{label}: " in study["sentence"] for label in claimed)


ROUTERS = [
    ("keep", 0.22, "projected"), ("keep", 0.3, "projected"), ("keep", 0.4, "projected, from static"),
    ("keep", 0.6, "projected"), ("evict", 0.3, "projected"), ("evict", 0.6, "projected once, as static"),
]  # fmt: skip


def test_the_row_of_the_results_is_recomputed_from_the_stored_answers():
    with lzma.open(ROOT / "experiments" / "found" / "routers.jsonl.xz", "rt", encoding="utf-8") as lines:
        stored = [json.loads(line) for line in lines]
    cells = []
    for kv, budget, name in ROUTERS:
        own = [row for row in stored if (row["kv"], row["budget"]) == (kv, budget)]
        static = {row["seed"]: row["right"] for row in own if row["method"] == "static, searched"}
        rows = [
            (float(a), float(b), (row["seed"], item), row["seed"])
            for row in own
            if row["method"] == name
            for item, (a, b, need) in enumerate(zip(row["right"], static[row["seed"]], row["need"]))
            if need
        ]
        found = paired(*map(list, zip(*rows))).scaled(100)
        assert found.seeds == 3
        cells.append(f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]")
    (row,) = [
        line for line in (ROOT / "docs" / "results.md").read_text().splitlines() if "projected minus static" in line
    ]
    assert [cell.strip(" *") for cell in row.strip("| ").split("|")[1:]] == cells
