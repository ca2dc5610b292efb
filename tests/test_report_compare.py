"""`report RUN RUN`: settings that differ, outcomes side by side, a difference only where its interval excludes 0."""

import json
from pathlib import Path

import pytest
from made_up_run import Page, edit, read_csv, write_run

from ftp_lightning.errors import UserError
from ftp_lightning.report import build_comparison, build_report, page
from ftp_lightning.report.comparing import paired, read_runs, settings_that_differ
from ftp_lightning.report.comparison_page import PLOTS


def write_samples(folder: Path, right: list[bool], first_document: int = 0) -> None:
    """Recall questions, four of each document; dense answers all with the passage, none without."""
    rows = []
    for place, ok in enumerate(right):
        labels = {"task": "story_recall", "item": place, "document": first_document + place // 4}
        labels["hash"] = f"words of {first_document}, {place}"
        rows.append({**labels, "method": "dynamic", "right": ok, "needed": True})
        rows.append({**labels, "method": "static", "right": not ok, "needed": True})
    rows.append(rows[0] | {"hash": "not needed", "needed": False})
    (folder / "evaluate/record.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    first, second = (write_run(tmp_path / name / "demo") for name in ("a", "b"))
    config = second / "train/config.yaml"
    config.write_text(config.read_text() + "lambda_d: 5.0\n")
    edit(second / "evaluate/results.json", lambda r: r["methods"][-1].update(flops_reduction=0.4))
    edit(second / "evaluate/results.json", lambda r: r["methods"][-1]["kept"].update(share=0.5, low=0.4, high=0.6))
    write_samples(first, [True] * 78 + [False] * 2)
    write_samples(second, [True, True, True, False] * 20)
    return first, second


def test_runs_are_side_by_side_on_one_page(pair, tmp_path: Path):
    shown_at = build_comparison(list(pair), tmp_path / "out")
    shown = Page(shown_at)
    assert shown_at == tmp_path / "out/report.html"
    assert {f"figure-{plot.name}" for plot in PLOTS} <= shown.ids()
    assert {path.stem for path in (tmp_path / "out/report").iterdir()} == {plot.name for plot in PLOTS}
    rows = {row["label"]: row for row in read_csv(tmp_path / "out/report/compare-pareto.csv")}
    assert rows["b/demo"]["flops_cut"] == "0.4" and [rows[n]["best"] for n in ("a/demo", "b/demo")] == ["1", "1"]
    assert "91.2 % [90.0, 92.4]" in shown.text and "50.0 % [40.0, 60.0]" in shown.text
    assert "b/demo: " not in shown.text.split("Outcome")[0] or "keeps fewer" in shown.text


def test_a_run_on_one_document_shows_its_share_without_an_interval(pair, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(page, "draw", lambda plot, rows: None)
    said = {"low": None, "high": None, "note": "one document: no interval"}
    edit(pair[1] / "evaluate/results.json", lambda r: [m["kept"].update(said) for m in r["methods"]])
    assert "50.0 % (one document: no interval)" in Page(build_comparison(list(pair), tmp_path / "out")).text
    assert "50.0 % (one document: no interval)" in Page(build_report(pair[1])).text


def test_only_settings_that_differ_are_listed_and_no_paths(pair):
    assert settings_that_differ(read_runs(list(pair))) == [["train lambda_d", "–", "5.0"]]


def test_a_difference_is_claimed_only_where_its_interval_excludes_zero(pair):
    first, second = pair
    (said,) = paired(read_runs([first, second]))
    assert said.startswith("b/demo against a/demo: keeps fewer; answers kept -22.5 points [")
    write_samples(second, [False] * 2 + [True] * 76 + [False] * 2)
    assert "cannot be told apart" in paired(read_runs([first, second]))[0]
    write_samples(second, [True] * 80, first_document=1000)
    assert "not asked the same questions" in paired(read_runs([first, second]))[0]


def test_the_same_run_twice_or_alone_is_refused(pair):
    for folders in ([pair[0], pair[0]], [pair[0]]):
        with pytest.raises(UserError, match="two different runs or more"):
            read_runs(folders)


def test_the_command_line_takes_runs_without_a_flag(command, pair, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(page, "draw", lambda plot, rows: None)
    first, second = map(str, pair)
    assert command("report", first, second, "--output", "both")[0] == 0
    assert (tmp_path / "both/report.html").is_file()
    assert command("report", first)[0] == 0 and (pair[0] / "report.html").is_file()
    assert command("report", first, second)[0] == 0 and (tmp_path / "runs/comparison/report.html").is_file()
    for words in (["--run", first, second, first], [first, "--run", second], [first, "--output", "x"]):
        status, _, said = command("report", *words)
        assert status == 2 and len(said.splitlines()) <= 3
    status, _, said = command("report", first, "missing", "--output", "none")
    assert status == 2 and "missing is not a folder" in said and not (tmp_path / "none").exists()
