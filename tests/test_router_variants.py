"""The other routers of the paper's tables, replayed decisions by part, and the context of a continuation."""

import json
from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes

from ftp_lightning import FixedRouter, Schedule, StaticRouter, TokenPruner, UserError, make_router
from ftp_lightning.routing import ROUTERS, RoutingContext
from ftp_lightning.routing.learned import FACTORS, average_rank, factors

N, D, F = 4, 12, len(FACTORS)
LEARNED = ["dynamic", "local", "recurrent", "hidden", "hidden+factors", "one_pass", "projected", "projected_once"]
SEES_HIDDEN = ("hidden", "hidden+factors", "projected", "projected_once")
SCHEDULE = Schedule([0.0, 0.25, 0.5, 0.75])
COUNTS = {
    "dynamic": lambda w: (F + 1) * w + 2 * w + 2,
    "local": lambda w: N * ((F + 1) * w + 2 * w + 2),
    "recurrent": lambda w: 3 * w * (F + w + 2) + 2 * w + 2,
    "hidden": lambda w: (D + 1) * w + 2 * w + 2,
    "hidden+factors": lambda w: (D + F + 1) * w + 2 * w + 2,
    "one_pass": lambda w: (F + 1) * w + N * (2 * w + 2),
    "projected": lambda w: 12 * D + (12 + F + 1) * w + 2 * w + 2,
    "projected_once": lambda w: 12 * D + (12 + F - 1 + 1) * w + 2 * w + 2,
}


def made(name, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_router(name, N, D, **options)


def forward(seed=0, batch=2, tokens=7, padding=2, parts=("block",)):
    """The contexts of one prompt at all blocks; the last row ends in padding, which holds NaN."""
    draw = torch.Generator().manual_seed(seed)
    real = torch.ones(batch, tokens, dtype=torch.bool)
    real[-1, tokens - padding :] = False
    position, lengths = torch.arange(tokens).expand(batch, tokens), real.sum(1, keepdim=True)
    memo = {}
    table = torch.rand(batch, tokens, generator=draw)
    for block, sparsity in enumerate(SCHEDULE.sparsity):
        hidden = torch.randn(batch, tokens, D, generator=draw).masked_fill(~real[..., None], torch.nan)
        kept = (lengths * (1 - sparsity)).round().long().clamp(min=2)
        for part in parts:
            yield RoutingContext(
                block, sparsity, real, position, lengths, kept, table, hidden, None, SCHEDULE.sparsity, part, memo
            )
        table = torch.rand(batch, tokens, generator=draw)


def one_table(contexts):
    """The same contexts under `one_pass`: every block sees the table that block 0 wrote."""
    contexts = list(contexts)
    return [replace(c, attention=contexts[1].attention) for c in contexts]


def contexts_for(name, **arguments):
    return one_table(forward(**arguments)) if name == "one_pass" else list(forward(**arguments))


@pytest.mark.parametrize("name", LEARNED)
def test_parameters_are_as_many_as_written(name):
    assert made(name, width=5).parameter_count == COUNTS[name](5)
    assert made(name).parameter_count == COUNTS[name](16 if name == "recurrent" else 64)


def test_make_router_gives_each_what_it_takes():
    for name, kind in ROUTERS.items():
        names = ("position",) if name == "projected_once" else ("position", "sparsity")
        router = made(name, width=3, names=names, seed=None)
        assert type(router) is kind and not router.needs.attention
        assert router.needs.hidden == (name in SEES_HIDDEN) and (router.needs.once == "from block 0") == (
            name == "one_pass"
        )
        router.check_schedule(SCHEDULE)
    assert made("random", width=3).seed == 0 and make_router("random", N, D, seed=5).seed == 5
    with pytest.raises(UserError, match="unknown"):
        made("oracle")
    with pytest.raises(TypeError, match="no router takes"):
        made("dynamic", widht=3)
    with pytest.raises(UserError, match="leave sparsity out"):
        made("projected_once", names=("position", "sparsity"))
    for wrong in ({"width": 0}, {"names": ()}, {"names": ("rank", "rank")}):
        with pytest.raises(ValueError):
            made("recurrent", **wrong)


def test_another_model_or_schedule_is_refused():
    for name in ROUTERS:
        made(name).check_model(N, D)
    for name, other in [
        ("local", (N + 1, D)),
        ("one_pass", (N - 1, D)),
        ("hidden", (N, 9)),
        ("hidden+factors", (N, 9)),
        ("projected", (N, 9)),
        ("projected_once", (N, 9)),
    ]:
        with pytest.raises(UserError, match="was made for"):
            made(name).check_model(*other)
    with pytest.raises(UserError, match="was made for"):
        FixedRouter([torch.ones(1, 3)] * N).check_model(N + 1, D)
    with pytest.raises(UserError, match="first block, which must be dense"):
        made("one_pass").check_schedule(Schedule([0.1] * N))
    with pytest.raises(ValueError, match="the schedule has 1"):
        made("one_pass").score(replace(next(forward()), schedule=(0.0,)))


@pytest.mark.parametrize("name", LEARNED)
def test_saved_and_loaded_gives_the_same_probability(tmp_path, name):
    router = made(name, width=6)
    TokenPruner(router, SCHEDULE).save(tmp_path / "p")
    again = TokenPruner.load(tmp_path / "p").router
    assert type(again) is type(router) and again.config() == router.config()
    for here, there in zip(contexts_for(name), contexts_for(name)):
        assert torch.equal(router.probability(here), again.probability(there))


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_reach_every_parameter_and_no_padding_spoils_them(name):
    router = made(name)
    (sum(router.probability(c)[c.real].square().sum() for c in contexts_for(name))).backward()
    for label, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), label


