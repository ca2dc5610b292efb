"""A stage's folder is finished or not; bad ends leave nothing, or what can be resumed."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest

from ftp_lightning.artifact import LOCK, STATE, StageFolder
from ftp_lightning.errors import Interrupted, UserError
from ftp_lightning.fingerprint import git_commit, hash_path
from ftp_lightning.lock import Lock
from ftp_lightning.whole_files import make_folder

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
    assert names(tmp_path) == ["a", "a/state.json", "a/unfinished.json"]


def interrupted(path, **identity):
    """A folder with the state of a search that was interrupted."""
    with pytest.raises(KeyboardInterrupt), folder(path, **identity) as stage:
        stage.save_state({"generation": 3})
        raise KeyboardInterrupt


def test_an_unfinished_stage_of_other_settings_is_refused_and_kept(tmp_path, monkeypatch):
    interrupted(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"unfinished stage .*: kv None -> evict\n.*--overwrite"):
        folder(tmp_path, kv="evict").__enter__()
    other_stage = StageFolder(tmp_path, "train", CONFIG, {"budget": 0.3}, "ftp-lightning train")
    with pytest.raises(UserError, match="stage search -> train"):
        other_stage.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr("ftp_lightning.artifact.code_version", lambda: "another")
        with pytest.raises(UserError, match="the package's code changed"):
            folder(tmp_path).__enter__()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with folder(tmp_path) as stage:
        assert stage.load_state() == {"generation": 3}


def test_a_refusal_leaves_no_state_in_a_folder_that_was_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError), folder(tmp_path) as stage:
        stage.save_state({"generation": 3})
        stage.place("checkpoints").mkdir()
        raise UserError("too few prompts")
    assert names(tmp_path) == ["notes.txt"]


def test_a_refusal_keeps_the_state_that_it_came_upon(tmp_path):
    interrupted(tmp_path)
    before = names(tmp_path)
    with pytest.raises(UserError), folder(tmp_path) as stage:
        stage.save_state({"generation": 4})
        raise UserError("too little time")
    assert names(tmp_path) == before


def test_overwriting_an_unfinished_stage_discards_its_state(tmp_path):
    interrupted(tmp_path)
    with folder(tmp_path, overwrite=True, kv="evict") as stage:
        assert stage.load_state() is None
        stage.write_text("product", "1")
    assert names(tmp_path) == ["config.yaml", "product", "provenance.json"]


def test_a_state_without_a_record_of_whose_it_is_is_refused_by_its_own_fingerprint(tmp_path):
    interrupted(tmp_path)
    (tmp_path / "unfinished.json").unlink()
    with pytest.raises(UserError, match="state of other settings"), folder(tmp_path, kv="evict") as stage:
        stage.load_state()
    with folder(tmp_path) as stage:
        assert stage.load_state() == {"generation": 3}


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENOMEM])
def test_a_state_that_cannot_be_read_just_now_is_kept(tmp_path, monkeypatch, number):
    interrupted(tmp_path)
    read = Path.read_bytes

    def failing(path):
        if path.name == STATE:
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=os.strerror(number)):
        patch.setattr(Path, "read_bytes", failing)
        with folder(tmp_path) as stage:
            stage.load_state()
    with folder(tmp_path) as stage:
        assert stage.load_state() == {"generation": 3}


def finished(path):
    with folder(path) as stage:
        stage.write_text("product", "1")
        stage.place("pruned").mkdir()
        (path / "pruned" / "weights").write_text("2")
        stage.place("logs").mkdir()


@pytest.mark.parametrize("name", ["product", "pruned"])
def test_a_finished_stage_makes_a_missing_product_again(tmp_path, capsys, name):
    finished(tmp_path)
    (tmp_path / name).rename(tmp_path.parent / f"{tmp_path.name}-{name}")
    with folder(tmp_path) as stage:
        assert not stage.finished
        stage.write_text("product", "3")
    assert f"{name} of a finished stage is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["product", "pruned/weights", "pruned/more"])
def test_a_changed_product_is_named(tmp_path, name):
    finished(tmp_path)
    (tmp_path / name).write_text("changed")
    before = (tmp_path / "provenance.json").read_bytes()
    with pytest.raises(UserError, match=f"{name.split('/')[0]} is not what this finished stage has written"):
        folder(tmp_path).__enter__()
    assert (tmp_path / "provenance.json").read_bytes() == before


def test_a_missing_config_is_written_again_and_logs_are_nobodys_product(tmp_path):
    finished(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "logs").rmdir()
    with folder(tmp_path) as stage:
        assert stage.finished
    assert "budget: 0.3" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"parts": 3}'])
def test_a_broken_record_is_set_aside_and_said(tmp_path, capsys, content):
    finished(tmp_path)
    (tmp_path / "provenance.json").write_bytes(content)
    with folder(tmp_path) as stage:
        assert not stage.finished
        stage.write_text("product", "1")
    assert (tmp_path / "provenance.json.broken-1").read_bytes() == content
    assert "provenance.json.broken-1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, kind):
    (tmp_path / LOCK).mkdir() if kind == "folder" else os.mkfifo(tmp_path / LOCK)
    with pytest.raises(UserError, match=LOCK):
        folder(tmp_path).__enter__()


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


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(tmp_path):
    with folder(tmp_path / "a") as stage:
        with pytest.raises(UserError, match="another run is at work in"), folder(tmp_path / "a"):
            pass
        stage.write_text("product", "1")
    with folder(tmp_path / "a") as stage:
        assert stage.finished
    assert names(tmp_path / "a") == ["config.yaml", "product", "provenance.json"]


def test_the_lock_of_a_killed_run_locks_nobody_out_and_what_it_left_half_written_goes(tmp_path):
    (tmp_path / LOCK).write_text("")
    (tmp_path / ".state.json.4711.partial").write_text('{"half')
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / ".page.png.4711.partial").write_text("half")
    with folder(tmp_path) as stage:
        assert not list(tmp_path.rglob(".*.partial"))
        stage.write_text("product", "1")
    assert names(tmp_path) == ["config.yaml", "product", "provenance.json", "report"]


def test_a_lock_that_its_holder_takes_away_is_no_lock(tmp_path):
    first, second = Lock(tmp_path / LOCK), Lock(tmp_path / LOCK)
    assert first.take() and not second.take()
    first.free()
    assert second.take() and not Lock(tmp_path / LOCK).take()
    second.free()
    assert names(tmp_path) == []


def test_a_copy_for_another_process_goes_without_the_lock(tmp_path):
    with folder(tmp_path) as stage:
        copy = pickle.loads(pickle.dumps(stage))
        copy.write_text("product", "1")
        stage.adopt(copy.files)


@pytest.mark.parametrize("place", range(0, 200, 7))
def test_a_state_with_a_flipped_bit_is_no_state(tmp_path, place):
    with pytest.raises(KeyboardInterrupt), folder(tmp_path) as stage:
        stage.save_state({"generation": 3, "best": 0.125})
        raise KeyboardInterrupt
    content = bytearray((tmp_path / STATE).read_bytes())
    if place < len(content):
        content[place] ^= 4
        (tmp_path / STATE).write_bytes(content)
    with pytest.raises(KeyboardInterrupt), folder(tmp_path) as stage:
        assert stage.load_state() in (None, {"generation": 3, "best": 0.125})
        assert place >= len(content) or content[place] ^ 4 in b" " or stage.load_state() is None
        raise KeyboardInterrupt


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_a_full_disk_is_told_and_what_was_saved_stays(tmp_path, monkeypatch, number):
    def full(path, content):
        raise OSError(number, os.strerror(number), str(path))

    with pytest.raises(Interrupted, match=os.strerror(number)) as told, folder(tmp_path / "a") as stage:
        stage.save_state({"generation": 3})
        monkeypatch.setattr(Path, "write_bytes", full)
        stage.write_text("product", "1")
    assert len(str(told.value).splitlines()) == 2
    assert names(tmp_path / "a") == ["state.json", "unfinished.json"]
    monkeypatch.undo()
    with folder(tmp_path / "a") as stage:
        assert stage.load_state() == {"generation": 3}


def test_a_disk_that_is_full_at_the_very_end_leaves_no_finished_stage(tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if "provenance" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Interrupted, match="No space"), folder(tmp_path / "a") as stage:
        stage.save_state({"generation": 3})
        stage.write_text("product", "1")
    assert "provenance.json" not in names(tmp_path / "a") and "state.json" in names(tmp_path / "a")


def test_every_error_of_the_system_is_a_sentence_and_others_stay_what_they_are(tmp_path):
    with pytest.raises(Interrupted, match=r"read or write x: no such file\n.*resume"), folder(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no such file", "x")
    with pytest.raises(OSError, match="of a library"), folder(tmp_path):
        raise OSError("of a library")


@pytest.mark.parametrize(
    ("git", "commit"),
    [
        ("echo 0a1b2c", "0a1b2c"),
        ("echo HEAD; echo fatal: ambiguous argument >&2; exit 128", None),  # a repository without commits
        ("printf 'fatal: dubious ownership in /caf\\351' >&2; exit 128", None),  # bytes that are no UTF-8
        (None, None),
    ],
)
def test_a_commit_that_git_cannot_tell_is_left_blank(tmp_path, monkeypatch, git, commit):
    if git is not None:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{git}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setattr("ftp_lightning.fingerprint.PACKAGE", tmp_path / "package")
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None)
    assert git_commit() == commit
