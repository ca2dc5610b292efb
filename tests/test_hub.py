"""A pruner goes to the Hub and comes back, by a local stand-in of its client; the card holds the run's own numbers."""

import fnmatch
import json
from types import SimpleNamespace

import pytest
import torch

from ftp_lightning import DynamicRouter, Schedule, TokenPruner, UserError
from ftp_lightning.__main__ import main
from ftp_lightning.hub import from_pretrained, model_card, push_to_hub

TINY = "--model random:tiny --device cpu --tracking none --prompt_tokens 96 --continuation_tokens 16".split()


class LocalHub:
    """What is used of `huggingface_hub.HfApi`, kept in a folder."""

    def __init__(self, root, fail=None):
        self.root, self.fail, self.commits = root, fail, []

    def create_repo(self, repo, *, private, exist_ok, repo_type):
        (self.root / repo).mkdir(parents=True, exist_ok=exist_ok)

    def create_commit(self, repo, *, operations, commit_message):
        if self.fail:
            raise self.fail
        self.commits.append(sorted(one.path_in_repo for one in operations))
        for one in operations:
            (self.root / repo / one.path_in_repo).write_bytes(one.path_or_fileobj)
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")

    def snapshot_download(self, repo, *, revision, allow_patterns):
        fetched = self.root / "cache" / repo
        fetched.mkdir(parents=True)
        for path in (self.root / repo).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                (fetched / path.name).write_bytes(path.read_bytes())
        return str(fetched)


def transport_error():
    """What the Hub's client lets through where there is no network: an error of the HTTP library that it imports."""
    import huggingface_hub.utils._http as client

    library = next(getattr(client, name) for name in ("httpx2", "httpx") if hasattr(client, name))
    return library.ConnectError("no route to host")


def test_an_error_of_the_clients_http_library_is_a_sentence_wherever_the_hub_is_asked(monkeypatch):
    import datasets
    import transformers

    from ftp_lightning.data.records import hub_records
    from ftp_lightning.models import load_tokenizer
    from ftp_lightning.stages.prefetch import _attempt

    def fail(*_, **__):
        raise transport_error()

    with pytest.raises(UserError, match="org/name cannot be downloaded from the Hub: no route to host\n"):
        _attempt("org/name", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="the Hub data set cannot be loaded .no route to host"):
        hub_records("org/name", str)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match="cannot be loaded from the Hub: no route to host"):
        load_tokenizer("org/name")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(pruned folder, folder of its evaluation)."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    TokenPruner(DynamicRouter(), Schedule([0.0, 0.3, 0.6]), kv="keep").save(folder / "p", base="random:tiny")
    sizes = "--tasks story_name --limit 3 --windows 2 --batch_size 2".split()
    assert main(["evaluate", "--pruned", str(folder / "p"), *TINY, *sizes, "--output", str(folder / "e")]) == 0
    return folder / "p", folder / "e"


def test_pushed_and_had_back_it_is_the_same(evaluated, tmp_path):
    folder, results = evaluated
    hub = LocalHub(tmp_path)
    assert push_to_hub(folder, "me/pruner", results=results, api=hub) == "https://hub/me/pruner/commit/1"
    assert hub.commits == [["README.md", "pruner.json", "router.safetensors"]]  # one commit: whole or not at all
    (tmp_path / "me" / "pruner" / "evil.py").write_text("raise SystemExit")
    found, good = from_pretrained("me/pruner", api=hub), TokenPruner.load(folder)
    assert found.schedule == good.schedule and found.settings() == good.settings()
    for name, value in good.router.state_dict().items():
        assert torch.equal(found.router.state_dict()[name], value)
    assert not (tmp_path / "cache" / "me" / "pruner" / "evil.py").exists()
    assert from_pretrained(folder).schedule == good.schedule


def test_the_card_holds_the_runs_own_numbers(evaluated):
    folder, results = evaluated
    found = json.loads((results / "results.json").read_text())
    ours, card = found["methods"][-1], model_card(folder, results)
    assert f"{ours['kl']['mean']:.4g}" in card and f"{ours['flops_reduction']:.1%}" in card
    assert f"{found['dense']['tasks']['story_name']['acc']:.3f}, {ours['tasks']['story_name']['acc']:.3f}" in card
    assert "30.0% of them on average over 3 blocks" in card and "| 0 | 30 | 60 |" in card
    assert "Not evaluated." in model_card(folder) and str(folder) not in card


def test_numbers_of_another_pruner_are_refused(evaluated, tmp_path):
    _, results = evaluated
    TokenPruner(DynamicRouter(), Schedule([0.0, 0.3, 0.3])).save(tmp_path / "other")
    with pytest.raises(UserError, match="no evaluation of"):
        push_to_hub(tmp_path / "other", "me/pruner", results=results, api=LocalHub(tmp_path))
    assert not (tmp_path / "me").exists()


def test_what_the_hub_refuses_is_told_and_holds_no_token(evaluated, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub = LocalHub(tmp_path, fail=OSError("403 Forbidden\nand more"))
    with pytest.raises(UserError, match="me/pruner on the Hub: 403 Forbidden\n") as told:
        push_to_hub(evaluated[0], "me/pruner", api=hub)
    assert "hf_secret" not in str(told.value)
    with pytest.raises(UserError, match="on the Hub: no route to host"):
        push_to_hub(evaluated[0], "me/pruner", api=LocalHub(tmp_path, fail=transport_error()))
    with pytest.raises(UserError, match="on the Hub"):
        from_pretrained("me/no-such-pruner")  # the real client, offline
    with pytest.raises(UserError, match="is not a pruner"):
        push_to_hub(tmp_path / "nothing", "me/pruner", api=hub)