@pytest.mark.parametrize("parts", [("block",), ("attention", "mlp")])
@pytest.mark.parametrize("name", LEARNED)
def test_asking_twice_and_in_any_order_changes_nothing(name, parts):
    """Gradients too: those of a forward in which `probability` alone was called, once per block."""

    def run(*calls):
        router = made(name, width=6)
        total, seen = 0.0, []
        for context in contexts_for(name, parts=parts):
            for call in calls:
                with torch.set_grad_enabled(call == "grad"):
                    score = None if call == "grad" else router.score(context)
                    p = router.probability(context)
                assert call == "grad" or not (p.requires_grad or score.requires_grad)
                assert score is None or name == "projected_once" or torch.equal(score[context.real], p[context.real])
            seen.append(p.detach()[context.real])
            with torch.enable_grad():
                total = total + router.probability(context)[context.real].square().sum()
        total.backward()
        return seen, [p.grad for p in router.parameters()]

    expected = run("grad")
    for calls in (("no",), ("no", "grad"), ("grad", "no"), ("no", "no", "grad", "no")):
        seen, gradients = run(*calls)
        assert all(torch.equal(a, b) for a, b in zip(seen, expected[0]))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, expected[1]))


@pytest.mark.parametrize("name", LEARNED)
def test_an_earlier_block_asked_again_knows_nothing_of_later_ones(name):
    router, contexts = made(name), contexts_for(name)
    first = [router.score(c) for c in contexts]
    assert all(torch.equal(router.score(c), p) for c, p in reversed(list(zip(contexts, first))))


def test_ranked_once_is_nested_and_has_the_schedule_as_prior():
    """The order is that of the first routed block, whatever later blocks hold; p = sigmoid(e + log odds of 1 - s)."""
    router, (first, *later) = made("projected_once"), list(forward())[1:]
    e = router.score(first)
    recency = 4 * (first.position / (first.lengths - 1) - 0.5)
    learned = router.logits(first).diff(dim=-1)[..., 0]
    assert torch.allclose(e[first.real], (recency + learned)[first.real], atol=1e-6)
    assert 0 < learned[first.real].abs().max() < 0.1  # untrained: all but the static router's order
    for context in later:
        blind = replace(context, hidden=None, attention=None)
        assert torch.equal(router.score(blind)[first.real], e[first.real])
        odds = (1 - context.sparsity) / context.sparsity
        p = e.exp() * odds / (1 + e.exp() * odds)
        assert torch.allclose(router.probability(blind)[first.real], p[first.real], atol=1e-6)
    other = [made("projected_once").score(context) for context in later]  # not in front of the first: another order
    assert not any(torch.allclose(found[first.real], e[first.real], atol=1e-5) for found in other[1:])
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    for context in list(forward(seed=1))[1:]:  # the token in the middle of a row of 7 has no evidence
        p = router.probability(context)
        assert p[0, 3].item() == pytest.approx(1 - context.sparsity, abs=1e-6) and (p[0].diff() > 0).all()


