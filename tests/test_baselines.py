"""The peers: each selects as its paper says (a worked example by hand), really skips, and costs what was asked for."""

import math

import pytest
import torch
from oracle import masked_dense, run_row
from test_engine import BLOCKS, MODEL, TEXT, prefill_and_continue, relative

from ftp_lightning import RandomRouter, Schedule, StaticRouter, TokenPruner
from ftp_lightning.baselines.beside import beside
from ftp_lightning.baselines.deletion_random import OneDraw
from ftp_lightning.baselines.deletion_surprisal import SurprisalSelector
from ftp_lightning.baselines.fast_kv import PropagatedSelector
from ftp_lightning.baselines.gem_filter import GemFilterSelector
from ftp_lightning.baselines.names import EQUAL_FLOPS, EQUAL_TOKENS, NEEDS_SENSITIVITY
from ftp_lightning.baselines.peer import from_block, ramp, steps
from ftp_lightning.baselines.registry import METHODS, Profile, Setting, first_dense
from ftp_lightning.baselines.removal import greedy_order
from ftp_lightning.baselines.selectors import AttentionSelector, nested, pooled
from ftp_lightning.baselines.skip_gpt import SkipGPTRouter
from ftp_lightning.baselines.spatten import CumulativeSelector
from ftp_lightning.baselines.zero_tprune import PageRankSelector
from ftp_lightning.costs.flops import row_flops
from ftp_lightning.costs.least_tokens import routed_from
from ftp_lightning.costs.request import planned_cut, row_costs, scout_flops
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.pruning.reads import attention_rank, attention_sums, last_logits
from ftp_lightning.pruning.scores import Tapped, received_attention
from ftp_lightning.routing import HiddenRouter, RoutingContext
from ftp_lightning.training.compensation import fit_compensation

PROMPT = 18
PROFILE = Profile(PROMPT, 0)
SELECTORS = {
    "attention": AttentionSelector, "once": PropagatedSelector, "two passes": lambda: GemFilterSelector(2),
    "surprisal": SurprisalSelector, "one draw": lambda: OneDraw(3), "cumulative": CumulativeSelector,
    "page rank": PageRankSelector,
}  # fmt: skip


def setting(**more):
    windows = Rows.even(TEXT, PROMPT, ["plain"] * len(TEXT), list(range(len(TEXT))))
    about = {"windows": windows, "influence": (0.4, 0.1, 0.3, 0.2), "searched": Schedule([0.0, 0.2, 0.5, 0.9])}
    return Setting(MODEL, **about | more)


def context(attention=None, **more):
    tokens = 4 if attention is None else len(attention)
    real = torch.ones(1, tokens, dtype=torch.bool)
    lengths, kept = torch.tensor([[tokens]]), torch.tensor([[2]])
    table = None if attention is None else torch.tensor([attention])
    about = {"block": 1, "sparsity": 0.5, "attention": table, "padded": False, "lengths": lengths, "kept": kept}
    return RoutingContext(real=real, position=torch.arange(tokens)[None], **about | more)


def order(score):
    """Tokens, the first to be computed at the head."""
    return score[0].argsort(descending=True, stable=True).tolist()


def tapped(probability):
    """One head whose attention is this lower triangular matrix, whose keys are the queries."""
    tokens = len(probability)
    logits = torch.tensor(probability).clamp(min=1e-30).log()
    key = torch.eye(tokens)[None, None]
    slots = Tokens(torch.arange(tokens)[None], torch.ones(1, tokens, dtype=torch.bool), True)
    return Tapped(logits[None, None], key, 1.0, None, None), slots


# ---------------------------------------------------------------- rankings, by hand

ATTENTION = [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.8, 0.1, 0], [0.2, 0.1, 0.6, 0.1]]


def test_the_last_tokens_attention_ranks_for_lazy_llm():
    what, slots = tapped(ATTENTION)
    scores, seen = received_attention(what, slots, slots, METHODS["lazy_llm"].window)
    assert seen.all() and torch.allclose(scores, 4 * torch.tensor([[0.2, 0.1, 0.6, 0.1]]), atol=1e-6)
    assert order(AttentionSelector().score(context(scores[0].tolist())))[:2] == [2, 0]
    assert steps(8).sparsity == (0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1)


