"""The options of the attention score, against eager attention; float32 whatever the model's precision."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import family
from test_backends import Spy, relative
from test_engine import seeded

from ftp_lightning import AttentionScore, DynamicRouter, Schedule, StaticRouter, TokenPruner, UserError
from ftp_lightning.baselines.spatten import CumulativeSelector
from ftp_lightning.evaluation.continuation import continuation_logits
from ftp_lightning.pruning import scores as scoring
from ftp_lightning.pruning.cache import RoutedLayer
from ftp_lightning.pruning.continuation_scores import ContinuationTable, received_by_query
from ftp_lightning.pruning.decide import RoutedTokens
from ftp_lightning.pruning.forward import Forward
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.pruning.reads import attention_rank, attention_sums, last_logits
from ftp_lightning.pruning.scores import PromptTable, Tapped, pooled_scores, received_attention, write_scores
from ftp_lightning.routing import OnePassRouter, UntrainedRouter
from ftp_lightning.routing.base import Needs
from ftp_lightning.training.resume import capture, first_needed_block, resume_from


def everyone(tokens, batch=1):
    return Tokens(torch.arange(tokens).expand(batch, tokens), torch.ones(batch, tokens, dtype=torch.bool), True)


def drawn(tokens, dtype=torch.float32, size=16):
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, tokens, size, generator=draw), torch.randn(1, 2, tokens, size, generator=draw)
    return Tapped(q.to(dtype), k.to(dtype), 4 * size**-0.5, None, None), everyone(tokens)


def all_scores(tapped, tokens):
    span = len(tokens.slots[0])
    return [
        received_attention(tapped, tokens, tokens, 8)[0],
        received_attention(tapped, tokens, tokens, None)[0],
        received_by_query(tapped, tokens, tokens)[0],
        *(read(tapped, tokens, tokens, span)[0] for read in (attention_sums, last_logits, attention_rank)),
    ]


@pytest.mark.parametrize("read", [None, attention_sums, last_logits, attention_rank])
@pytest.mark.parametrize("decode", ["dense", "strict"])
def test_autocast_moves_no_score(read, decode):
    """What is written for one block's queries and keys, with autocast on around it and without."""
    tapped, tokens = drawn(150)
    forward = Forward.of((1, 150), 0, None, torch.device("cpu"))
    if decode == "strict":
        forward.table, layer = ContinuationTable(forward.real, None, 0), RoutedLayer(True)
    else:
        forward.table, layer, forward.routed = (
            PromptTable(torch.ones(1, 150)),
            None,
            RoutedTokens.of(forward.real, False),
        )
    pruner = SimpleNamespace(attention_score=AttentionScore(8), decode="dense")
    attached = SimpleNamespace(pruner=pruner, plan=SimpleNamespace(needs=Needs(attention=True, reads=read)))

    def written():
        table = forward.table = copy.deepcopy(forward.table)
        run = SimpleNamespace(forward=forward, attached=attached, tapped=tapped, plan=SimpleNamespace(keeps=True))
        write_scores(run, None, tokens, tokens, layer)
        return table.own

    expected = written()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(written(), expected) and torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keys_are_cast_in_chunks(monkeypatch, dtype):
    """No float32 tensor holds all keys, and the scores are those of float32 queries and keys, within 1e-5."""
    tapped, tokens = drawn(150, dtype)
    exact = Tapped(tapped.query.float(), tapped.key.float(), tapped.scaling, None, None)
    expected, sizes, cast = all_scores(exact, tokens), [], torch.Tensor.float
    monkeypatch.setattr(scoring, "KEY_CHUNK", 40)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: sizes.append(x.shape) or cast(x))
    found = all_scores(tapped, tokens)
    monkeypatch.undo()
    assert not {tuple(shape) for shape in sizes} & {(1, 2, keys, 16) for keys in (128, 150)}
    assert (1, 2, 40, 16) in sizes
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------- every option, against eager attention