def test_a_gradient_flows_through_blocks_asked_without():
    """The recurrent state of a block that was only scored has its gradient when a later block is trained."""
    gradients = []
    for early in (torch.no_grad, torch.enable_grad):
        router, contexts = made("recurrent"), list(forward())
        with early():
            for context in contexts[:-1]:
                router.score(context)
        router.probability(contexts[-1])[contexts[-1].real].sum().backward()
        gradients.append([p.grad for p in router.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients))


@pytest.mark.parametrize("name", LEARNED)
def test_float32_also_under_autocast(name):
    router, plain, cast = made(name), contexts_for(name), contexts_for(name)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = [router.score(c) for c in cast]
    assert all(torch.equal(g, router.score(c)) and g.dtype == torch.float32 for g, c in zip(got, plain))


def test_local_blocks_differ_and_each_is_a_dynamic_router():
    router, dynamic = made("local"), made("dynamic")
    context = next(forward())
    scores = [router.score(replace(context, block=block)) for block in range(N)]
    assert all(not torch.equal(a, b) for i, a in enumerate(scores) for b in scores[:i])
    for block, score in enumerate(scores):
        dynamic.mlp.load_state_dict(router.mlps[block].state_dict())
        assert torch.equal(dynamic.score(context), score)


def test_recurrent_remembers_the_blocks_before_and_no_other_token():
    router = made("recurrent")
    ranks = torch.rand(N, 2, 7, generator=torch.Generator().manual_seed(1))  # given: every factor is the token's own
    ranked = [replace(c, rank=rank) for c, rank in zip(forward(padding=0), ranks)]
    asked = [1, 3]

    def last(contexts, blocks=asked):
        memo = {}
        return [router.score(replace(contexts[block], memo=memo)) for block in blocks][-1].detach()

    expected = last(ranked)
    assert not torch.equal(last(ranked, [3]), expected)
    assert not torch.equal(last(ranked, [0, 1, 3]), expected)
    state = None  # the definition: a loop over the blocks that were asked
    for block in asked:
        state = router.cell(factors(ranked[block], FACTORS).flatten(0, 1), state)
    assert torch.equal(router.head(state).softmax(-1)[:, 1].unflatten(0, (2, 7)), expected)
    changed = ranked[1].attention.clone()
    changed[0, 3] += 1
    moved = last([ranked[0], replace(ranked[1], attention=changed), *ranked[2:]]) != expected
    assert moved.nonzero().tolist() == [[0, 3]]


def test_recurrent_parts_follow_each_other():
    router = made("recurrent")
    contexts = list(forward(parts=("attention", "mlp")))
    chain = [router.score(c) for c in contexts]
    as_blocks = [replace(c, part="block", block=site) for site, c in enumerate(contexts)]
    memo = {}
    assert all(torch.equal(router.score(replace(c, memo=memo)), p) for c, p in zip(as_blocks, chain))


@pytest.mark.parametrize("name", ["hidden", "hidden+factors"])
def test_hidden_routers_do_not_see_scale_and_send_no_gradient_below(name):
    router, context = made(name), next(forward())
    p = router.score(context)
    for scale in (1e-6, 1e4):
        assert torch.allclose(router.score(replace(context, hidden=context.hidden * scale)), p, atol=1e-6)
    assert not torch.allclose(router.score(replace(context, hidden=context.hidden.roll(1, -1))), p, atol=1e-3)
    hidden = torch.zeros_like(context.hidden, dtype=torch.bfloat16).requires_grad_()
    p = router.probability(replace(context, hidden=hidden))
    assert p.isfinite().all() and p.dtype == torch.float32
    p.sum().backward()
    assert hidden.grad is None