def test_attention_of_all_queries_adds_up_over_blocks_for_spatten():
    what, slots = tapped(ATTENTION)
    scores, _ = attention_sums(what, slots, slots, 4)
    assert torch.allclose(scores, torch.tensor([[1.8, 1.4, 0.7, 0.1]]), atol=1e-6)
    from ftp_lightning.pruning.scores import PromptTable

    assert CumulativeSelector.needs.adds_up and CumulativeSelector.needs.reads is attention_sums
    table = PromptTable(torch.zeros(1, 4), adds_up=CumulativeSelector.needs.adds_up)
    for write in ([1.8, 1.4, 0.7, 0.1], [0.0, 0.1, 2.0, 0.9]):
        table.write(torch.tensor([write]), torch.ones(1, 4, dtype=torch.bool), None)
    assert order(CumulativeSelector().score(context(table.own[0].tolist()))) == [2, 0, 1, 3]
    assert ramp(5).sparsity == (0, 0.25, 0.5, 0.75, 1)


def test_a_cascade_never_takes_back_a_dropped_token_while_others_are_left():
    entered = torch.tensor([[True, False, True, False]])
    assert order(nested(torch.tensor([[0.1, 9.0, 0.2, 5.0]]), context(entered=entered))) == [2, 0, 1, 3]


