"""Compensated skip: the fit against an obvious one, the engine against the oracle, the folder, the costs, the words."""

import contextlib
import dataclasses
import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONFIGS, family
from grid_cases import pairwise
from oracle import follow_row, masked_dense, run_row
from safetensors.torch import load_file, save_file
from test_engine import BLOCKS, MODEL, TEXT, prefill_and_continue, relative, seeded, tiny_llama
from test_families import DTYPES, check, finest
from test_flops import matrix_flops, without_pairs
from test_policies import PROMPT, at_once, router
from test_pruned_folder import edit

from ftp_lightning import (
    DynamicRouter,
    FixedRouter,
    RandomRouter,
    Schedule,
    ScheduleFamily,
    StaticRouter,
    TokenPruner,
    UserError,
    fit_compensation,
)  # fmt: skip
from ftp_lightning.baselines.beside import beside
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.costs import flops
from ftp_lightning.costs.budget import budget_with_cut
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.evaluation.speed import prefill as speed
from ftp_lightning.evaluation.speed.prompts import random_prompts
from ftp_lightning.pruning.family import find_blocks
from ftp_lightning.search.fitness import pruner_identity
from ftp_lightning.training import compensation
from ftp_lightning.training.compensation import Moments, gather_moments, solve_compensation
from ftp_lightning.training.resume import capture

SCHEDULE = Schedule([0.0, 0.3, 0.6, 0.4])
WIDTH = 32
RANKS = {"mean": 0, "low-rank": 5}
KV = ["evict", "keep", ("evict", "keep", "keep", "evict")]
LENGTHS = [(18, 11), (16, 16)]
"""Prompts of a batch: rows that differ, rows alike."""


def windows(count=8, seed=0, prompt=20):
    ids = torch.randint(3, 64, (count, 24), generator=torch.Generator().manual_seed(seed))
    return Rows.even(ids, prompt, ["plain"] * count, list(range(count)))


FITTED = {skip: fit_compensation(MODEL, windows(), rank) for skip, rank in RANKS.items()}


def pruner_of(skip, router=None, schedule=SCHEDULE, **more):
    router = router or seeded(DynamicRouter)
    return TokenPruner(router, schedule, **{"skip": skip, "compensation": FITTED[skip]} | more)


# ---------------------------------------------------------------- the regression


def states_of(block, rows):
    """What enters and what leaves a block, (n, D) float64 each, by hand: prompt tokens, without the first and last."""
    with torch.no_grad(), capture(MODEL) as states:
        MODEL(rows.input_ids[:, : rows.prompt_tokens])
    before, after = (states.entering(b)[:, 1:-1].flatten(0, 1).numpy() for b in (block, block + 1))
    return before, after - before