@pytest.mark.parametrize("names", [FACTORS, ("rank", "sparsity", "position"), ("position", "attention")])
def test_one_pass_equals_block_by_block(names):
    router, contexts = made("one_pass", names=names), contexts_for("one_pass")
    heads = router.heads.weight.view(N, 2, -1), router.heads.bias.view(N, 2)
    for context in [contexts[2], contexts[0], contexts[3], contexts[1]]:
        f = factors(context, names)  # with this block's own sparsity
        logits = router.shared(f).relu() @ heads[0][context.block].T + heads[1][context.block]
        expected = logits.softmax(-1)[..., 1]
        assert torch.allclose(router.score(context)[context.real], expected[context.real], atol=1e-6)
    blind = replace(contexts[1], attention=None)
    assert torch.equal(router.score(blind), router.score(contexts[1]))  # read from the memo, not computed anew


def test_a_given_rank_is_used():
    context = next(forward(padding=0))
    own = average_rank(context.attention, context.real) / 6
    given = own.flip(1)
    assert torch.equal(factors(context, ("rank",))[..., 0], own)
    assert torch.equal(factors(replace(context, rank=given), ("rank",))[..., 0], given)
    router = made("dynamic")
    assert torch.equal(router.score(replace(context, rank=own)), router.score(context))
    assert not torch.equal(router.score(replace(context, rank=given)), router.score(context))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_chunk_of_continuation_equals_its_tokens_one_by_one(name):
    """(B, T) lengths and kept; token i is the last of i + 1, so its position factor is 1."""
    router, draw = made(name), torch.Generator().manual_seed(0)
    lengths = torch.tensor([[1, 2, 3], [8, 9, 10]])
    real = torch.ones(2, 3, dtype=torch.bool)
    table, rank = torch.rand(2, 3, generator=draw), torch.rand(2, 3, generator=draw)
    hidden = torch.randn(2, 3, D, generator=draw)
    kept = (lengths * 0.5).round().long().clamp(min=2).minimum(lengths)

    def contexts(rows, columns):
        memo = {}
        for block in (1, 2):
            cut = [t[rows, columns] for t in (real, lengths - 1, lengths, kept, table, hidden, rank)]
            yield RoutingContext(block, 0.5, *cut, SCHEDULE.sparsity, "block", memo)

    whole = list(contexts(slice(None), slice(None)))
    assert (factors(whole[0], ("position",)) == 1).all()
    scores = [(router.score(c), router.probability(c)) for c in whole]
    for row in range(2):
        for column in range(3):
            alone = contexts(slice(row, row + 1), slice(column, column + 1))
            for context, both in zip(alone, scores):
                assert context.lengths.shape == (1, 1)
                for got, expected in zip((router.score(context), router.probability(context)), both):
                    assert expected.shape == (2, 3) and got.shape == (1, 1)
                    assert torch.allclose(got[0, 0], expected[row, column], atol=1e-6)
    if name == "static":
        assert (scores[0][1] == 1).all()  # it computes every continuation token


def test_fixed_router_with_one_list():
    keep = [torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]), torch.ones(2, 4)]
    router = FixedRouter(keep)
    real = torch.tensor([[True] * 4, [True, False, True, True]])
    assert router.shape == (2, 4) and router.num_blocks == 2 and not router.by_parts
    assert router.keep is router.keep_attention is router.keep_mlp
    for part in ("block", "attention", "mlp"):
        assert router.decision(0, real, part).tolist() == [[1, 0, 1, 1], [1, 0, 0, 0]]
        assert router.host_counts(0, 2, part) == (3, 2) and router.host_counts(0, 2, part, past=1, tokens=2) == (1, 1)
    assert [router.is_all_kept(block) for block in range(2)] == [False, True]
    assert not router.keep[0].all() and router.keep[1].all()
    with pytest.raises(ValueError, match="shape"):
        router.decision(0, real[:, :3])


