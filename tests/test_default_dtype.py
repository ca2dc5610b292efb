"""`torch.set_default_dtype` of the user's program changes no result and breaks nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_engine import tiny_llama

from ftp_lightning import Schedule, TokenPruner
from ftp_lightning.baselines.skip_gpt import SkipGPTRouter
from ftp_lightning.evaluation.continuation import continuation_logits
from ftp_lightning.models import load
from ftp_lightning.routing import ROUTERS, make_router
from ftp_lightning.training.compensation import fit_compensation
from ftp_lightning.training.gates import Gumbel

SCHEDULE = Schedule([0.0, 0.3, 0.6, 0.4])
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(0))


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))


def agrees(work) -> None:
    """`work` finds the same under each default dtype as under torch's own."""
    model = tiny_llama(torch.float32)
    torch.manual_seed(0)
    expected = work(model)
    for dtype in (torch.bfloat16, torch.float64):
        with default(dtype):
            torch.manual_seed(0)
            found = work(model)
        assert same(found, expected), dtype


def router_of(name: str):
    return SkipGPTRouter(4, 32) if name == "skipgpt" else make_router(name, 4, 32)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "fixed"] + ["skipgpt"])
def test_routers_are_made_run_and_stored_alike(name, tmp_path):
    def work(model):
        router = router_of(name)
        parts = "attention+mlp" if name == "skipgpt" else "block"
        pruner, found = TokenPruner(router, SCHEDULE, parts=parts), list(router.state_dict().values())
        with torch.no_grad(), pruner(model):
            found += [model(IDS).logits, model.generate(IDS, max_new_tokens=3, do_sample=False)]
        if name == "skipgpt":
            return found
        pruner.save(tmp_path / "pruned")
        with torch.no_grad(), TokenPruner.load(tmp_path / "pruned")(model):
            return [*found, model(IDS).logits]

    agrees(work)


@pytest.mark.parametrize("kv", ["keep", "evict"])
def test_continuations_that_skip_and_training(kv):
    def work(model):
        pruner = TokenPruner(router_of("dynamic"), SCHEDULE, kv=kv, decode="strict", attention="exact")
        with pruner(model):
            with torch.no_grad():
                found = [continuation_logits(model, IDS, 14)]
            with pruner.masked(14, Gumbel(0.7, torch.Generator().manual_seed(1))):
                model(IDS).logits.square().mean().backward()
        return [*found, *(weight.grad for weight in pruner.router.parameters())]

    agrees(work)


def test_compensation_is_fitted_and_stored_alike(tmp_path):
    def work(model):
        batches = [{"input_ids": IDS, "prompt_tokens": 14}]
        fitted = fit_compensation(model, batches, rank=2)
        pruner = TokenPruner(router_of("static"), SCHEDULE, skip="low-rank", compensation=fitted.only([1, 2]))
        pruner.save(tmp_path / "pruned")
        return [*fitted.tensors.values(), *TokenPruner.load(tmp_path / "pruned").compensation.tensors.values()]

    agrees(work)


@pytest.mark.parametrize("name", ["embedded", "random:tiny"])
def test_models_are_loaded_alike(name):
    agrees(lambda _: list(load(name)[0].state_dict().values()))