TEXT = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TEXT)
MASK[1, :5] = 0  # the second row is padded on the left
SPANS = [(6, 15), (4, 10)]
OPTIONS = {
    "window 1": AttentionScore(window=1),
    "window 8": AttentionScore(window=8),
    "exact": AttentionScore(window="exact"),
    "window end": AttentionScore(window=4, window_end=3),
    "exact, window end": AttentionScore(window="exact", window_end=3),
    "question": AttentionScore(window="question"),
    "heads": AttentionScore(window=6, heads="max"),
    "blocks": AttentionScore(window=6, blocks="max"),
    "some blocks": AttentionScore(window=6, blocks=(0, 2)),
    "one block": AttentionScore(window=6, heads="max", blocks=(0, 1)),
    "max pooling": AttentionScore(window=6, pooling="max", kernel_size=5),
    "average pooling": AttentionScore(window=6, pooling="average", kernel_size=3),
    "wide pooling": AttentionScore(window=6, pooling="average", kernel_size=99),
    "all of them": AttentionScore("question", 0, "max", "max", "max", 3),
}


def by_the_book(score, weights, span):
    """The score of one row's tokens from the weights (H, T, T) of the blocks before, with loops; 1 where none is."""
    tokens, table = weights[0].shape[-1], {}
    queries = list(range(tokens))[: tokens - score.window_end]
    if score.window == "question":
        queries = queries[slice(*span)]
    elif score.window != "exact":
        queries = queries[-score.window :]
    for number, block in enumerate(weights):
        if isinstance(score.blocks, tuple) and number not in range(*score.blocks):
            continue
        sees = block.sum(0) > 0
        said = {}
        for j in range(tokens):
            if seeing := [i for i in queries if sees[i, j]]:
                by_head = sum(block[:, i, j] * sees[i].sum() for i in seeing) / len(seeing)
                said[j] = float(by_head.max() if score.heads == "max" else by_head.mean())
        half = 0 if score.pooling == "none" else score.kernel_size // 2
        for j in said:
            around = [said[k] for k in range(j - half, j + half + 1) if k in said]
            value = sum(around) / len(around) if score.pooling == "average" else max(around)
            value = said[j] if score.pooling == "none" else value
            table[j] = max(value, table.get(j, 0.0)) if score.blocks != "latest" else value
    return torch.tensor([table.get(j, 1.0) for j in range(tokens)])


def padded():
    return {"attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_sliding", "gemma2", "gemma3", "gpt_neox", "phi3"])
def test_every_option_is_what_eager_weights_say(name):
    """The last block's router reads what the T x T weights of the dense blocks before it say, padded or not."""
    model = family(name, torch.float32, "eager")
    with torch.no_grad():
        rows = [model(row[real.bool()][None], output_attentions=True).attentions for row, real in zip(TEXT, MASK)]
    for option, score in OPTIONS.items():
        pruner = TokenPruner(Spy(), Schedule([0.0, 0.0, 0.0, 0.5]), attention=score)
        pruner.ambient.spans = tuple(SPANS)
        with torch.no_grad(), pruner(model):
            model(TEXT, **padded())
        for row, weights in enumerate(rows):
            expected = by_the_book(score, [block[0] for block in weights[:3]], SPANS[row])
            found = pruner.router.tables[3][row][MASK[row].bool()]
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), (option, row)


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("option", OPTIONS)
def test_training_reads_what_inference_reads_and_padding_changes_nothing(option, kv):
    """Behind pruned blocks, too: gathered = masked = each row alone."""
    model, schedule = family("llama"), Schedule([0.0, 0.3, 0.5, 0.5])
    pruner = TokenPruner(Spy(), schedule, kv=kv, attention=OPTIONS[option])
    found, router = [], pruner.router
    with torch.no_grad(), pruner(model):
        pruner.ambient.spans = tuple(SPANS)
        for use in (lambda: model(TEXT, **padded()), lambda: _masked(pruner, model)):
            use()
            found.append([router.tables[block][MASK.bool()] for block in (1, 2, 3)])
        alone = []
        for row, real, span in zip(TEXT, MASK, SPANS):
            pruner.ambient.spans = (span,)
            model(row[real.bool()][None])
            alone.append([router.tables[block][0] for block in (1, 2, 3)])
    found.append([torch.cat(tables) for tables in zip(*alone)])
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(other, found[0], strict=True))


