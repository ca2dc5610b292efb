"""A router that is defined outside of the package is stored and loaded without a change to the package."""

import importlib
import json
import sys

import pytest
import torch
from test_engine import TEXT, tiny_llama

from ftp_lightning import FixedRouter, Schedule, TokenPruner, UserError
from ftp_lightning.routing import ROUTERS, Router, base

SCHEDULE = Schedule([0.0, 0.25, 0.5, 0.75])
SOURCE = """
import torch
from ftp_lightning.routing import Router

class Tilted(Router{keyword}):
    def __init__(self, slope=1.0, names=("a",)):
        super().__init__()
        self.slope, self.names = slope, names
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(5000))

    def score(self, context):
        return torch.sigmoid(self.slope * context.position + self.weight.sum() + self.seen.sum())

    def config(self):
        return {{"slope": self.slope, "names": self.names}}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes and imports a module of the user's; afterwards nothing of it is left."""
    before = dict(base.OWN_ROUTERS)
    monkeypatch.syspath_prepend(tmp_path)

    def make(keyword=""):
        (tmp_path / "routers_of_mine.py").write_text(SOURCE.format(keyword=keyword))
        return importlib.import_module("routers_of_mine")

    yield make
    sys.modules.pop("routers_of_mine", None)
    base.OWN_ROUTERS.clear()
    base.OWN_ROUTERS.update(before)


@pytest.mark.parametrize(("keyword", "name"), [("", "routers_of_mine.Tilted"), (', name="tilted"', "tilted")])
def test_it_comes_back_from_disk(module, tmp_path, keyword, name):
    kind = module(keyword).Tilted
    router = kind(-0.1, ("b", "c"))
    with torch.no_grad():
        router.weight += torch.tensor([0.1, 0.2, 0.3])
        router.seen[4] = 0.5
    pruner, model = TokenPruner(router, SCHEDULE, kv="keep"), tiny_llama(torch.float32)
    pruner.save(tmp_path / "p", base="mine", model=model)
    assert json.loads((tmp_path / "p" / "pruner.json").read_text())["router"]["name"] == name
    again = TokenPruner.load(tmp_path / "p")
    assert type(again.router) is kind and again.identity() == pruner.identity()
    with torch.no_grad():
        with pruner(model):
            expected = model(TEXT).logits
        with again(model):
            assert torch.equal(model(TEXT).logits, expected)


def test_what_was_not_imported_is_named_and_not_run(module, tmp_path):
    TokenPruner(module().Tilted(), SCHEDULE).save(tmp_path / "p")
    base.OWN_ROUTERS.clear()
    del sys.modules["routers_of_mine"]
    (tmp_path / "routers_of_mine.py").write_text("raise SystemExit('a stored path was imported')")
    with pytest.raises(UserError, match="'routers_of_mine.Tilted' is unknown") as told:
        TokenPruner.load(tmp_path / "p")
    assert "import the module that defines it first" in str(told.value)
    assert "routers_of_mine" not in sys.modules


def test_names_are_those_of_one_class(module):
    first = module().Tilted
    again = importlib.reload(sys.modules["routers_of_mine"]).Tilted  # defined anew, as in a notebook
    assert base.OWN_ROUTERS["routers_of_mine.Tilted"] is again is not first
    with pytest.raises(UserError, match="cannot be stored"):
        TokenPruner(first(), SCHEDULE).save("p")
    type("Mine", (Router,), {"__module__": "mine"}, name="mine")
    with pytest.raises(ValueError, match="is taken by mine.Mine"):
        type("Other", (Router,), {"__module__": "mine"}, name="mine")
    for name in ("", "x" * 201, "a\nb"):
        with pytest.raises(ValueError, match="printable"):
            type("Other", (Router,), {"__module__": "mine"}, name=name)
    with pytest.raises(ValueError, match="built-in"):
        type("Other", (Router,), {"__module__": "mine"}, name="static")
    assert not any(kind in base.OWN_ROUTERS.values() for kind in ROUTERS.values())


@pytest.mark.parametrize(
    ("router", "said"),
    [
        (lambda kind: type("More", (kind,), {"config": lambda self: {"steepness": 1}})(), "does not build it again"),
        (lambda kind: type("More", (kind,), {"config": lambda self: {"slope": {1}}})(), "does not build it again"),
        (lambda kind: type("More", (FixedRouter,), {})([torch.ones(1, 3)] * 4), "does not build it again"),
        (lambda kind: kind().double(), "float32"),
        (
            lambda kind: (lambda r: setattr(r, "weight", torch.nn.Parameter(torch.zeros(9))) or r)(kind()),
            "other weights",
        ),
    ],
)
def test_what_would_not_come_back_is_not_stored(module, tmp_path, router, said):
    with pytest.raises(UserError, match=said):
        TokenPruner(router(module().Tilted), SCHEDULE).save(tmp_path / "p")
    assert not (tmp_path / "p").exists()