def numpy_ridge(x, y, ridge):
    """(W, b) that minimise |y - W x - b|^2 + lambda |W|^2: rows of penalty below the centred data, least squares."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    penalty = ridge * np.linalg.eigvalsh((x - x_mean).T @ (x - x_mean)).mean()
    below = np.sqrt(penalty) * np.eye(x.shape[1])
    left, right = np.vstack([x - x_mean, below]), np.vstack([y - y_mean, np.zeros((x.shape[1], y.shape[1]))])
    w = np.linalg.lstsq(left, right, rcond=None)[0].T
    return w, y_mean - w @ x_mean, left, right


def whole(solved):
    return (solved["up"] @ solved["down"]).numpy()


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_full_rank_is_the_plain_ridge(ridge):
    moments = gather_moments(MODEL, windows())["block"]
    for block in range(BLOCKS):
        x, y = states_of(block, windows())
        w, b, _, _ = numpy_ridge(x, y, ridge)
        solved = moments[block].solve(WIDTH, ridge)
        np.testing.assert_allclose(whole(solved), w, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(solved["bias"].numpy(), b, rtol=1e-6, atol=1e-8)
        assert moments[block].count == len(x) == 8 * 18


def test_rank_zero_is_the_mean_update_and_needs_no_products():
    moments = gather_moments(MODEL, windows(), products=False)["block"]
    assert moments[0].xx is None
    for block in range(BLOCKS):
        mean = states_of(block, windows())[1].mean(0)
        np.testing.assert_allclose(FITTED["mean"].tensors["block.bias"][block].numpy(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_no_other_matrix_of_this_rank_fits_better(rank):
    """Against random ones, neighbours of the best, the plain ridge cut by its own singular values, and the bound."""
    x, y = states_of(2, windows())
    w, _, left, right = numpy_ridge(x, y, 0.1)
    solved = gather_moments(MODEL, windows())["block"][2].solve(rank, 0.1)
    rng = np.random.default_rng(0)

    def loss(matrix):
        return ((right - left @ matrix.T) ** 2).sum()

    best = loss(whole(solved))
    assert np.linalg.matrix_rank(whole(solved), tol=1e-9) == rank
    fitted = np.linalg.svd(left @ w.T, compute_uv=False)
    assert best == pytest.approx(loss(w) + (fitted[rank:] ** 2).sum(), rel=1e-9)  # Eckart and Young: what must be lost
    u, s, v = np.linalg.svd(w)
    assert best < loss((u[:, :rank] * s[:rank]) @ v[:rank])
    for step in (1.0, 0.1, 0.01, 1e-3):
        for _ in range(50):
            up = solved["up"].numpy() + step * rng.standard_normal((WIDTH, rank))
            down = solved["down"].numpy() + step * rng.standard_normal((rank, WIDTH))
            refitted = right.T @ (left @ down.T) @ np.linalg.inv((left @ down.T).T @ (left @ down.T))
            assert best < loss(up @ down) and best < loss(refitted @ down) + 1e-9
    assert loss(whole(solved)) < loss(np.zeros_like(w))


@pytest.mark.parametrize("products", [True, False])
def test_two_halves_add_up_to_the_whole(products):
    both = windows(9)
    one, two = (
        gather_moments(MODEL, part, 2, products=products) for part in (both.subset(range(4)), both.subset(range(4, 9)))
    )
    expected = gather_moments(MODEL, both, 9, products=products)
    for block in range(BLOCKS):
        a, b = one["block"][block] + two["block"][block], expected["block"][block]
        assert a.count == b.count
        for name in ("x", "y", *(("xx", "yx") if products else ())):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-9)
    found = solve_compensation({"block": [a + b for a, b in zip(one["block"], two["block"])]}, 5 if products else 0)
    again = fit_compensation(MODEL, both, 5 if products else 0)
    assert all(relative(found.tensors[name], again.tensors[name]) < 1e-5 for name in again.tensors if "bias" in name)


def test_batches_of_a_loader_are_windows():
    rows = windows()
    batches = [{"input_ids": rows.input_ids[i : i + 3], "prompt_tokens": 20} for i in (0, 3, 6)]
    a, b = (gather_moments(MODEL, one)["block"][1] for one in (batches, rows))
    torch.testing.assert_close(a.xx, b.xx, rtol=1e-12, atol=1e-9)


def test_continuations_have_no_say():
    rows = windows()
    other = Rows([dataclasses.replace(row, continuation=row.prompt[:4]) for row in rows.rows])
    a, b = (gather_moments(MODEL, one)["block"][3] for one in (rows, other))
    assert torch.equal(a.xx, b.xx) and torch.equal(a.yx, b.yx)


def test_massive_tokens_are_left_out():
    """A token far larger than its row's others would be fitted instead of them."""
    model, ids = tiny_llama(), windows().input_ids
    rare = torch.tensor([5, 9])
    ids[ids == 9] = 11
    ids[:, 4] = 9
    rows = Rows.even(ids, 20, ["plain"] * 8, list(range(8)))
    with torch.no_grad():
        model.model.embed_tokens.weight[rare[1]] *= 1e3
    counts = [one.count for one in gather_moments(model, rows)["block"]]
    assert counts[0] == 8 * 17, counts


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_fitted_on_what_enters_and_leaves_them(name):
    """At full rank, and nearly no penalty, a map of few tokens finds every update again; whichever family it is."""
    model = family(name, finest(name))
    few = Rows.even(windows().input_ids[:1], 12, ["plain"], [0])
    fitted = fit_compensation(model, few, WIDTH, 1e-12, parts="attention+mlp").to(dtype=finest(name))
    assert fitted.parts == ("attention", "mlp") and set(fitted.tensors) == set(compensation.shapes(**fitted.sizes()))
    seen = {}
    for part in fitted.parts:
        entry, leave = compensation._doors(find_blocks(model)[2], part)
        entry.register_forward_pre_hook(
            lambda m, a, k, part=part: seen.update({part: a[0] if a else k["hidden_states"]}), with_kwargs=True
        )
        leave.register_forward_hook(lambda m, a, out, part=part: seen.update({part + ".out": out}))
    with torch.no_grad():
        model(few.input_ids[:, :12])
    for part in fitted.parts:
        out = seen[part + ".out"]
        x, y = (t.view(1, 12, WIDTH) for t in (seen[part], out[0] if isinstance(out, tuple) else out))
        usual = compensation._usual(x, None) & compensation._usual(x + y, None)
        usual[:, 0] = usual[:, -1] = False
        assert usual.sum() > 5 and relative(fitted.update(x, 2, part)[usual], y[usual]) < 1e-3


# ---------------------------------------------------------------- the engine


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("skip", RANKS)
@pytest.mark.parametrize(("choice", "attention"), [("topk", "window"), ("threshold", "window"), ("topk", "exact")])
def test_gathered_equals_oracle(skip, kv, choice, attention):
    pruner = pruner_of(skip, kv=kv, choice=choice, attention=attention, window=5)
    logits, trace = prefill_and_continue(MODEL, pruner, TEXT, 18)
    for row in range(3):
        expected, keep = run_row(MODEL, pruner, TEXT[row], 18)
        assert all(torch.equal(k, t[row]) for k, t in zip(keep, trace.keep))
        assert relative(logits[row], expected) < 1e-11
    plain, _ = prefill_and_continue(MODEL, pruner.changed(skip="identity", compensation=None), TEXT, 18)
    assert relative(logits, plain) > 1e-3


