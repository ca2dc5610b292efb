"""Continuation tokens under a decode policy: held to a twin that knows neither cache nor chunks nor batches."""

import copy
import functools

import pytest
import torch
from families import family
from grid_cases import pairwise
from oracle import follow_row, masked_dense, run_row
from test_engine import BLOCKS, MODEL, relative
from transformers import DynamicCache

from ftp_lightning import FixedRouter, RandomRouter, Schedule, StaticRouter, TokenPruner
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits, sequence_logits
from ftp_lightning.pruning import score_log
from ftp_lightning.routing import make_router

TEXT = torch.randint(3, 64, (3, 30), generator=torch.Generator().manual_seed(1))
PROMPT = 16
SCHEDULE = Schedule([0.0, 0.6, 0.4, 0.7])
ROUTED_FIRST = Schedule([0.5, 0.6, 0.0, 0.7])  # a dense block between routed ones, a routed one at the start
NONE_DENSE = Schedule([0.5, 0.6, 0.4, 0.7])  # no block writes all scores anew
LEARNED = ("dynamic", "local", "recurrent", "hidden", "one_pass", "projected_once")
NAMES = ("static", "random", *LEARNED)
KV = ("evict", "keep", ("evict", "keep", "keep", "evict"))
DECODE = ("dense", "threshold", "strict")


def pruner_of(name, decode, kv="evict", schedule=SCHEDULE):
    return TokenPruner(router(name, kv, schedule), schedule, kv=kv, decode=decode, window=5)


@functools.cache
def router(name, kv, schedule):
    """A router whose decisions vary: random weights larger than the initial ones, and the bias of its head such that
    p_compute is 0.5 in the middle."""
    torch.manual_seed(0)
    made = make_router("dynamic", BLOCKS, 32, names=("rank",)) if name == "rank" else make_router(name, BLOCKS, 32)
    heads = [m for m in made.modules() if isinstance(m, torch.nn.Linear) and m.out_features in (2, 2 * BLOCKS)]
    if heads:
        with torch.no_grad():
            for p in made.parameters():
                p.mul_(4.0 if p.dim() > 1 else 1.0)
            middle = middle_logit(TokenPruner(made, schedule, kv=kv, decode="threshold", window=5))
            for head in heads:
                head.bias[1::2] -= middle
    return made


