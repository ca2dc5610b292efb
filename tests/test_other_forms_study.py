"""The study of sentence forms: a tiny cell end to end, measured on forms that nothing was trained on."""

import json
import shutil
import sys

import pytest
from scripts import script

SIZES = "--budgets 0.5 --seeds 0 --items 24 --windows 4 --calibration_windows 4 --steps 2 --tokens 4000".split()


@pytest.fixture
def study():
    return script("experiments/other_forms.py")


def call(study, monkeypatch, folder, *more):
    given = [*SIZES, "--output", str(folder / "found"), "--known", str(folder / "known"), *more]
    monkeypatch.setattr(sys, "argv", ["other_forms.py", *given])
    study.main()
    return json.loads((folder / "found" / "keep-0.5-0.json").read_text())


@pytest.mark.slow
def test_one_cell_and_what_was_found_with_all_forms(study, monkeypatch, tmp_path, capsys):
    methods = "--methods", "static, searched; projected; projected, all forms"
    found = call(study, monkeypatch, tmp_path, *methods)
    assert set(found) == {"static, searched", "projected"}  # nothing is known of all forms here
    assert sum(found["projected"]["need"]) > 5 and found["projected"]["need"] == found["static, searched"]["need"]
    assert "| projected - static, searched |" in capsys.readouterr().out
    shutil.copytree(tmp_path / "found" / "keep-0.5-0-projected", tmp_path / "known" / "keep-0.5-0-projected")
    again = call(study, monkeypatch, tmp_path, *methods)
    assert again["projected"] == found["projected"]
    assert again["projected, all forms"]["right"] == again["projected"]["right"]


def test_training_sees_its_forms_and_the_test_others(study, monkeypatch, tmp_path):
    sizes = ["--items", "2", "--windows", "2"]
    monkeypatch.setattr(sys, "argv", ["other_forms.py", "--forms", "town", "--asked", "colour", *sizes])
    args = study.arguments()
    cell = study.Cell(args, "keep", 0.5, 0)
    seen = " ".join(cell.tokenizer.decode(row) for row in cell.windows("embedded", "training", 8, 0).input_ids)
    assert " had come from " in seen and " bought a " not in seen
    test, _ = study.searches.tests_for(args, 0, args.asked)
    asked = " ".join(test.tokenizer.decode(context) for context, _ in test.questions)
    assert " bought a " in asked and " had come from " not in asked


def test_a_form_on_both_sides_is_refused(study, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        call(study, monkeypatch, tmp_path, "--asked", "town")
    assert left.value.code == 2 and "nothing would be new" in capsys.readouterr().err