@pytest.mark.parametrize(
    "name, parts, skip, lengths",
    pairwise(list(CONFIGS), ["block", "attention", "mlp", "attention+mlp"], list(RANKS), LENGTHS),
)
def test_every_family_padded_and_continued_in_chunks(name, parts, skip, lengths):
    model = family(name, finest(name))
    fitted = fit_compensation(model, windows(4), RANKS[skip], parts=parts)
    kv = ["keep", "evict", "keep", "evict"]
    pruner = TokenPruner(RandomRouter(1), SCHEDULE, kv=kv, parts=parts, skip=skip, compensation=fitted)
    check(model, pruner, list(lengths), 4, "left", [1, 3], DTYPES[finest(name)])


@pytest.mark.parametrize("skip", RANKS)
@pytest.mark.parametrize("decode", ["threshold", "strict"])
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_continuation_tokens_that_skip_are_compensated(skip, decode, kv):
    pruner = pruner_of(skip, router("dynamic", kv, SCHEDULE), kv=kv, decode=decode, window=5)
    logits, keep, _ = at_once(pruner, TEXT)
    for row in (0, 2):
        expected, _, _ = follow_row(MODEL, pruner, TEXT[row], PROMPT, [k[row] for k in keep])
        assert relative(logits[row], expected) < 1e-11
    assert not all(bool(k[:, PROMPT:].all()) for k in keep)


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("skip", RANKS)
def test_a_routed_chunk_is_compensated(skip, kv):
    pruner = pruner_of(skip, kv=kv)
    with torch.no_grad(), pruner(MODEL):
        first = MODEL(TEXT[:, :12], use_cache=True)
        keep = pruner.trace.keep
        with pruner.prompt():
            second = MODEL(TEXT[:, 12:], past_key_values=first.past_key_values)
        keep = [torch.cat(pair, 1) for pair in zip(keep, pruner.trace.keep)]
    for row in range(3):
        decided = [k[row] for k in keep]
        expected = masked_dense(MODEL, decided, decided, pruner.kv, TEXT[row], pruner.compensation)
        assert relative(torch.cat([first.logits, second.logits], 1)[row], expected) < 1e-11


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("skip", RANKS)
@pytest.mark.parametrize("parts", ["block", "attention+mlp"])
def test_the_training_forward_is_the_same_function(skip, kv, parts):
    fitted = fit_compensation(MODEL, windows(), RANKS[skip], parts=parts)
    pruner = TokenPruner(RandomRouter(4), SCHEDULE, kv=kv, parts=parts, skip=skip, compensation=fitted)
    expected, _ = prefill_and_continue(MODEL, pruner, TEXT, 18)
    with torch.no_grad(), pruner(MODEL), pruner.masked(18):
        assert relative(MODEL(TEXT, use_cache=False).logits, expected) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_router_learns_through_a_compensation_that_was_fitted_and_used_in_inference_mode(dtype):
    model = tiny_llama(dtype)
    with torch.inference_mode():
        fitted = fit_compensation(model, windows(), 5)
    pruner = pruner_of("low-rank", compensation=fitted)
    with pruner(model), pruner.masked(18):
        with torch.inference_mode():
            model(TEXT, use_cache=False)
        model(TEXT, use_cache=False).logits[:, 18:].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in pruner.router.parameters())


def test_it_is_computed_in_the_models_dtype():
    model = tiny_llama(torch.bfloat16)
    for skip in RANKS:
        with torch.no_grad(), pruner_of(skip)(model):
            assert model(TEXT).logits.dtype == torch.bfloat16


def test_no_token_left_is_all_compensated():
    """s_l = 1 without reserved tokens: a FixedRouter that keeps nobody."""
    nobody = [torch.zeros(1, 10, dtype=torch.bool)] * BLOCKS
    for kv in ("evict", "keep"):
        pruner = TokenPruner(FixedRouter(nobody), None, kv=kv, skip="low-rank", compensation=FITTED["low-rank"])
        with torch.no_grad(), pruner(MODEL):
            logits = MODEL(TEXT[:1, :10], use_cache=True).logits
        expected, _ = run_row(MODEL, pruner, TEXT[0, :10], 10, keep=[k[0] for k in nobody])
        assert relative(logits[0], expected) < 1e-11


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("parts", ["block", "attention+mlp"])
@pytest.mark.parametrize("skip", RANKS)
def test_nothing_asks_the_device(monkeypatch, skip, kv, parts):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # has no meta device
    fitted = fit_compensation(MODEL, windows(), RANKS[skip], parts=parts)
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv=kv, skip=skip, compensation=fitted, parts=parts)
    model = tiny_llama(torch.float32).to("meta")
    with torch.no_grad(), pruner(model):
        model(torch.zeros(2, 20, dtype=torch.long, device="meta"))


# ---------------------------------------------------------------- the pruner that carries it