def middle_logit(pruner):
    """The middle of what the router says of a few continuation tokens, where few tokens are near it."""
    said, ask = [], pruner.router.probability

    def listen(context):
        said.append(ask(context))
        return said[-1]

    pruner.router.probability = listen
    with pruner(MODEL):
        MODEL(TEXT[:, PROMPT:], past_key_values=prefill(pruner, TEXT))
    del pruner.router.probability
    ordered = torch.logit(torch.cat(said)).round(decimals=3).unique()
    ordered = ordered[len(ordered) * 2 // 5 : len(ordered) * 3 // 5]
    widest = int(ordered.diff().argmax())
    return ordered[widest : widest + 2].mean()


def prefill(pruner, ids, prompt=PROMPT):
    return MODEL(ids[:, :prompt], use_cache=True).past_key_values


def at_once(pruner, ids, prompt=PROMPT):
    """Logits of the continuation, N x (B, T) decisions of the whole text, the cache."""
    with torch.no_grad(), pruner(MODEL):
        cache = prefill(pruner, ids, prompt)
        first = pruner.trace.keep
        logits = MODEL(ids[:, prompt:], past_key_values=cache).logits
    return logits, [torch.cat(pair, 1) for pair in zip(first, pruner.trace.keep)], cache


def stepwise(pruner, ids, prompt=PROMPT):
    with torch.no_grad(), pruner(MODEL):
        cache = prefill(pruner, ids, prompt)
        keep, logits = [pruner.trace.keep], []
        for t in range(prompt, ids.shape[1]):
            logits.append(MODEL(ids[:, t : t + 1], past_key_values=cache).logits)
            keep.append(pruner.trace.keep)
    return torch.cat(logits, 1), [torch.cat(parts, 1) for parts in zip(*keep)], cache


@pytest.mark.parametrize("name, decode, kv", pairwise(NAMES, DECODE, KV))
def test_decisions_and_logits_are_the_twins(name, decode, kv):
    schedule = SCHEDULE if name == "one_pass" else ROUTED_FIRST if kv == "evict" else SCHEDULE
    pruner = pruner_of(name, decode, kv, schedule)
    logits, keep, _ = at_once(pruner, TEXT)
    compared, skipped, total = 0, 0, 0
    for row in (0, 2):
        mine = [k[row] for k in keep]
        expected, probability, computes = follow_row(MODEL, pruner, TEXT[row], PROMPT, mine)
        assert relative(logits[row], expected) < 1e-11
        for block, (ps, decided) in enumerate(zip(probability, computes)):
            found = mine[block][PROMPT:].tolist()
            for p, wanted, got in zip(ps, decided, found):
                if p is None:
                    assert got
                elif abs(p - 0.5) > 1e-4:
                    assert got == wanted, (row, block, p)
                    compared += 1
                    skipped += not got
                total += p is not None
    if decode == "dense" or name == "static":
        assert all(k[:, PROMPT:].all() for k in keep)
    else:
        assert compared > 0.95 * total and 0.1 * total < skipped < 0.9 * total, (compared, skipped, total)


@pytest.mark.parametrize("name, decode, kv", pairwise(NAMES, DECODE, ["evict", "keep"]))
def test_one_by_one_and_alone_equal_the_chunk_of_a_batch(name, decode, kv):
    schedule = SCHEDULE if name == "one_pass" else ROUTED_FIRST
    pruner = pruner_of(name, decode, kv, schedule)
    together, keep, _ = at_once(pruner, TEXT)
    steps, keep_steps, _ = stepwise(pruner, TEXT)
    assert all(torch.equal(a, b) for a, b in zip(keep, keep_steps))
    assert relative(steps, together) < 1e-11
    row = TEXT[1:2]
    for run in (at_once, stepwise):
        alone, keep_alone, _ = run(pruner, row)
        assert all(torch.equal(a[0], b[1]) for a, b in zip(keep_alone, keep))
        assert relative(alone[0], together[1]) < 1e-11


@pytest.mark.parametrize(
    "name, decode, kv", pairwise(["random", "dynamic", "recurrent", "one_pass"], DECODE, ["evict", "keep"])
)
def test_padded_chunks_equal_each_row_by_itself(name, decode, kv):
    """Left-padded prompts of different lengths; continuations in two right-padded chunks."""
    schedule = SCHEDULE if name == "one_pass" else ROUTED_FIRST
    pruner = pruner_of(name, decode, kv, schedule)
    lengths, chunks = (16, 11, 7), ((5, 3, 4), (4, 5, 2))
    prompt, width = max(lengths), [max(c) for c in chunks]
    spans = [prompt, *width]
    ids = [torch.zeros(3, n, dtype=torch.long) for n in spans]
    mask = [torch.zeros(3, n, dtype=torch.long) for n in spans]
    for row in range(3):
        n = lengths[row]
        ids[0][row, prompt - n :], mask[0][row, prompt - n :] = TEXT[row, :n], 1
        for c, new in enumerate(chunks):
            ids[1 + c][row, : new[row]], mask[1 + c][row, : new[row]] = TEXT[row, n : n + new[row]], 1
            n += new[row]
    cache, keep, logits = DynamicCache(config=MODEL.config), [], []
    with torch.no_grad(), pruner(MODEL):
        for part in range(3):
            whole = torch.cat(mask[: part + 1], 1)
            position = (whole.cumsum(1) - 1).clamp(min=0)[:, -spans[part] :]
            out = MODEL(ids[part], attention_mask=whole, position_ids=position, past_key_values=cache)
            keep.append(pruner.trace.keep)
            logits.append(out.logits)
    for row in range(3):
        real = torch.cat(mask, 1)[row].bool()
        text = torch.cat(ids, 1)[row, real][None]
        alone, keep_alone, _ = stepwise(pruner, text, lengths[row])
        for block in range(BLOCKS):
            found = torch.cat([k[block] for k in keep], 1)[row]
            assert not found[~real].any() and torch.equal(found[real], keep_alone[block][0])
        found = torch.cat(logits, 1)[row, real][lengths[row] :]
        assert relative(found, alone[0]) < 1e-11


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("decode", ["dense", "threshold", "strict"])
@pytest.mark.parametrize("name", ["random", "dynamic", "hidden", "one_pass"])
def test_a_later_continuation_token_moves_nothing_earlier(name, decode, kv):
    pruner = pruner_of(name, decode, kv)
    changed = TEXT.clone()
    changed[:, PROMPT + 6 :] = (changed[:, PROMPT + 6 :] + 7) % 60 + 3
    logits, keep, _ = at_once(pruner, TEXT)
    again, keep_again, _ = at_once(pruner, changed)
    assert relative(logits[:, :6], again[:, :6]) < 1e-12 and relative(logits[:, 6:], again[:, 6:]) > 1e-3
    assert all(torch.equal(a[:, : PROMPT + 6], b[:, : PROMPT + 6]) for a, b in zip(keep, keep_again))


def test_sequence_mode_leaks():
    """The paper's mode routes the text in one pass: its last token decides about tokens before it. `prompt` does
    not."""
    pruner = pruner_of("dynamic", "dense")
    changed = TEXT.clone()
    changed[:, -2] = (changed[:, -2] + 7) % 60 + 3  # the logits read the text but its last token
    with torch.no_grad(), pruner(MODEL):
        leak = sequence_logits(MODEL, TEXT, PROMPT) - sequence_logits(MODEL, changed, PROMPT)
        causal = continuation_logits(MODEL, TEXT, PROMPT) - continuation_logits(MODEL, changed, PROMPT)
    before = TEXT.shape[1] - PROMPT - 1  # logits of these positions come before the changed token
    assert leak[:, :before].abs().max() > 1e-2 and causal[:, :before].abs().max() == 0


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("name", ["random", "dynamic", "local", "hidden"])
def test_strict_stays_within_its_allowance_at_every_prefix(name, kv):
    pruner = pruner_of(name, "strict", kv, ROUTED_FIRST)
    _, keep, _ = stepwise(pruner, TEXT)
    for block, s in enumerate(ROUTED_FIRST.sparsity):
        skipped = (~keep[block][:, PROMPT:]).cumsum(1)
        generated = torch.arange(1, skipped.shape[1] + 1)
        assert (skipped <= s * generated + 1e-9).all()
    assert sum(int((~k[:, PROMPT:]).sum()) for k in keep) > 0


def run_on(pruner, cache, tokens, at_once=False):
    """The logits of tokens (B, n) through the cache, one by one."""
    pieces = [tokens] if at_once else tokens.split(1, dim=1)
    keep, logits = [], []
    for piece in pieces:
        logits.append(MODEL(piece, past_key_values=cache).logits)
        keep.append(pruner.trace.keep)
    return torch.cat(logits, 1), [torch.cat(parts, 1) for parts in zip(*keep)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[1], b[1])) and relative(a[0], b[0]) < 1e-11