def test_fixed_router_by_parts():
    skip, full = torch.tensor([[True, False, True]]), torch.ones(1, 3, dtype=torch.bool)
    real = torch.tensor([[True, True, False]])
    router = FixedRouter(keep_mlp=[skip, full])
    assert router.by_parts and router.keep is None and router.keep_attention is None
    assert router.shape == (1, 3) and router.num_blocks == 2
    assert torch.equal(router.decision(0, real, "attention"), real)
    assert torch.equal(router.decision(0, real, "mlp"), real & skip)
    assert router.host_counts(0, 1, "attention") == (3,) and router.host_counts(0, 1, "mlp") == (2,)
    assert not router.is_all_kept(0) and router.is_all_kept(1)
    both = FixedRouter(keep_attention=[full, skip], keep_mlp=[skip, full])
    assert torch.equal(both.decision(1, full, "attention"), skip) and torch.equal(both.decision(1, full, "mlp"), full)
    assert not both.is_all_kept(0) and not both.is_all_kept(1)
    with pytest.raises(ValueError, match="apart"):
        both.decision(0, real)
    for wrong in (
        {},
        {"keep": [skip], "keep_mlp": [skip]},
        {"keep": []},
        {"keep_mlp": [skip], "keep_attention": [skip, skip]},
        {"keep_mlp": [skip], "keep_attention": [torch.ones(1, 4)]},
        {"keep_mlp": [skip[0]]},
    ):
        with pytest.raises(ValueError, match="FixedRouter wants"):
            FixedRouter(**wrong)


def test_fixed_router_addresses_slots():
    mask = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1]]).bool()
    router = FixedRouter([mask])
    real = torch.ones(2, 2, dtype=torch.bool)
    for past in range(5):
        got = router.decision(0, real, past=past, longer=True)
        assert torch.equal(got, mask[:, past : past + 2])
        assert router.host_counts(0, 2, past=past, tokens=2) == tuple(got.sum(1).tolist())
    for past, seen in ((5, real), (0, real[:1]), (-1, real)):
        with pytest.raises(ValueError, match=r"\(2, 6\).*shape \("):
            router.decision(0, seen, past=past, longer=True)
    with pytest.raises(ValueError, match="shape"):
        router.decision(0, real)
    with pytest.raises(ValueError, match="shape"):
        router.host_counts(0, 2, past=3, tokens=4)


def crafted(tmp_path, **router):
    """A stored static pruner whose JSON claims another router."""
    folder = tmp_path / "crafted"
    TokenPruner(StaticRouter(), SCHEDULE).save(folder)
    record = json.loads((folder / "pruner.json").read_text())
    (folder / "pruner.json").write_text(json.dumps(record | {"router": router}))
    return folder


@pytest.mark.parametrize(
    "router",
    [
        {"name": "dynamic", "width": 10**12},
        {"name": "dynamic", "width": 0},
        {"name": "recurrent", "width": 16.5},
        {"name": "local", "num_blocks": 10**9},
        {"name": "local", "num_blocks": True},
        {"name": "hidden", "hidden_size": 10**12},
        {"name": "hidden", "hidden_size": 65536, "width": 4096},  # each is sane, together 1 GB
        {"name": "dynamic", "width": 4096, "names": ["rank"] * 5000},
    ],
)
def test_absurd_sizes_are_refused_before_they_are_allocated(tmp_path, router):
    folder = crafted(tmp_path, **router)
    with LiveBytes() as live, pytest.raises(UserError):
        TokenPruner.load(folder)
    assert live.peak < 1_000_000


def test_a_file_larger_than_its_router_is_refused(tmp_path):
    folder = crafted(tmp_path, name="dynamic", width=64)
    (folder / "router.safetensors").write_bytes(b"\0" * 10_000)
    with pytest.raises(UserError, match="at most"):
        TokenPruner.load(folder)


def test_large_routers_are_stored_up_to_the_cap(tmp_path):
    large = make_router("hidden", 32, 4096)
    TokenPruner(large, SCHEDULE).save(tmp_path / "p")
    assert torch.equal(TokenPruner.load(tmp_path / "p").router.mlp[0].weight, large.mlp[0].weight)
    with pytest.raises(UserError, match="more than"):
        TokenPruner(make_router("hidden", 32, 4096, width=4000), SCHEDULE).save(tmp_path / "q")
    assert not (tmp_path / "q").exists()
