"""The page of a study: means, intervals and paired differences are right, and only what exceeds them is called so."""

import json
import math
from pathlib import Path

import pytest
from made_up_run import Page, read_csv
from made_up_study import study, write_study

from ftp_lightning.errors import UserError
from ftp_lightning.report import build_report
from ftp_lightning.report.study import (
    difference,
    half_width,
    mean_and_std,
    read_study,
    statements,
    study_rows,
    table,
    varied_parameters,
)
from ftp_lightning.report.study_page import zero_text


@pytest.fixture
def found(tmp_path: Path) -> dict:
    return read_study(write_study(tmp_path / "study"))


def test_mean_and_spread_are_over_seeds_and_the_interval_is_students():
    assert mean_and_std([0.90, 0.92, 0.94]) == (pytest.approx(0.92), pytest.approx(0.02))
    assert half_width(0.02, 3) == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)
    assert mean_and_std([0.5]) == (0.5, None) and mean_and_std([]) == (None, None)


def test_differences_are_paired_by_seed():
    rows = study()["rows"]
    mean, half = difference(rows[1], rows[0], "kept")
    assert (mean, half) == (pytest.approx(-0.1), pytest.approx(0.0, abs=1e-12))  # each seed lower by exactly that
    assert difference(rows[2], rows[0], "validation KL") == (pytest.approx(0.0), pytest.approx(0.0))  # seeds 0 and 2
    assert difference({**rows[1], "seeds": [7, 8, 9]}, rows[0], "kept") is None


def test_only_what_exceeds_its_interval_is_said_to_differ(found):
    kept, kl = statements(found)
    assert kept.startswith("answers kept (share), against all factors: position alone -0.100 ± ")
    assert kept.endswith("; 1 not.") and "no factor" not in kept
    assert kl == "validation KL, against all factors: no row differs by more than its interval."


def test_the_table_shows_what_was_varied_and_marks_what_differs(found):
    columns, cells = table(found)
    assert columns == ["setting", "factors", "seeds", "answers kept", "validation KL"]  # steps are the same in all rows
    assert varied_parameters(found) == ["factors"]
    assert cells[0][3] == "0.920 ± 0.0200" and cells[1][3] == "0.820 ± 0.0200 *"
    assert cells[2][3] == "0.923 ± 0.0306" and not cells[2][4].endswith("*")


def test_the_page_holds_question_command_table_and_figures(tmp_path: Path):
    folder = write_study(tmp_path / "<script>study")
    edited = study()
    edited["rows"][0]["label"] = edited["baseline"] = "<script>alert(1)</script>"
    (folder / "study.json").write_text(json.dumps(edited))
    shown = Page(build_report(folder))
    assert "Which factors does the router need?" in shown.text and "make ablation-factors" in shown.text
    assert [tag for tag, _ in shown.tags].count("script") == 0 and "<script>study" in shown.text
    assert {"figure-study-1-kept", "figure-study-2-validation-kl"} <= shown.ids()
    rows = read_csv(folder / "report/study-1-kept.csv")
    assert [float(row["mean"]) for row in rows] == [row["mean"] for row in study_rows(read_study(folder))[:3]]
    assert rows[1]["values"].split() == ["0.8", "0.82", "0.84"]
    assert (folder / "report/study-1-kept.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_an_earlier_study_go(tmp_path: Path):
    folder = write_study(tmp_path / "study")
    build_report(folder)
    (folder / "report/mine.csv").write_text("mine")
    (folder / "study.json").write_text(json.dumps(study() | {"metrics": ["kept"]}))
    build_report(folder)
    assert {path.name for path in (folder / "report").iterdir()} == {"study-1-kept.csv", "study-1-kept.png", "mine.csv"}


def test_metrics_may_be_names_or_be_left_out(tmp_path: Path):
    assert [m["name"] for m in read_study(write_study(tmp_path / "a", metrics=["kept"]))["metrics"]] == ["kept"]
    given = study()
    del given["metrics"]
    folder = write_study(tmp_path / "b")
    (folder / "study.json").write_text(json.dumps(given))
    assert [m["name"] for m in read_study(folder)["metrics"]] == ["kept", "validation KL"]


def test_lists_may_stand_beside_the_label_and_the_studys_own_intervals_decide(tmp_path: Path):
    rows = [
        {"label": label, "quoted": None, "seeds": [0, 1, 2], "kl": kl, "kept": [None] * 3, "parameters": 450}
        for label, kl in (("first", [0.1, 0.2, 0.3]), ("second", [0.2, 0.3, 0.4]))
    ]
    compared = [{"label": "second", "kl": {"difference": 0.1, "low": -0.01, "high": 0.2}, "kept": None}]
    folder = write_study(tmp_path / "study")
    (folder / "study.json").write_text(
        json.dumps({"question": "?", "rows": rows, "compared": compared, "sentence": "No."})
    )
    found = read_study(folder)
    assert found["baseline"] == "first" and [m["title"] for m in found["metrics"]] == ["KL to dense", "answers kept"]
    assert [row["differs"] for row in study_rows(found)] == [False] * 4  # a paired t interval would say otherwise
    assert statements(found) == ["No."] and found["rows"][0]["parameters"] == {"parameters": 450}
    compared[0]["kl"]["low"] = 0.01
    assert table(found | {"compared": compared})[1][1][-2].endswith(" *")
    shown = Page(build_report(folder))
    assert "figure-study-1-kl" in shown.ids() and "figure-study-2-kept" not in shown.ids()
    assert "item by item" in shown.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": []}, "has no rows"),
        ({"baseline": "best"}, "baseline 'best'"),
        ({"rows": [{"label": "a", "seeds": [0, 1], "metrics": {"kept": [0.5]}}]}, "one value per seed"),
        ({"rows": [{"label": "a", "seeds": [0], "metrics": {"kept": ["x"]}}]}, "not a number"),
        ({"rows": [{"label": "a", "metrics": {"kept": []}}]}, "names no seeds"),
        ({"rows": [{"label": "a", "seeds": [], "metrics": {}}] * 2}, "label of its own"),
    ],
)
def test_a_broken_study_is_refused(tmp_path: Path, change: dict, said: str):
    folder = write_study(tmp_path / "study", **change)
    with pytest.raises(UserError, match=said) as refusal:
        build_report(folder)
    assert "study.json" in str(refusal.value) and len(str(refusal.value).splitlines()) <= 3
    assert [path.name for path in folder.iterdir()] == ["study.json"]


def test_an_axis_without_zero_says_so():
    assert zero_text((-0.1, 2.0)) == "" and "does not show 0, it begins at 0.753" in zero_text((0.7531, 0.95))
