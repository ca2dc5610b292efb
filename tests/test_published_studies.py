"""docs/studies.md shows what the published studies say, row by row; and they are studies of today's sweep files."""

import json
from pathlib import Path

import pytest
import yaml

from ftp_lightning.report.study import read_study
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