def test_page_rank_prefers_what_important_tokens_attend_to():
    """Token 3 attends to 2 alone, and 2 to 1 alone: 1 inherits; 0 has only what starts attend to."""
    chain = [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]]
    what, slots = tapped(chain)
    scores, valid = attention_rank(what, slots, slots, 4, iterations=2, damping=0.5)
    assert PageRankSelector.needs.reads is attention_rank
    p, s = torch.tensor(chain), torch.full((4,), 0.25)
    even, u = torch.tensor([[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [1 / 3] * 3 + [0], [1 / 4] * 4]), s
    for _ in range(2):
        s, u = 0.125 + 0.5 * p.T @ s, 0.125 + 0.5 * even.T @ u
    assert s.tolist() == pytest.approx([0.359375, 0.328125, 0.1875, 0.125])  # by pencil: .125 + .5 (...)
    assert valid.all() and torch.allclose(scores[0], s / u, atol=1e-6)
    assert order(PageRankSelector().score(context(scores[0].tolist())))[:2] == [1, 2]
    uniform, _ = attention_rank(tapped(even.tolist())[0], slots, slots, 4)
    assert torch.allclose(uniform, torch.ones(1, 4), atol=1e-5)


def test_fast_kv_pools_over_neighbours_and_decides_once():
    assert pooled(torch.tensor([[3.0, 0, 0, 6]]), torch.ones(1, 4).bool(), 3).tolist() == [[1.5, 1, 2, 3]]
    with_padding = pooled(torch.tensor([[9.0, 3, 0, 6]]), torch.tensor([[False, True, True, True]]), 3)
    assert with_padding[0, 1:].tolist() == [1.5, 3, 3]
    router, memo = PropagatedSelector(), {}
    first = router.score(context([0.0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 4, 0] + [99.0] * 8, memo=memo))
    assert order(first)[:8] == list(range(12, 20))  # those that ask; the others by 9/4 .. 9/7, 4/7 .. 4/4
    assert [round(x, 2) for x in first[0, :12].tolist()] == [2.25, 1.8, 1.5, *[1.29] * 4, 0.57, 0.57, 0.67, 0.8, 1]
    assert router.score(context([5.0] * 20, memo=memo)) is first
    assert from_block(4, 2).sparsity == (0, 0, 1, 1)


def test_surprising_tokens_come_first():
    assert order(SurprisalSelector().score(context(scouted=torch.tensor([[math.inf, 0.3, 2.0, 1.0]])))) == [0, 2, 3, 1]


def test_gem_filter_adds_up_the_last_tokens_logits_and_pools():
    """Two heads of size 1: q k_j of the last token are 2 k and -1 k'; means of 5 neighbours, fewer at the ends."""
    query = torch.tensor([[[[9.0], [9.0], [2.0]], [[9.0], [9.0], [-1.0]]]])
    key = torch.tensor([[[[1.0], [0.0], [3.0]], [[0.0], [4.0], [2.0]]]])
    _, slots = tapped([[1.0, 0, 0]] * 3)
    said, seen = last_logits(Tapped(query, key, 0.5, None, None), slots, slots, 3)
    assert said.tolist() == [[0.5, -1.0, 1.0]] and seen.all()
    ten = torch.tensor([[0.0, 0, 5, 0, 0, 0, 0, -5, 0, 0]])
    about = context([0.0] * 10, scouted=ten)
    assert GemFilterSelector(3).needs.reads is last_logits and GemFilterSelector(3).needs.scout.blocks == 3
    assert GemFilterSelector(1).score(about)[0].tolist() == pytest.approx(
        [5 / 3, 5 / 4, 1, 1, 1, -1, -1, -1, -5 / 4, -5 / 3]
    )


def test_random_deletion_draws_once_for_all_blocks_and_random_tokens_anew():
    contexts = [context(block=block) for block in (0, 1)]
    once, anew = ([router.score(c) for c in contexts] for router in (OneDraw(5), RandomRouter(5)))
    assert torch.equal(*once) and not torch.equal(*anew)


def test_recent_and_sink():
    score = StaticRouter().score(context())
    assert order(score) == [0, 3, 2, 1]


def test_short_gpt_removes_the_least_influential_blocks_first():
    assert list(METHODS["short_gpt"].order(setting())) == [(1, "block"), (3, "block"), (2, "block")]


def test_block_pruner_takes_what_hurts_least_beside_what_is_gone():
    """b alone hurts least; beside b, c hurts more than a although alone it hurts less."""
    alone, together = {"a": 2.0, "b": 1.0, "c": 1.5}, {frozenset("bc"): 9.0}
    measured = []

    def measure(removed):
        measured.append("".join(removed))
        return sum(alone[part] for part in removed) + together.get(frozenset(removed), 0.0)

    found = greedy_order(list("abc"), measure)
    assert next(found) == "b" and measured == ["a", "b", "c"]
    assert list(found) == ["a", "c"] and measured[3:] == ["ba", "bc", "bac"]


def test_block_pruner_minimises_the_loss_of_the_model():
    peer, here = METHODS["block_pruner"], setting()
    first = next(peer.order(here))
    parts = [(block, part) for block in range(BLOCKS) for part in ("attention", "mlp")]
    assert first == min(parts, key=lambda part: peer.loss(here, [part]))
    assert here.memo[peer.ORDER] == [first]


def test_skip_gpt_has_a_map_for_each_part_and_mod_one_for_all_blocks():
    router = SkipGPTRouter(2, 3)
    with torch.no_grad():
        for part, row in (("attention", [1.0, 0, 0]), ("mlp", [0, 0, 1.0])):
            router.maps[part][1].weight.copy_(torch.tensor([[0.0] * 3, row]))
            router.maps[part][1].bias.zero_()
    hidden = torch.tensor([[[3.0, 1, 0], [0, 1, 3], [1, 3, 1], [2, 1, 1]]])
    asked = [order(router.score(context(hidden=hidden, part=part))) for part in ("attention", "mlp")]
    assert asked == [[0, 3, 2, 1], [1, 3, 2, 0]]
    router = HiddenRouter(3, width=1)
    with torch.no_grad():
        for p, values in zip(router.parameters(), ([[1.0, 0, 0]], [0.0], [[0.0], [1.0]], [0.0, 0.0])):
            p.copy_(torch.tensor(values))
    assert order(router.score(context(hidden=hidden))) == [0, 3, 2, 1]
    [(_, every_other)] = METHODS["mod"].tries(setting())
    assert every_other.sparsity == (0, 1, 0, 1)


def test_ffn_only_ranks_by_attention_and_leaves_attention_alone():
    pruner = METHODS["ffn_only"].place(setting(), 0.15, PROFILE)
    _, trace = prefill_and_continue(MODEL, pruner, TEXT[:1], PROMPT)
    assert all(keep.all() for keep in trace.keep_attention) and trace.keep_mlp[0].all() and trace.keep_mlp[3].all()
    assert not trace.keep_mlp[1].all() and not trace.keep_mlp[2].all()
    assert order(pruner.router.score(context([0.3, 2.0, 1.0]))) == [1, 2, 0]


def test_the_last_block_is_free():
    pruner = METHODS["last_block_free"].place(setting(), 0.5, PROFILE)
    pruned, trace = prefill_and_continue(MODEL, pruner, TEXT, PROMPT)
    assert trace.sparsity[:-1] == [0, 0, 0] and trace.sparsity[-1] == pytest.approx(16 / 18)
    dense = MODEL(input_ids=TEXT).logits
    assert relative(pruned[:, PROMPT - 1 :], dense[:, PROMPT - 1 :]) < 1e-11


# ---------------------------------------------------------------- the seams, against the slow twin


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("kv", ["evict", "keep", ("evict", "keep", "keep", "evict")])
def test_selectors_equal_the_oracle(selector, kv):
    router, window = SELECTORS[selector](), 1 if selector == "attention" else 5
    pruner = TokenPruner(router, Schedule([0.0, 0.3, 0.2, 0.6]), kv=kv, window=window)
    logits, trace = prefill_and_continue(MODEL, pruner, TEXT, PROMPT)
    for row in range(len(TEXT)):
        expected, keep = run_row(MODEL, pruner, TEXT[row], PROMPT)
        assert all(torch.equal(k[row], e) for k, e in zip(trace.keep, keep))
        assert relative(logits[row], expected) < 1e-11


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_the_training_forward_decides_and_computes_the_same(selector, kv):
    pruner = TokenPruner(SELECTORS[selector](), Schedule([0.0, 0.3, 0.5, 0.6]), kv=kv, window=4)
    logits, trace = prefill_and_continue(MODEL, pruner, TEXT, PROMPT)
    with torch.no_grad(), pruner(MODEL), pruner.masked(PROMPT):
        masked = MODEL(input_ids=TEXT, use_cache=False).logits
        assert all(torch.equal(m[:, :PROMPT], k) for m, k in zip(pruner.trace.keep, trace.keep))
    assert relative(masked[:, PROMPT - 1 :], logits[:, PROMPT - 1 :]) < 1e-11


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_select_alone(selector, kv, side):
    pruner = TokenPruner(SELECTORS[selector](), Schedule([0.0, 0.5, 0.6, 0.6]), kv=kv, window=4)
    lengths, ids = (24, 15, 9), torch.zeros(3, 24, dtype=torch.long)
    mask, places = torch.zeros_like(ids), [slice(0, n) if side == "right" else slice(24 - n, 24) for n in lengths]
    for row, place in enumerate(places):
        ids[row, place], mask[row, place] = TEXT[row, : lengths[row]], 1
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), pruner(MODEL):
        logits = MODEL(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        keep = pruner.trace.keep
        for row, place in enumerate(places):
            alone = MODEL(input_ids=TEXT[row : row + 1, : lengths[row]], use_cache=False).logits[0]
            assert all(torch.equal(k[row, place], a[0]) for k, a in zip(keep, pruner.trace.keep))
            assert relative(logits[row, place][keep[-1][row, place]], alone[keep[-1][row, place]]) < 1e-11


@pytest.mark.parametrize("removed", [[(0, "block")], [(1, "block"), (3, "block")], [(b, "block") for b in range(4)]])
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_removed_blocks_equal_the_oracle(removed, kv):
    gone = {block for block, _ in removed}
    schedule = Schedule([0.0 if block in gone else 0.4 for block in range(BLOCKS)])
    pruner = TokenPruner(StaticRouter(), schedule, kv=kv, removed=removed)
    logits, trace = prefill_and_continue(MODEL, pruner, TEXT, PROMPT)
    kept = [torch.cat([k[0], torch.full((6,), block not in gone)]) for block, k in enumerate(trace.keep)]
    modes = ["evict" if block in gone else kv for block in range(BLOCKS)]
    expected = masked_dense(MODEL, kept, kept, modes, TEXT[0])
    assert relative(logits[0], expected) < 1e-11
    assert all(not trace.keep[block].any() for block in gone)


@pytest.mark.parametrize("parts", ["block", "attention+mlp"])
def test_removed_parts_equal_the_oracle_and_are_removed_step_by_step(parts):
    removed = [(0, "attention"), (1, "mlp"), (2, "block"), (3, "attention")]
    router = RandomRouter(1)
    pruner = TokenPruner(router, Schedule([0.3, 0.5, 0.0, 0.4]), kv="keep", removed=removed, parts=parts)
    logits, trace = prefill_and_continue(MODEL, pruner, TEXT[:1], PROMPT)
    after = torch.ones(6, dtype=torch.bool)
    kept = {"attention": [], "mlp": []}
    for block in range(BLOCKS):
        for part, keep in (("attention", trace.keep_attention), ("mlp", trace.keep_mlp)):
            gone = part in pruner.removed_parts(block)
            assert not gone or not keep[block].any()
            kept[part].append(torch.cat([keep[block][0], after & (not gone)]))
    expected = masked_dense(MODEL, kept["attention"], kept["mlp"], pruner.kv, TEXT[0])
    assert relative(logits[0], expected) < 1e-11
    with torch.no_grad(), pruner(MODEL):
        cache = MODEL(input_ids=TEXT[:1, :PROMPT], use_cache=True).past_key_values
        one_by_one = [
            MODEL(input_ids=TEXT[:1, t : t + 1], past_key_values=cache, use_cache=True).logits
            for t in range(PROMPT, TEXT.shape[1])
        ]
        generated = MODEL.generate(TEXT[:1, :PROMPT], max_new_tokens=4, do_sample=False)
    assert relative(torch.cat(one_by_one, 1), logits[:, PROMPT:]) < 1e-11
    assert generated.shape[1] == PROMPT + 4 and cache.layers[0].keys.shape[2] == 0


def test_removed_parts_in_the_training_forward():
    pruner = TokenPruner(
        StaticRouter(), Schedule([0.0, 0.5, 0.0, 0.4]), kv="keep", removed=[(0, "block"), (1, "attention")]
    )
    logits, _ = prefill_and_continue(MODEL, pruner, TEXT, PROMPT)
    with torch.no_grad(), pruner(MODEL), pruner.masked(PROMPT):
        masked = MODEL(input_ids=TEXT, use_cache=False).logits
    assert relative(masked[:, PROMPT - 1 :], logits[:, PROMPT - 1 :]) < 1e-11


def test_what_is_wrong_is_told():
    with pytest.raises(UserError, match="no probabilities"):
        TokenPruner(AttentionSelector(), Schedule([0.5] * 4), decode="threshold")
    with pytest.raises(ValueError, match="removed names"):
        TokenPruner(StaticRouter(), Schedule([0.5] * 4), removed=[(4, "block")])
    with pytest.raises(UserError, match="own schedule only"):
        METHODS["short_gpt"].place(setting(), 0.3, PROFILE, form=Schedule([1.0] * 4))
    with pytest.raises(UserError, match="needs `influence`"):
        METHODS["short_gpt"].place(Setting(MODEL), 0.3, PROFILE)
    with pytest.raises(UserError, match="cannot be reached"):
        METHODS["mod"].place(setting(), 0.7, PROFILE)
    with pytest.raises(UserError, match="cannot be stored"):
        TokenPruner(StaticRouter(), Schedule([0.5] * 4), removed=[(0, "mlp")]).save("nowhere")


# ---------------------------------------------------------------- equal cost

COARSE = {"short_gpt", "block_pruner"}
SCALED = [name for name in METHODS if name not in {"last_block_free", "deletion_surprisal", "default", *COARSE}]


@pytest.mark.parametrize("new_tokens", [0, 6])
@pytest.mark.parametrize("name", [*SCALED, *sorted(COARSE)])
def test_every_peer_is_placed_at_the_cut_and_realises_it(name, new_tokens):
    here, profile = setting(), Profile(PROMPT, new_tokens)
    cut = 0.15 if name in ("ffn_only", "mod") or new_tokens else 0.3
    pruner = METHODS[name].place(here, cut, profile)
    planned = planned_cut(MODEL, pruner, PROMPT, new_tokens)
    assert abs(planned - cut) < (0.15 if name in COARSE else 0.04)
    prefill_and_continue(MODEL, pruner, TEXT, PROMPT)
    assert row_costs(MODEL, pruner, pruner.trace.prompt, new_tokens).cut == pytest.approx(planned, abs=0.03)


@pytest.mark.parametrize("name", ["topk", "threshold", "short_gpt", "gem_filter", "deletion_surprisal"])
def test_the_costs_of_rows_are_those_of_each_alone(name):
    """Of padded prompts too, with as many new tokens as each row has; looks and removed parts are in them."""
    prompts, new = [row[:n].tolist() for row, n in zip(TEXT, (18, 9, 13))], [0, 6, 3]
    rows = Rows([Row(ids, [1] * 4) for ids in prompts])
    pruner = TokenPruner(
        StaticRouter(), Schedule.uniform(4, 0.5), choice="threshold" if name == "threshold" else "topk"
    )
    if name in METHODS:
        pruner = METHODS[name].place(setting(), 0.1, PROFILE)

    def costs(batch, new_tokens):
        with torch.no_grad(), pruner(MODEL):
            continuation_logits(MODEL, **batch)
        return row_costs(MODEL, pruner, pruner.trace.prompt, new_tokens)

    together = costs(rows.batch(range(3)), new)
    alone = [costs(rows.batch([i]), [new[i]]) for i in range(3)]
    for column in ("dense_flops", "flops", "dense_kv_bytes", "kv_bytes"):
        assert getattr(together, column) == pytest.approx([getattr(one, column)[0] for one in alone])
    tokens, looked = len(prompts[2]), pruner.router.needs.scout is not None
    _, computed = row_flops(MODEL, pruner.trace.prompt, pruner.kv, new[2], 0, pruner.removed)
    look = scout_flops(MODEL, pruner.router.needs.scout, tokens)
    assert alone[2].flops == pytest.approx([computed.item() + look]) and (look > 0) == looked
    whole = row_costs(MODEL, pruner, pruner.trace.prompt, new[2]).cut
    assert whole == pytest.approx(alone[2].cut) and together.cut == pytest.approx(
        1 - sum(together.flops) / sum(together.dense_flops)
    )


def test_a_look_is_charged():
    surprisal = METHODS["deletion_surprisal"].place(setting(), 0.3, PROFILE)
    assert planned_cut(MODEL, surprisal, PROMPT) < -0.7  # what it deletes is gone, a prefill and its logits are added
    filtered = METHODS["gem_filter"].place(setting(), 0.3, PROFILE)
    unlooked = TokenPruner(StaticRouter(), filtered.schedule, kv="evict")
    assert planned_cut(MODEL, unlooked, PROMPT) > planned_cut(MODEL, filtered, PROMPT) + 0.1


def test_selectors_stand_under_each_others_schedules():
    form = first_dense(Schedule([0.5, 0.2, 0.5, 0.8]))
    for name, peer in METHODS.items():
        if not peer.own_schedule_only:
            pruner = peer.place(setting(), 0.1, PROFILE, form, kv="keep")
            assert set(pruner.kv) == {"keep"} and pruner.schedule.sparsity[0] == 0.0, name
            ratio = pruner.schedule.sparsity[3] / pruner.schedule.sparsity[1]
            assert ratio == pytest.approx(4.0) or pruner.schedule.sparsity[3] == 1.0


def test_compensation_for_all_or_none():
    for name in SCALED:
        for rank in (0, 2):
            pruner = METHODS[name].place(setting(rank=rank), 0.12, PROFILE)
            assert pruner.skip_rank == rank and (pruner.skip == "low-rank") == bool(rank), name
    pruner = METHODS["short_gpt"].place(setting(rank=2), 0.25, PROFILE)
    compensated, trace = prefill_and_continue(MODEL, pruner, TEXT[:1], PROMPT)
    kept = [torch.cat([k[0], k[0, :6]]) for k in trace.keep]
    expected = masked_dense(MODEL, kept, kept, pruner.kv, TEXT[0], pruner.compensation)
    assert relative(compensated[0], expected) < 1e-5


def test_every_method_has_one_name():
    """No two names of the registry give the same pruner."""
    found = {name: peer.place(setting(), 0.1, PROFILE) for name, peer in METHODS.items()}
    same = [(a, b) for a in found for b in found if a < b and found[a].identity() == found[b].identity()]
    assert not same
    assert {"static", "dynamic"} <= set(METHODS)  # as results.json, the report and --router call them


def compared(name, chosen, **more):
    return beside(name, chosen, setting(**more), 200)


def test_names_of_flags_are_those_of_the_registry():
    assert set(EQUAL_TOKENS) <= set(METHODS) and set(EQUAL_FLOPS) <= set(METHODS)
    assert not set(EQUAL_TOKENS) & set(EQUAL_FLOPS)
    assert not [name for name in EQUAL_FLOPS if METHODS[name].trained]


@pytest.mark.parametrize(
    "name", sorted(set(EQUAL_FLOPS) - {"short_gpt", "last_block_free", "deletion_surprisal", "ffn_only"})
)
def test_methods_at_equal_flops_cost_what_the_pruner_asked_about_costs(name):
    chosen = TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.3), kv="evict")
    found = compared(name, chosen)
    assert planned_cut(MODEL, found, 200) == pytest.approx(planned_cut(MODEL, chosen, 200), abs=0.005)