@pytest.mark.parametrize(
    "name, decode, kv, chunk",
    pairwise(["random", "dynamic", "rank", "recurrent", "one_pass"], DECODE, ["evict", "keep"], [False, True]),
)
def test_crop_leaves_nothing_of_what_it_removed(name, decode, kv, chunk):
    pruner = pruner_of(name, decode, kv, SCHEDULE if name == "one_pass" else NONE_DENSE)
    other = TEXT.flip(0)
    with torch.no_grad(), pruner(MODEL):
        for cut in (3, 5):
            cache, never = prefill(pruner, TEXT), prefill(pruner, TEXT)
            run_on(pruner, cache, TEXT[:, PROMPT : PROMPT + 5], chunk)
            cache.crop(-cut)
            if cut < 5:
                run_on(pruner, never, TEXT[:, PROMPT : PROMPT + 5 - cut])
            assert cache.get_seq_length() == never.get_seq_length() == PROMPT + 5 - cut
            again, expected = (run_on(pruner, c, other[:, PROMPT : PROMPT + 4]) for c in (cache, never))
            assert same(again, expected)


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_a_second_prompt_takes_the_place_of_what_a_crop_removed(kv):
    """Its tokens are a prompt's, whatever the removed continuation did in their places."""
    pruner = pruner_of("random", "strict", kv, NONE_DENSE)
    with torch.no_grad(), pruner(MODEL):
        cropped, never = prefill(pruner, TEXT), prefill(pruner, TEXT)
        run_on(pruner, cropped, TEXT[:, PROMPT : PROMPT + 6])
        cropped.crop(-6)
        for cache in (cropped, never):
            with pruner.prompt():
                MODEL(TEXT.flip(0)[:, PROMPT : PROMPT + 6], past_key_values=cache)
        again, expected = (run_on(pruner, cache, TEXT[:, PROMPT : PROMPT + 7]) for cache in (cropped, never))
        assert same(again, expected)


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("decode", ["dense", "threshold", "strict"])
@pytest.mark.parametrize("name", ["random", "dynamic"])
def test_rows_of_a_cache_move_with_all_that_is_known_of_them(name, decode, kv):
    pruner = pruner_of(name, decode, kv, ROUTED_FIRST)
    middle, new = PROMPT + 4, TEXT[:, PROMPT + 4 : PROMPT + 9]
    with torch.no_grad(), pruner(MODEL):
        cache = prefill(pruner, TEXT)
        run_on(pruner, cache, TEXT[:, PROMPT:middle])
        whole = run_on(pruner, copy.deepcopy(cache), new)
        for index, change in (
            (torch.tensor([2, 0, 0]), lambda c: c.reorder_cache(torch.tensor([2, 0, 0]))),
            (torch.tensor([0, 0, 1, 1, 2, 2]), lambda c: c.batch_repeat_interleave(2)),
            (torch.tensor([1, 2]), lambda c: c.batch_select_indices(torch.tensor([1, 2]))),
        ):
            moved = copy.deepcopy(cache)
            change(moved)
            assert same(run_on(pruner, moved, new[index]), (whole[0][index], [k[index] for k in whole[1]]))
        assert same(run_on(pruner, cache, new), whole)  # the copies were copies


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_a_list_decides_continuation_tokens_by_slot(kv):
    generator = torch.Generator().manual_seed(7)
    keep = [torch.rand(3, TEXT.shape[1], generator=generator) < 0.5 for _ in range(BLOCKS)]
    pruner = TokenPruner(FixedRouter(keep), None, kv=kv, decode="threshold")
    for run in (at_once, stepwise):
        logits, found, _ = run(pruner, TEXT)
        assert all(torch.equal(a, b) for a, b in zip(found, keep))
        for row in range(3):
            decisions = [k[row] for k in keep]
            expected = masked_dense(MODEL, decisions, decisions, [kv] * BLOCKS, TEXT[row])
            assert relative(logits[row], expected[PROMPT:]) < 1e-11
    short = TokenPruner(FixedRouter([k[:, :-1] for k in keep]), None, kv=kv, decode="threshold")
    with pytest.raises(ValueError, match=r"shape \(3, 29\).*slots 16 to 30: shape \(3, 30\)"):
        at_once(short, TEXT)
    with pytest.raises(ValueError, match=r"shape \(3, 29\).*slots 29 to 30: shape \(3, 30\)"):
        stepwise(short, TEXT)