def test_what_is_made_of_a_pruner_carries_its_compensation():
    pruner = pruner_of("low-rank", kv="keep")
    assert json.loads(json.dumps(pruner.settings()))["skip"] == "low-rank"
    for other in (pruner.with_schedule(Schedule.uniform(BLOCKS, 0.5)), pruner.changed(decode="strict")):
        assert other.compensation is pruner.compensation and other.kv == pruner.kv and other.skip == "low-rank"
    with pytest.raises(UserError, match="needs to know"):
        TokenPruner(pruner.router, pruner.schedule, **pruner.settings())


def test_another_compensation_is_another_search():
    def identity(fitted):
        made = {"skip": "low-rank", "compensation": fitted} if fitted else {}
        return pruner_identity(MODEL, lambda schedule: TokenPruner(StaticRouter(), schedule, **made))

    other = fit_compensation(MODEL, windows(seed=1), 5)
    found = [identity(one) for one in (None, FITTED["low-rank"], other)]
    assert json.dumps(found)  # it goes into a file
    assert found[1]["compensation"] != found[2]["compensation"] and found[0]["compensation"] is None
    assert found[1] == identity(FITTED["low-rank"])


@pytest.mark.parametrize("parts", ["block", "attention", "attention+mlp"])
def test_replaying_its_decisions_takes_it_along(parts):
    model = tiny_llama(torch.float32)
    fitted = fit_compensation(model, windows(), 2, parts=parts)
    pruner = TokenPruner(RandomRouter(1), SCHEDULE, parts=parts, skip="low-rank", compensation=fitted)
    generator = torch.Generator().manual_seed(0)
    prompts = random_prompts(model, 20, 2, True, generator=generator)
    assert speed.router_overhead(model, pruner, prompts, 2, warmup=0, generator=generator).value < 1.0


