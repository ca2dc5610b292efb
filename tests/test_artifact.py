"""A stage's folder is finished or not; bad ends leave nothing, or what can be resumed."""

import json

import pytest

from ftp_lightning.artifact import StageFolder, make_folder
from ftp_lightning.errors import UserError
from ftp_lightning.fingerprint import hash_path

CONFIG = {"budget": 0.3, "output": "somewhere", "seed": 7}


def folder(path, overwrite=False, **identity):
    return StageFolder(path, "search", CONFIG, {"budget": 0.3, **identity}, "ftp-lightning search", overwrite)


def names(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))


def test_a_finished_stage_has_its_products_and_says_where_they_come_from(tmp_path):
    with folder(tmp_path / "a" / "b") as stage:
        assert not stage.finished
        stage.write_json("metrics.json", {"value": float("nan"), "curve": [1.0, float("inf")]})
    assert names(tmp_path / "a" / "b") == ["config.yaml", "metrics.json", "provenance.json"]
    assert json.loads((tmp_path / "a/b/metrics.json").read_text()) == {"value": None, "curve": [1.0, None]}
    provenance = json.loads((tmp_path / "a/b/provenance.json").read_text())
    assert provenance["seed"] == 7 and provenance["command"] == "ftp-lightning search"
    assert provenance["files"] == ["config.yaml", "metrics.json"]
    assert {"python", "torch", "transformers", "lightning"} <= set(provenance["versions"])


def test_the_same_stage_is_not_run_again_and_another_is_refused_with_the_difference(tmp_path):
    with folder(tmp_path) as stage:
        stage.write_text("product", "1")
    before = (tmp_path / "provenance.json").read_bytes()
    with folder(tmp_path) as stage:
        assert stage.finished
    with pytest.raises(UserError, match=r"kv None -> evict\n.*--overwrite"), folder(tmp_path, kv="evict"):
        pass
    assert (tmp_path / "provenance.json").read_bytes() == before


def test_the_fingerprint_knows_the_code(tmp_path, monkeypatch):
    with folder(tmp_path) as stage:
        stage.write_text("product", "1")
    monkeypatch.setattr("ftp_lightning.artifact.code_version", lambda: "another")
    with pytest.raises(UserError, match="the package's code changed\n"), folder(tmp_path):
        pass


def test_overwriting_takes_away_what_is_not_written_again_but_only_once_something_is_written(tmp_path):
    with folder(tmp_path) as stage:
        stage.write_text("old", "1")
        stage.place("pruned").mkdir()
    (tmp_path / "the user's").write_text("mine")
    with pytest.raises(UserError), folder(tmp_path, overwrite=True, kv="evict"):
        raise UserError("bad input, before anything was written")
    assert {"old", "pruned", "provenance.json"} <= set(names(tmp_path))
    with folder(tmp_path, overwrite=True, kv="evict") as stage:
        stage.write_text("new", "2")
        assert "provenance.json" not in names(tmp_path)  # killed here, it would be run again
    assert names(tmp_path) == ["config.yaml", "new", "provenance.json", "the user's"]


def test_bad_input_leaves_nothing_that_was_not_there(tmp_path):
    with pytest.raises(UserError), folder(tmp_path / "runs" / "search") as stage:
        stage.write_text("half", "1")
        stage.save_state({"generation": 3})
        raise UserError("bad input")
    assert names(tmp_path) == []
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError), folder(tmp_path / "runs" / "search"):
        raise UserError("bad input")
    assert names(tmp_path) == ["runs"]


def test_a_crash_leaves_nothing_but_a_state_to_resume_from(tmp_path):
    with pytest.raises(ZeroDivisionError), folder(tmp_path / "a") as stage:
        stage.write_text("half", "1")
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), folder(tmp_path / "a") as stage:
        stage.save_state({"generation": 3})
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a", "a/state.json"]
    with folder(tmp_path / "a", kv="evict") as stage:
        assert stage.load_state() is None  # the state of another search
        assert not stage.finished


def test_the_state_of_the_same_search_is_resumed_and_gone_afterwards(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder(tmp_path) as stage:
        stage.save_state({"generation": 3})
        raise KeyboardInterrupt
    with folder(tmp_path) as stage:
        assert stage.load_state() == {"generation": 3}
        stage.write_text("product", "1")
    assert names(tmp_path) == ["config.yaml", "product", "provenance.json"]


@pytest.mark.parametrize("below", ["file", "file/folder/deeper"])
def test_a_folder_that_cannot_be_written_is_told_and_nothing_is_created(tmp_path, below):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write to the output folder"):
        make_folder(tmp_path / below)
    assert names(tmp_path) == ["file"]


def test_hashes_see_content_and_names_but_not_the_place(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "x").write_text("1")
        (tmp_path / place / "y").write_text("2")
    assert hash_path(tmp_path / "a") == hash_path(tmp_path / "b")
    (tmp_path / "b" / "y").rename(tmp_path / "b" / "z")
    assert hash_path(tmp_path / "a") != hash_path(tmp_path / "b")
    before = hash_path(tmp_path / "a" / "y")
    (tmp_path / "a" / "y").write_text("3")
    assert hash_path(tmp_path / "a" / "y") != before


def test_a_list_read_back_is_no_difference_to_a_tuple(tmp_path):
    with folder(tmp_path, levels=(0.3, 0.6)) as stage:
        stage.write_text("product", "1")
    changed = folder(tmp_path, levels=(0.3, 0.6), kv="evict")
    with pytest.raises(UserError, match="other settings: kv None -> evict\n"), changed:
        pass