@pytest.mark.parametrize("decode", ["threshold", "strict"])
def test_a_skipped_continuation_token_adds_nothing_to_an_evicting_cache(decode):
    pruner = pruner_of("dynamic", decode, "evict", ROUTED_FIRST)
    row = TEXT[:1]
    _, keep, cache = stepwise(pruner, row)
    assert [layer.keys.shape[2] for layer in cache.layers] == [int(k.sum()) for k in keep]
    assert cache.get_seq_length() == row.shape[1] and any(int(k.sum()) < row.shape[1] for k in keep)
    _, keep, cache = stepwise(pruner_of("dynamic", decode, "keep", ROUTED_FIRST), row)
    assert [layer.keys.shape[2] for layer in cache.layers] == [row.shape[1]] * BLOCKS


def replayed(pruner, keep, row, kv):
    decisions = [k[row] for k in keep]
    return masked_dense(MODEL, decisions, decisions, [kv] * BLOCKS, TEXT[row])


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("decode", ["dense", "threshold", "strict"])
@pytest.mark.parametrize("name", ["static", "random", "dynamic"])
def test_turns_of_prompts_and_answers_obey_the_phase_rule(name, decode, kv):
    """Prompt, answer, a second prompt in two chunks by hand, a longer answer."""
    pruner = pruner_of(name, decode, kv, ROUTED_FIRST)
    cuts, phases = (0, 8, 12, 17, 22, 30), "prompt answer prompt prompt answer".split()
    cache, keep, logits = DynamicCache(config=MODEL.config), [], []
    with torch.no_grad(), pruner(MODEL):
        for start, stop, phase in zip(cuts, cuts[1:], phases):
            piece = TEXT[:, start:stop]
            if phase == "prompt":
                with pruner.prompt():
                    logits.append(MODEL(piece, past_key_values=cache).logits)
                for block, s in enumerate(ROUTED_FIRST.sparsity):
                    kept = pruner.trace.keep[block]
                    skip = min(round(s * (stop - start)), stop - start - (1 if start else 2))
                    assert (kept.sum(1) == stop - start - skip).all() and kept[:, -1].all()
                assert pruner.trace.prompt is pruner.trace
            else:
                logits.append(MODEL(piece, past_key_values=cache).logits)
                assert pruner.trace.prompt is not pruner.trace
                assert decode != "dense" or all(k.all() for k in pruner.trace.keep)
            keep.append(pruner.trace.keep)
    keep = [torch.cat(parts, 1) for parts in zip(*keep)]
    logits = torch.cat(logits, 1)
    for row in range(3):
        assert relative(logits[row], replayed(pruner, keep, row, kv)) < 1e-11


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("decode", ["dense", "threshold", "strict"])
def test_two_questions_on_one_routed_document(decode, kv):
    pruner = pruner_of("dynamic", decode, kv, ROUTED_FIRST)
    first, second = TEXT[:, PROMPT : PROMPT + 6], TEXT[:, PROMPT + 6 : PROMPT + 13]
    with torch.no_grad(), pruner(MODEL):
        document = prefill(pruner, TEXT)
        kept = pruner.trace.keep
        run_on(pruner, copy.deepcopy(document), first)
        logits, keep = run_on(pruner, copy.deepcopy(document), second, at_once=True)
        fresh = run_on(pruner, prefill(pruner, TEXT), second)
    assert same((logits, keep), fresh)
    for row in range(3):
        ids = torch.cat([TEXT[row, :PROMPT], second[row]])
        decisions = [torch.cat([a[row], b[row]]) for a, b in zip(kept, keep)]
        expected = masked_dense(MODEL, decisions, decisions, [kv] * BLOCKS, ids)
        assert relative(logits[row], expected[PROMPT:]) < 1e-11
        if decode == "dense":  # the other twin agrees
            again, _ = run_row(MODEL, pruner, ids, PROMPT, [k[row] for k in kept])
            assert relative(logits[row], again[PROMPT:]) < 1e-11