def _masked(pruner, model):
    """A training forward with six tokens behind the prompt."""
    more = torch.cat([TEXT, TEXT[:, :6]], 1), torch.cat([MASK, torch.ones_like(MASK[:, :6])], 1)
    with pruner.masked(TEXT.shape[1]):
        model(more[0], attention_mask=more[1], position_ids=(more[1].cumsum(1) - 1).clamp(min=0), use_cache=False)


def test_pooling_passes_over_padding_and_skipped_tokens():
    """Keys in slots 1, 2, 5 (and an unseen one in 6) of a row whose slots 0 and 3 are padding, twice."""
    keys = Tokens(torch.tensor([[1, 2, 5, 6]]), torch.ones(1, 4, dtype=torch.bool), True)
    row = Tokens(torch.arange(8)[None], torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1]]).bool(), False)
    scores, seen = torch.tensor([[4.0, 2.0, 1.0, 9.0]]), torch.tensor([[True, True, True, False]])
    for shape in (scores.shape, (1, 2, 4)):
        said = pooled_scores(scores.expand(shape), seen.expand(shape), keys, row, "max", 5)[..., :3]
        assert torch.equal(said, torch.tensor([4.0, 4.0, 2.0]).expand_as(said))
        said = pooled_scores(scores.expand(shape), seen.expand(shape), keys, row, "average", 3)[..., :3]
        assert torch.equal(said, torch.tensor([3.0, 3.0, 1.0]).expand_as(said))


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_continuation_tokens_at_once_equal_one_by_one(kv, heads):
    score = AttentionScore(4, 2, heads, "max", "average", 3)
    model, schedule = family("llama"), Schedule([0.0, 0.3, 0.6, 0.5])
    router = seeded(DynamicRouter)
    pruner = TokenPruner(router, schedule, kv=kv, attention=score, decode="threshold", threshold=0.5)
    logits, keep = {}, {}
    with torch.no_grad(), pruner(model):
        for size in (1, 8):
            cache, logits[size], keep[size] = model(TEXT[:, :16]).past_key_values, [], []
            for start in range(16, 24, size):
                logits[size].append(model(TEXT[:, start : start + size], past_key_values=cache).logits)
                keep[size].append(torch.stack(pruner.trace.keep))
    assert torch.equal(torch.cat(keep[1], 2), keep[8][0])
    assert relative(torch.cat(logits[1], 1), logits[8][0]) < 1e-9


@pytest.mark.parametrize("blocks", ["latest", "max"])
@pytest.mark.parametrize("heads", ["mean", "max"])
@torch.no_grad()
def test_a_continuation_token_reads_what_eager_weights_say_of_it(heads, blocks):
    """Its own score: n_i times the attention that it pays to itself, of the latest block or the greatest of three."""
    model = family("llama", torch.float32, "eager")
    weights = model(TEXT, output_attentions=True).attentions[:3]
    pruner = TokenPruner(Spy(), Schedule([0.0, 0.0, 0.0, 0.5]), decode="threshold", threshold=0.5)
    with pruner.changed(attention=AttentionScore(4, heads=heads, blocks=blocks))(model):
        model(TEXT[:, 16:], past_key_values=model(TEXT[:, :16]).past_key_values)
    own = torch.stack([block.diagonal(dim1=2, dim2=3)[..., 16:] * torch.arange(17, 25) for block in weights])
    own = own.amax(2) if heads == "max" else own.mean(2)
    assert torch.allclose(pruner.router.tables[3], own.amax(0) if blocks == "max" else own[-1], rtol=1e-4)