@pytest.mark.parametrize("name", ["uniform", "late_blocks", "fast_kv"])
@pytest.mark.parametrize("least", [150, "auto"])
def test_a_method_computes_those_prompts_densely_that_the_pruner_does(name, least):
    chosen = TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.3), kv="evict", least_tokens=least)
    found, start = compared(name, chosen), routed_from(MODEL, chosen)
    assert planned_cut(MODEL, chosen, start - 1) == planned_cut(MODEL, found, start - 1) == 0.0
    assert planned_cut(MODEL, found, start) > 0.02 and routed_from(MODEL, found) == start
    text = TEXT[:1].repeat(1, 1 + 149 // TEXT.shape[1])
    with torch.no_grad(), found(MODEL):
        MODEL(text[:, :149])
    assert found.trace.too_short and found.trace.sparsity == [0.0] * BLOCKS


def test_removed_parts_are_entered_by_no_prompt_however_short():
    removed = TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.0), removed=[(1, "block")], least_tokens=150)
    assert routed_from(MODEL, removed) == 0 and planned_cut(MODEL, removed, 100) > 0.1


@pytest.mark.parametrize("name", EQUAL_TOKENS)
def test_methods_at_equal_tokens_share_budget_and_all_settings(name):
    compensation = fit_compensation(MODEL, setting().windows, 2)
    more = {"kv": "keep", "skip": "low-rank", "compensation": compensation, "decode": "strict", "window": 5}
    chosen = TokenPruner(StaticRouter(), Schedule([0.0, 0.2, 0.5, 0.9]), **more)
    found = compared(name, chosen)
    assert found.settings() == chosen.settings() and found.compensation is compensation
    assert found.scheduled.budget == pytest.approx(chosen.scheduled.budget, abs=1e-9)