def test_random_decisions_are_the_same_in_any_batch():
    pruner = TokenPruner(RandomRouter(4), ROUTED_FIRST, decode="threshold")
    _, keep, _ = at_once(pruner, TEXT)
    _, other, _ = at_once(pruner, TEXT[[2, 1]].roll(1, 1))
    assert all(torch.equal(a[:1, PROMPT:], b[:1, PROMPT:]) for a, b in zip(keep, other))


def test_the_static_router_computes_every_continuation_token():
    for decode in ("threshold", "strict"):
        _, keep, _ = stepwise(TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 1.0), decode=decode), TEXT)
        assert all(k[:, PROMPT:].all() for k in keep)


def test_a_crop_that_cannot_be_exact_is_refused(monkeypatch):
    monkeypatch.setattr(score_log, "ROLLBACK", 4)
    pruner = pruner_of("dynamic", "threshold", "evict", NONE_DENSE)
    with torch.no_grad(), pruner(MODEL):
        for cut, chunk in ((4, True), (4, False), (10, True), (10, False)):  # 10: the end of the prompt
            cache, never = prefill(pruner, TEXT), prefill(pruner, TEXT)
            run_on(pruner, cache, TEXT[:, PROMPT : PROMPT + 10], chunk)
            cache.crop(-cut)
            if cut < 10:
                run_on(pruner, never, TEXT[:, PROMPT : PROMPT + 10 - cut])
            assert same(*(run_on(pruner, c, TEXT[:, :5]) for c in (cache, never)))
        for cut in (7, 12):  # too long ago, and into the prompt
            cache = prefill(pruner, TEXT)
            run_on(pruner, cache, TEXT[:, PROMPT : PROMPT + 10])
            with pytest.raises(UserError, match="cannot go back to its first"):
                cache.crop(-cut)


@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_a_row_that_starts_in_a_later_chunk_keeps_its_first_token(name):
    """Chunked prefill of left-padded rows: padding may fill a row's first chunk."""
    ids, mask = TEXT[:2, :18].clone(), torch.ones(2, 18, dtype=torch.long)
    mask[1, :8], ids[1, :8] = 0, 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    pruner, cache, keep = pruner_of(name, "dense", "evict", NONE_DENSE), DynamicCache(config=MODEL.config), []
    with torch.no_grad(), pruner(MODEL), pruner.prompt():
        for chunk in (slice(0, 6), slice(6, 12), slice(12, 18)):
            MODEL(
                ids[:, chunk],
                attention_mask=mask[:, : chunk.stop],
                position_ids=position[:, chunk],
                past_key_values=cache,
            )
            keep.append(pruner.trace.keep)
    for first, second, third in zip(*keep):
        assert first[0, 0] and not first[1].any() and second[1, 2] and not second[1, :2].any()
        assert second[:, -1].all() and third[:, -1].all()