@torch.no_grad()
def test_the_greatest_of_all_blocks_needs_the_blocks_from_the_first_one_on():
    model = family("llama")
    pruner = TokenPruner(UntrainedRouter(), Schedule([0.0, 0.0, 0.0, 0.6]), attention=AttentionScore(6, blocks="max"))
    with capture(model) as states:
        continuation_logits(model, TEXT, 16)
    with pruner(model):
        expected = continuation_logits(model, TEXT, 16)
    first = first_needed_block(model, 3, pruner.router.needs, pruner.reads_from)
    with resume_from(model, first, states), pruner(model):
        assert torch.equal(continuation_logits(model, TEXT, 16), expected)
    assert first == 0


@torch.no_grad()
def test_the_greatest_of_some_blocks_needs_the_blocks_from_these_on_and_ranks_all_later_blocks_alike():
    model, schedule = family("llama"), Schedule([0.0, 0.0, 0.5, 0.7])
    pruner = TokenPruner(UntrainedRouter(("rank",)), schedule, kv="keep", attention=AttentionScore(6, blocks=(1, 2)))
    with capture(model) as states:
        continuation_logits(model, TEXT, 16)
    with pruner(model):
        expected, kept = continuation_logits(model, TEXT, 16), pruner.trace.prompt.keep
        assert pruner._attached.plan.scored == {1}
    assert not (kept[3] & ~kept[2]).any()
    first = first_needed_block(model, 2, pruner.router.needs, pruner.reads_from)
    with resume_from(model, first, states), pruner(model):
        assert torch.equal(continuation_logits(model, TEXT, 16), expected)
    assert first == 1


def test_blocks_that_decide_must_run_before_the_first_pruned_one():
    for blocks, said in (((1, 3), "block 1 is pruned before the blocks 1 to 2"), ((2, 5), "blocks 2 to 4 is read")):
        with pytest.raises(UserError, match=said):
            TokenPruner(UntrainedRouter(), Schedule([0.0, 0.5, 0.5, 0.5]), attention=AttentionScore(blocks=blocks))
    TokenPruner(StaticRouter(), Schedule([0.5, 0.5, 0.5]), attention=AttentionScore(blocks=(1, 2)))  # reads none of it


# ---------------------------------------------------------------- the span of the question


@torch.no_grad()
def test_a_question_at_the_end_is_a_window_with_an_end():
    """Of a prompt of 24 tokens the question [12, 20) = the last 8 tokens without the last 4; also for beams."""
    model, schedule, new = family("llama"), Schedule([0.0, 0.0, 0.0, 0.6]), {"max_new_tokens": 3, "do_sample": False}
    router = UntrainedRouter(("rank",))
    counted = TokenPruner(router, schedule, kv="keep", attention=AttentionScore(8, window_end=4))
    spanned = counted.changed(attention=AttentionScore("question"))
    with counted(model):
        expected, kept = model.generate(TEXT, num_beams=2, **new), counted.trace.prompt.keep
    with spanned(model):
        for spans in ([(12, 20)], [(12, 20)] * 2):
            with spanned.question(spans):
                assert torch.equal(model.generate(TEXT, num_beams=2, **new), expected)
            assert all(torch.equal(a, b) for a, b in zip(spanned.trace.prompt.keep, kept, strict=True))
        assert not spanned.ambient.spans


def test_a_missing_or_impossible_question_is_refused():
    model, pruner = family("llama"), TokenPruner(Spy(), Schedule.uniform(4, 0.5), attention=AttentionScore("question"))
    with pruner(model), torch.no_grad():
        with pytest.raises(UserError, match="reads each prompt's question"):
            model(TEXT)
        for spans, said in (
            ([(3, 25)], "row 0 ends at token 25, and its prompt has 24 tokens"),
            ([(3, 9)] * 3, "3 spans of questions are given for a batch of 2 rows"),
            ([(5, 5)], "must be a pair"),
            ([], "must be a pair"),
        ):
            with pytest.raises(UserError, match=said), pruner.question(spans):
                model(TEXT)
    with pytest.raises(UserError, match="reads no question"), TokenPruner(Spy(), pruner.schedule).question([(1, 2)]):
        pass