REFUSED = {
    "low-rank without": (dict(skip="low-rank"), "fit_compensation"),
    "mean without": (dict(skip="mean"), "fit_compensation"),
    "unknown": (dict(skip="median"), "identity, mean, low-rank"),
    "given but not asked for": (dict(compensation=FITTED["mean"]), "skip='low-rank' or 'mean'"),
    "a map for the mean": (dict(skip="mean", compensation=FITTED["low-rank"]), "rank=0"),
    "the mean for a map": (dict(skip="low-rank", compensation=FITTED["mean"]), "at least 1"),
    "parts": (dict(skip="mean", compensation=FITTED["mean"], parts="attention+mlp"), "parts='attention\\+mlp'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_when_the_pruner_is_made(name):
    arguments, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as refused:
        TokenPruner(StaticRouter(), SCHEDULE, **arguments)
    assert len(str(refused.value).splitlines()) <= 3


def test_another_shape_of_model_is_refused():
    with pytest.raises(UserError, match="4 blocks, the pruner for 5"):
        pruner_of("mean", StaticRouter(), Schedule.uniform(5, 0.5))
    narrow = family("llama", torch.float32, hidden_size=16)
    with pytest.raises(UserError, match="hidden size 32, the model has 16"), pruner_of("mean")(narrow):
        pass
    keep = [torch.ones(1, 10, dtype=torch.bool)] * BLOCKS
    with pytest.raises(UserError, match="address the mlp"):
        TokenPruner(FixedRouter(keep_mlp=keep), None, skip="mean", compensation=FITTED["mean"])


def test_a_fit_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="rank"):
        fit_compensation(MODEL, windows(), WIDTH + 1)
    with pytest.raises(UserError, match="ridge"):
        fit_compensation(MODEL, windows(), 2, ridge=0.0)
    with pytest.raises(UserError, match="no token"):
        fit_compensation(MODEL, windows(prompt=2), 2)
    with pytest.raises(UserError, match="detach"), TokenPruner(StaticRouter(), SCHEDULE)(MODEL):
        fit_compensation(MODEL, windows(), 2)
    with pytest.raises(UserError, match="'queries'"):
        fit_compensation(MODEL, windows(), 2, parts="queries")
    assert not MODEL.model.layers[0]._forward_hooks and not MODEL.model.layers[0]._forward_pre_hooks


def test_states_that_never_change_are_fitted_by_their_mean():
    sums = Moments(3)
    sums.add(torch.ones(5, 3), 2 * torch.ones(5, 3))
    solved = sums.solve(2, 1e-3)
    assert relative(solved["bias"], 2 * torch.ones(3, dtype=torch.float64)) < 1e-12 and not solved["down"].abs().max()


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("parts", ["block", "attention+mlp"])
@pytest.mark.parametrize("skip", RANKS)
def test_saved_and_loaded_is_the_same(tmp_path, skip, parts):
    fitted = fit_compensation(MODEL, windows(), RANKS[skip], parts=parts)
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep", skip=skip, parts=parts, compensation=fitted)
    pruner.save(tmp_path / "p")
    again = TokenPruner.load(tmp_path / "p")
    assert again.settings() == pruner.settings() and again.compensation.sizes() == fitted.sizes()
    assert all(torch.equal(again.compensation.tensors[name], t) for name, t in fitted.tensors.items())
    names = {"pruner.json", "router.safetensors", "compensation.safetensors"}
    assert {f.name for f in (tmp_path / "p").iterdir()} == names
    told = json.loads((tmp_path / "p" / "pruner.json").read_text())["compensation"]
    size = 4 * BLOCKS * WIDTH * (2 * RANKS[skip] + 1) * len(fitted.parts)
    assert told["bytes"] == size < (tmp_path / "p" / "compensation.safetensors").stat().st_size < size + 4096
    again.with_schedule(Schedule.uniform(BLOCKS, 0.25)).save(tmp_path / "p")  # replaced whole, and carried on
    TokenPruner(StaticRouter(), SCHEDULE).save(tmp_path / "p")
    assert {f.name for f in (tmp_path / "p").iterdir()} == names - {"compensation.safetensors"}
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("skip", RANKS)
def test_what_is_zero_is_not_stored_and_bfloat16_takes_half_of_the_bytes(tmp_path, skip):
    few = FITTED[skip].only([1, 3])
    token = torch.ones(1, 1, WIDTH)
    assert not few.update(token, 0).any() and torch.equal(few.update(token, 3), FITTED[skip].update(token, 3))
    sizes = {}
    for name, one in {"all": FITTED[skip], "few": few, "rounded": few.rounded(), "none": few.only([])}.items():
        pruner_of(skip, compensation=one).save(tmp_path / name)
        told = json.loads((tmp_path / name / "pruner.json").read_text())["compensation"]
        again, sizes[name] = TokenPruner.load(tmp_path / name).compensation, told["bytes"]
        assert (
            all(torch.equal(again.tensors[key], t) for key, t in one.tensors.items()) and again.digest() == one.digest()
        )
    assert sizes == {"all": sizes["all"], "few": sizes["all"] // 2, "rounded": sizes["all"] // 4, "none": 0}
    assert relative(few.rounded().update(token, 1), few.update(token, 1)) < 0.02


def test_broken_folders_are_refused_in_words(tmp_path):
    folder, file = tmp_path / "p", tmp_path / "p" / "compensation.safetensors"
    pruner_of("low-rank").save(folder)
    good, told = file.read_bytes(), json.loads((folder / "pruner.json").read_text())["compensation"]

    def refused(words):
        with pytest.raises(UserError, match=words):
            TokenPruner.load(folder)

    file.unlink()
    refused("is not a file")
    file.write_bytes(good[:-100])
    refused("cannot be read")
    file.write_bytes(good + b"x" * 10_000)
    refused("has at most")
    save_file({name: t[..., :3].contiguous() for name, t in FITTED["low-rank"].tensors.items()}, file)
    refused("another shape")
    save_file({name: t * torch.nan for name, t in FITTED["low-rank"].tensors.items()}, file)
    refused("finite")
    save_file({name: t.half() for name, t in FITTED["low-rank"].tensors.items()}, file)
    refused("float32")
    file.write_bytes(good)
    for changes, words in [
        ({"hidden_size": 10**9}, "hidden_size must be"), ({"rank": -1}, "rank must be"), ({"rank": 33}, "rank must be"),
        ({"num_blocks": "4"}, "num_blocks must be"), ({"parts": ["../x"]}, "parts must be"), ({"parts": 3}, "parts"),
        ({"num_blocks": 1000, "hidden_size": 65536, "rank": 60000}, "more than"), ({"dtype": "int8"}, "dtype must be"),
        ({"blocks": [2, 1]}, "blocks must rise"), ({"blocks": [4]}, "blocks must rise"), ({"blocks": 3}, "must rise"),
        ({"blocks": [0, 1]}, "another shape"), ({"dtype": "bfloat16"}, "not bfloat16"),
    ]:  # fmt: skip
        edit(folder, compensation=told | changes)
        refused(words)
    edit(folder, compensation={"rank": 5})
    refused("does not describe")
    edit(folder, compensation=None)
    refused("needs to know")
    edit(folder, compensation=told)
    assert TokenPruner.load(folder).compensation.rank == 5


def test_a_compensation_of_no_stored_size_leaves_the_old_pruner(tmp_path, monkeypatch):
    TokenPruner(StaticRouter(), SCHEDULE).save(tmp_path / "p")
    monkeypatch.setattr("ftp_lightning.disk.pruned_folder._LARGEST_COMPENSATION", 100)
    with pytest.raises(UserError, match="more than the 100"):
        pruner_of("low-rank", StaticRouter()).save(tmp_path / "p")
    assert TokenPruner.load(tmp_path / "p").skip == "identity" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("parts", ["block", "attention", "mlp", "attention+mlp"])
def test_flops_are_those_executed_for_skipped_tokens_alone(kv, parts):
    model = tiny_llama(torch.float32)
    fitted = fit_compensation(model, windows(), 5, parts=parts)
    plain = TokenPruner(StaticRouter(), SCHEDULE, kv=kv, parts=parts)
    pruner = plain.changed(skip="low-rank", compensation=fitted)
    with plain(model):
        before = matrix_flops(model, 60, logits=0)[0]
    with pruner(model):
        added = matrix_flops(model, 60, logits=0)[0] - before
    skipped = sum(round(60 * s) for s in SCHEDULE.sparsity) * (2 if parts == "attention+mlp" else 1)
    assert added == 4 * 5 * WIDTH * skipped
    dense, with_it, without = (
        flops.prompt_flops(flops.block_costs(model, rank), schedule, 60, kv, 0.0, parts)
        for schedule, rank in ((Schedule.uniform(BLOCKS, 0.0), 5), (SCHEDULE, 5), (SCHEDULE, 0))
    )
    assert with_it - without == added
    realised = [flops.realised_flops(model, pruner.trace.prompt, kv, rank=rank)[1] for rank in (0, 5)]
    assert realised[1] - realised[0] == added
    head = flops.head_flops(model)
    limit = flops.speedup_limit(model, SCHEDULE, 60, kv, parts, rank=5)
    assert limit == pytest.approx((dense + head) / (with_it + head))
    assert flops.flops_reduction(model, SCHEDULE, 60, kv, parts, rank=5) == pytest.approx(1 - 1 / limit)
    more, less = (flops.realised_speedup_limit(model, pruner.trace.prompt, kv, rank=rank) for rank in (5, 0))
    assert more < less


def test_the_mean_costs_no_multiplication():
    model = tiny_llama(torch.float32)
    with pruner_of("mean", StaticRouter())(model):
        found = matrix_flops(model, 60)[0]
    assert found == pytest.approx(
        flops.prompt_flops(without_pairs(model), SCHEDULE, 60, "evict", flops.head_flops(model), last_only=True),
        rel=0.01,
    )
    assert pruner_of("mean").skip_rank == 0 and pruner_of("low-rank").skip_rank == 5


def test_padding_is_not_counted_and_a_budget_of_flops_pays_for_it():
    from ftp_lightning.costs.budget import solve_budget
    from ftp_lightning.pruning.trace import Trace

    model, real = tiny_llama(torch.float32), torch.ones(2, 10, dtype=torch.bool)
    real[1, :4] = False
    keep = [real & (torch.arange(10) > 6)] * BLOCKS
    costs = [flops.realised_flops(model, Trace(keep=keep, real=real), "evict", rank=rank)[1] for rank in (0, 3)]
    assert costs[1] - costs[0] == 4 * 3 * WIDTH * BLOCKS * (7 + 3)
    cheap, dear = (solve_budget(model, 0.3, 64, "keep", rank=rank) for rank in (0, 8))
    assert dear.budget > cheap.budget
    assert flops.flops_reduction(model, dear, 64, "keep", rank=8) == pytest.approx(0.3, abs=0.02)


def test_a_decoded_token_that_skips_reads_its_weights():
    model = tiny_llama(torch.float32)
    skipped = [False, True, True, False]
    with_it, without = (
        flops.decode_bytes(model, flops.block_costs(model, rank), [10] * BLOCKS, skipped) for rank in (5, 0)
    )
    assert with_it - without == 2 * (2 * 5 * WIDTH) * 4


# ---------------------------------------------------------------- the command line


def test_train_fits_and_stores_it_and_a_search_carries_it(command):
    tiny = "--model random:tiny --device cpu --tracking none --prompt_tokens 48 --continuation_tokens 8".split()
    sizes = "--steps 1 --batch_size 1 --validations 1 --validation_windows 2 --skip_windows 3".split()
    for skip, rank in (("mean", 0), ("low-rank", 2)):
        status, _, err = command("train", *tiny, *sizes, "--skip", skip, "--skip_rank", 2, "--output", skip)
        assert status == 0, err
        trained = TokenPruner.load(f"{skip}/pruned")
        assert trained.skip == skip and trained.compensation.rank == rank
    search = "--windows 2 --stage_windows 1 --generations 1 --offspring 2 --survivors 1 --batch_size 1".split()
    status, _, err = command("search", *tiny, *search, "--pruned", "low-rank/pruned", "--output", "tuned")
    assert status == 0, err
    tuned = TokenPruner.load("tuned/pruned").compensation.tensors
    assert all(torch.equal(tuned[name], t) for name, t in trained.compensation.tensors.items())
    assert load_file(Path("tuned/pruned/compensation.safetensors")).keys() == tuned.keys()


@pytest.mark.parametrize("parts", ["block", "attention+mlp"])
def test_rows_of_any_length_add_up(parts):
    """Padding is in no sum: a batch of rows has the moments of each row alone, added up."""
    ids = [row.prompt + row.continuation for row in windows(5).rows]
    rows = Rows([Row(row[:p], row[p : p + c]) for row, (p, c) in zip(ids, ((20, 4), (9, 2), (13, 1), (9, 4), (5, 3)))])
    together = gather_moments(MODEL, rows, 3, parts)
    alone = [gather_moments(MODEL, rows.subset([i]), 1, parts) for i in range(5)]
    for part, blocks in together.items():
        for block, found in enumerate(blocks):
            expected = sum((one[part][block] for one in alone[1:]), start=alone[0][part][block])
            assert found.count == expected.count == sum(p - 2 for p in (20, 9, 13, 9, 5))
            for name in ("x", "y", "xx", "yx"):
                torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("skip", RANKS)
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_what_is_read_of_the_last_block_is_compensated(skip, kv):
    """Where few logits are read the last block runs on their tokens alone; those that skip get what `skip` says."""
    for more in ({}, {"removed": [(BLOCKS - 1, "block")]}):
        pruner = pruner_of(skip, RandomRouter(1), kv=kv, **more)
        with torch.no_grad(), pruner(MODEL):
            whole = MODEL(TEXT).logits
            assert not pruner.trace.keep[-1][:, -5:].all()
            part = MODEL(TEXT, logits_to_keep=5).logits
        assert torch.allclose(part, whole[:, -5:])


# ---------------------------------------------------------------- others for smaller budgets


def graded():
    """For budgets of at most 0.1 rank 3 of another text, of at most 0.2 rank 4, beyond rank 5."""
    first, second = (fit_compensation(MODEL, windows(seed=seed), rank) for seed, rank in ((1, 3), (2, 4)))
    return dataclasses.replace(FITTED["low-rank"], smaller=((0.1, first.only([2, 3])), (0.2, second)))


def at(whole, budget, blocks=(2, 3)):
    return whole.under(Schedule([budget * BLOCKS / len(blocks) * (block in blocks) for block in range(BLOCKS)]))


def test_each_budget_gets_the_compensation_that_is_meant_for_it():
    whole = graded()
    (_, first), (_, second) = whole.smaller
    for budget, meant in [(0.01, first), (0.1, first), (0.1 + 1e-12, first), (0.11, second), (0.2, second)]:
        assert at(whole, budget) is meant
    for budget in (0.21, 0.5):
        assert at(whole, budget).digest() == FITTED["low-rank"].digest() != whole.digest()
    assert at(first, 0.4).digest() == first.digest()


def test_maps_that_lack_a_block_are_not_taken_for_it():
    whole = graded()
    (_, first), (_, second) = whole.smaller
    assert at(whole, 0.1, (3,)) is first and at(whole, 0.1, (1, 3)) is second
    few = dataclasses.replace(whole, smaller=whole.smaller[:1])
    assert at(few, 0.1, (0,)).digest() == FITTED["low-rank"].digest()
    nowhere = whole.only([3])
    assert at(nowhere, 0.1, (1, 3)) is nowhere.smaller[0][1]  # none has maps for block 1
    assert first.blocks == {2, 3} and whole.blocks == {0, 1, 2, 3}


def test_what_is_trained_further_stands_where_it_stood():
    whole, other = graded(), FITTED["low-rank"].rounded()
    for budget, digest in ((0.1, 0), (0.2, 1), (0.4, 2)):
        schedule = Schedule([0, 0, 2 * budget, 2 * budget])
        found = whole.with_maps(schedule, other)
        kept = [whole.smaller[0][1], whole.smaller[1][1], whole.under(Schedule.uniform(BLOCKS, 0.9))]
        kept[digest] = other
        assert [one.digest() for _, one in found.smaller] == [one.digest() for one in kept[:2]]
        assert found.under(Schedule.uniform(BLOCKS, 0.9)).digest() == kept[2].digest()


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_a_pruner_adds_what_its_schedule_is_meant_to_get(kv):
    whole, family = graded(), ScheduleFamily([Schedule([0, 0, s, s]) for s in (0.2, 0.4, 0.8)])
    pruner = TokenPruner(StaticRouter(), family.schedules[2], kv, skip="low-rank", compensation=whole, family=family)
    for budget in (0.05, 0.1, 0.15, 0.2, 0.4):
        found = pruner.at(budget)
        alone = found.changed(compensation=found.maps)
        assert found.maps.digest() == at(whole, budget).digest()
        assert found.family is family and found.skip_rank == alone.skip_rank == {0.05: 3, 0.1: 3, 0.4: 5}.get(budget, 4)
        logits = []
        for one in (found, alone):
            with torch.no_grad(), one(MODEL):
                logits.append(MODEL(TEXT).logits)
        assert torch.equal(*logits)
    with torch.no_grad(), pruner.at(0.2).changed(compensation=FITTED["low-rank"])(MODEL):
        assert not torch.allclose(MODEL(TEXT).logits, logits[0])
    assert pruner.at(0.1).at(0.4).maps.digest() == pruner.maps.digest()
    assert [pruner.rank_under(one) for one in (Schedule.uniform(4, 0.1), family.schedules[0])] == [4, 3]


def test_a_cut_is_counted_with_the_rank_of_its_own_maps():
    family = ScheduleFamily([Schedule([0, 0, s, s]) for s in (0.2, 0.4, 0.8)])
    maps = dataclasses.replace(FITTED["low-rank"], smaller=((0.2, fit_compensation(MODEL, windows(), 28)),))
    about = {"kv": "keep", "skip": "low-rank", "compensation": maps, "family": family}
    pruner = TokenPruner(StaticRouter(), family.schedules[2], **about)
    for budget in (0.08, 0.15, 0.35):
        cut = planned_cut(MODEL, pruner.at(budget), 500)
        alone = pruner.at(budget).changed(compensation=pruner.at(budget).maps)
        assert cut == planned_cut(MODEL, alone, 500)
        assert budget_with_cut(MODEL, pruner, cut, 500) == pytest.approx(budget, abs=2e-3)


def test_others_for_smaller_budgets_are_stored_in_the_same_file(tmp_path):
    whole = graded()
    pruner_of("low-rank", StaticRouter(), compensation=whole).save(tmp_path / "p")
    again = TokenPruner.load(tmp_path / "p").compensation
    assert again.digest() == whole.digest()
    assert [budget for budget, _ in again.smaller] == [0.1, 0.2]
    for budget in (0.1, 0.2, 0.3):
        assert at(again, budget).digest() == at(whole, budget).digest()
    file = tmp_path / "p" / "compensation.safetensors"
    assert len(load_file(file)) == 9
    told = json.loads((tmp_path / "p" / "pruner.json").read_text())["compensation"]
    rounded = whole.rounded()
    assert at(rounded, 0.1).digest() == at(whole, 0.1).rounded().digest()
    pruner_of("low-rank", StaticRouter(), compensation=rounded).save(tmp_path / "p")
    assert file.stat().st_size < 0.7 * sum(one["bytes"] for one in (told, *told["smaller"]))
    good = file.read_bytes()
    file.write_bytes(good[:-50])
    with pytest.raises(UserError, match="cannot be read"):
        TokenPruner.load(tmp_path / "p")
    file.write_bytes(good)
    told = json.loads((tmp_path / "p" / "pruner.json").read_text())["compensation"]
    first, second = told["smaller"]
    nameless = {key: value for key, value in first.items() if key != "budget"}
    wrong = [
        [second, first],
        [first],
        [first | {"budget": "x"}, second],
        [first | {"rank": 2}, second],
        [nameless, second],
    ]
    for smaller in (3, [first] * 101, *wrong):
        edit(tmp_path / "p", compensation=told | {"smaller": smaller})
        with pytest.raises(UserError):
            TokenPruner.load(tmp_path / "p")


def test_others_for_smaller_budgets_must_fit():
    low, other = FITTED["low-rank"], fit_compensation(MODEL, windows(), 2, parts="attention")
    mean = FITTED["mean"]
    for smaller in (
        ((0.1, other),),
        ((0.1, mean),),
        ((0.2, low), (0.1, low)),
        ((0.1, low), (0.1, low)),
        ((0.3, graded()),),
    ):
        with pytest.raises(ValueError, match="compensation"):
            dataclasses.replace(low, smaller=smaller)
    for one, budget in ((mean, 0.1), (low, float("nan"))):
        with pytest.raises(ValueError, match="rank"):
            dataclasses.replace(one, smaller=((budget, low),))
    assert (
        dataclasses.replace(low, smaller=((1, low),)).digest()
        == dataclasses.replace(low, smaller=((1.0, low),)).digest()
    )


def test_more_than_a_stored_one_may_have_are_not_stored(tmp_path):
    many = dataclasses.replace(FITTED["low-rank"], smaller=tuple((i / 200, FITTED["low-rank"]) for i in range(101)))
    with pytest.raises(UserError, match="at most 100"):
        pruner_of("low-rank", StaticRouter(), compensation=many).save(tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_one_without_others_is_freed_as_soon_as_nobody_holds_it():
    """Each step of a distillation makes one, and what it was computed from hangs on it."""
    gc.disable()
    try:
        one = dataclasses.replace(FITTED["low-rank"])
        seen = weakref.ref(one)
        assert one.under(SCHEDULE) is one
        del one
        assert seen() is None
    finally:
        gc.enable()


def test_all_of_them_are_for_the_blocks_that_are_asked_for():
    few = graded().only([3])
    for budget in (0.1, 0.2, 0.3):
        assert not any(bool(t[:3].any()) for t in at(few, budget).tensors.values())
    assert at(few.to(dtype=torch.float64), 0.1).tensors["block.bias"].dtype == torch.float64


def test_a_replay_of_decisions_adds_what_the_router_s_run_adds(monkeypatch):
    attached, attach = [], TokenPruner.attach
    monkeypatch.setattr(
        TokenPruner, "attach", lambda self, model: attached.append(self.maps.digest()) or attach(self, model)
    )
    pruner = TokenPruner(StaticRouter(), Schedule([0, 0, 0.2, 0.2]), skip="low-rank", compensation=graded())
    draw = torch.Generator().manual_seed(0)
    speed.router_overhead(MODEL, pruner, random_prompts(MODEL, 20, 1, generator=draw), 1, 0, generator=draw)
    assert len(attached) == 3 and set(attached) == {graded().smaller[0][1].digest()}


def test_rivals_get_the_maps_of_the_pruner_that_they_stand_beside():
    pruner = TokenPruner(StaticRouter(), Schedule([0, 0, 0.2, 0.2]), skip="low-rank", compensation=graded())
    rival = beside("fast_kv", pruner, Setting(MODEL), 200)
    assert rival.compensation.digest() == pruner.maps.digest() and rival.skip_rank == 3