@pytest.mark.parametrize("name", ["lazy_llm", "late_blocks", "ffn_only"])
def test_peers_get_the_compensation_of_the_pruner_where_it_fits(name):
    compensation = fit_compensation(MODEL, setting().windows, 2)
    more = {"skip": "low-rank", "compensation": compensation}
    found = compared(name, TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.1), **more))
    assert (found.compensation is compensation) is (found.parts == "block")
    assert found.skip == ("low-rank" if found.parts == "block" else "identity")


def test_random_tokens_beside_a_pruner_differ_by_seed():
    chosen = TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.5))
    assert [compared("random", chosen, seed=seed).router.seed for seed in (0, 7)] == [0, 7]


def test_late_blocks_skip_from_the_last_one_down():
    found = METHODS["late_blocks"].place(setting(), 0.4, PROFILE)
    assert found.schedule.sparsity[0] == 0.0 and found.schedule.sparsity[-1] == 1.0 and set(found.kv) == {"keep"}
    assert list(found.schedule.sparsity) == sorted(found.schedule.sparsity)
    assert sum(0.0 < s < 1.0 for s in found.schedule.sparsity) <= 1
    with pytest.raises(UserError, match="the first block must stay"):
        METHODS["late_blocks"].place(setting(), 0.9, PROFILE)


def test_evaluate_asks_for_what_a_method_needs():
    from ftp_lightning.stages.evaluate import EvaluateStage

    for name in NEEDS_SENSITIVITY:
        with pytest.raises(UserError, match="sensitivity FILE"):
            EvaluateStage(compare=(name,), output="nowhere")
    with pytest.raises(UserError, match="must be among random"):
        EvaluateStage(compare=("nonesuch",), output="nowhere")