@pytest.mark.parametrize("decode", ["dense", "threshold", "strict"])
@pytest.mark.parametrize("parts", ["attention", "mlp", "attention+mlp"])
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_parts_follow_too(kv, parts, decode):
    made, text = router("dynamic", kv, NONE_DENSE), TEXT[:, : PROMPT + 8]
    pruner = TokenPruner(made, NONE_DENSE, kv=kv, decode=decode, window=5, parts=parts)
    traces, logits = [], []
    with torch.no_grad(), pruner(MODEL):
        cache = prefill(pruner, text)
        traces.append(pruner.trace)
        together = MODEL(text[:, PROMPT:], past_key_values=cache).logits
        whole = pruner.trace
        cache = prefill(pruner, text)
        for token in text[:, PROMPT:].split(1, dim=1):
            logits.append(MODEL(token, past_key_values=cache).logits)
            traces.append(pruner.trace)
    assert relative(torch.cat(logits, 1), together) < 1e-11
    attends, computes = (
        [torch.cat(parts, 1) for parts in zip(*(getattr(t, which) for t in traces))]
        for which in ("keep_attention", "keep_mlp")
    )
    assert all(torch.equal(a[:, PROMPT:], b) for a, b in zip(attends, whole.keep_attention))
    assert all(torch.equal(a[:, PROMPT:], b) for a, b in zip(computes, whole.keep_mlp))
    for row in range(3):
        expected = masked_dense(MODEL, [k[row] for k in attends], [k[row] for k in computes], [kv] * BLOCKS, text[row])
        assert relative(together[row], expected[PROMPT:]) < 1e-11


@pytest.mark.parametrize("decode", ["dense", "threshold"])
@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("name", ["mistral_sliding", "gemma3", "qwen2_sliding"])
def test_what_a_sliding_window_dropped_changes_no_decision(name, kv, decode):
    """Routed chunks on a cache that has dropped keys beyond the window = on one that has not."""
    model, found = family(name), []
    pruner = TokenPruner(router("rank", kv, NONE_DENSE), NONE_DENSE, kv=kv, decode=decode, window=5)
    for record in (False, True):
        cache, keep = DynamicCache(config=model.config), []
        if record:
            cache.activate_past_recording()
        with torch.no_grad(), pruner(model):
            model(TEXT[:, :12], past_key_values=cache)
            with pruner.prompt():
                for chunk in (slice(12, 22), slice(22, 25)):
                    model(TEXT[:, chunk], past_key_values=cache)
                    keep += pruner.trace.keep
            logits = model(TEXT[:, 25:], past_key_values=cache).logits
        found.append((logits, keep + pruner.trace.keep))
    assert same(*found)


@pytest.mark.parametrize("decode", ["threshold", "strict"])
def test_a_token_goes_on_after_an_error_in_the_first_block(decode):
    """The block had decided that it skips, and none had taken it: the same call again gives what it gives."""
    pruner = pruner_of("dynamic", decode, "keep", NONE_DENSE)

    def fail(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), pruner(MODEL):
        cache = prefill(pruner, TEXT)
        expected = MODEL(TEXT[:, PROMPT:], past_key_values=copy.deepcopy(cache)).logits
        handle = MODEL.model.layers[0].self_attn.k_proj.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            MODEL(TEXT[:, PROMPT:], past_key_values=cache)
        handle.remove()
        assert torch.equal(MODEL(TEXT[:, PROMPT:], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("decode", ["threshold", "strict"])
def test_guidance_by_a_prompt_without_padding_leaves_the_padding_of_others(decode):
    """A row decides as it does alone, though `generate` asks the model about a second prompt in between."""
    pruner, ids, mask = pruner_of("dynamic", decode), TEXT[:2, :14].clone(), torch.ones(2, 14, dtype=torch.long)
    mask[0, :6] = 0
    asked = {"guidance_scale": 1.5, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    against = TEXT[:2, 5:10]
    with torch.no_grad(), pruner(MODEL):
        both = MODEL.generate(ids, attention_mask=mask, negative_prompt_ids=against, **asked)
        alone = MODEL.generate(ids[:1, 6:], negative_prompt_ids=against[:1], **asked)
    assert torch.equal(both[0, 14:], alone[0, 8:])