# ---------------------------------------------------------------- the value


@pytest.mark.parametrize(
    "about",
    [
        {"window": 0}, {"window": True}, {"window": 2.5}, {"window": "all"}, {"window_end": -1}, {"heads": "median"},
        {"blocks": "mean"}, {"blocks": (3, 3)}, {"blocks": (1, 2, 3)}, {"blocks": (-1, 2)},
        {"pooling": "min"}, {"pooling": "max", "kernel_size": 4}, {"kernel_size": 5},
        {"pooling": "max", "kernel_size": 1}, {"window": "question", "window_end": 2},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_sentence(about):
    with pytest.raises(UserError) as refused:
        AttentionScore(**about)
    assert next(iter(reversed(about))) in str(refused.value) and "\n" not in str(refused.value)


def test_options_that_a_router_would_not_read_are_refused():
    schedule = Schedule([0.0, 0.5, 0.5, 0.5])
    for router, score, said in (
        (CumulativeSelector(), AttentionScore(heads="max"), "in its own way"),
        (CumulativeSelector(), AttentionScore("question"), "in its own way"),
        (OnePassRouter(4), AttentionScore(blocks="max"), "reads what the first block wrote"),
    ):
        with pytest.raises(UserError, match=said):
            TokenPruner(router, schedule, attention=score)
    with pytest.raises(UserError, match="Leave window out"):
        TokenPruner(StaticRouter(), schedule, attention=AttentionScore(8), window=9)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_pruner_is_stored_with_its_attention_score(tmp_path, option):
    score, schedule = OPTIONS[option], Schedule([0.0, 0.5, 0.5, 0.5])
    pruner = TokenPruner(StaticRouter(), schedule, attention=score)
    pruner.save(tmp_path / "p")
    again = TokenPruner.load(tmp_path / "p")
    assert again.attention_score == score and again.identity() == pruner.identity()
    assert json.loads((tmp_path / "p" / "pruner.json").read_text())["settings"] == pruner.settings()
    assert pruner.changed(threshold=0.4).attention_score == score
    assert pruner.changed(attention="exact").attention_score == AttentionScore("exact")
    wider = pruner.changed(window=40).attention_score
    assert wider == (replace(score, window=40) if isinstance(score.window, int) else score)
    others = [
        TokenPruner(StaticRouter(), schedule, attention=other) for name, other in OPTIONS.items() if name != option
    ]
    assert all(other.identity() != pruner.identity() for other in others)


def test_the_names_of_before_mean_what_they_did():
    schedule = Schedule([0.0, 0.5])
    for about in ({}, {"window": 8}, {"attention": "exact"}, {"attention": "exact", "window": 8}):
        pruner = TokenPruner(StaticRouter(), schedule, **about)
        assert (pruner.attention, pruner.window) == (about.get("attention", "window"), about.get("window", 32))
        assert {name: pruner.settings()[name] for name in about} == about
    assert TokenPruner(StaticRouter(), schedule, attention=AttentionScore(8)).attention == "window"
    assert repr(AttentionScore(8, heads="max")).startswith("AttentionScore(window=8, window_end=0, heads='max'")


def test_the_flag_names_the_last_block_and_the_value_the_one_after_it():
    from ftp_lightning.stages.train import TrainStage

    assert TrainStage(attention_blocks="13-15").attention_score().blocks == (13, 16)
    assert TrainStage(attention_blocks="max").attention_score().blocks == "max"
    for said in ("13-", "some", "a-b", "15-13"):
        with pytest.raises(UserError, match="blocks is"):
            TrainStage(attention_blocks=said).attention_score()
