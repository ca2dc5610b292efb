"""What users do with a pruned model: caches of their own, autocast, checkpointing, errors half way, odd positions."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from families import family
from test_engine import MODEL, TEXT, seeded, tiny_llama
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, EncoderDecoderCache, LlamaForSequenceClassification, LlamaModel

from ftp_lightning import DynamicRouter, FixedRouter, RandomRouter, Schedule, StaticRouter, TokenPruner
from ftp_lightning.errors import UserError
from ftp_lightning.pruning.site import sites_of
from ftp_lightning.routing import UntrainedRouter

SCHEDULE = Schedule([0.0, 0.5, 0.5, 0.5])
IDS = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0))
SLIDING = ("mistral_sliding", "gemma3", "gemma2", "qwen2_sliding")


# ---------------------------------------------------------------- a cache of the user's own


def step_by_step(model, cache, pruner):
    with torch.no_grad(), pruner(model):
        parts = [model(IDS[:1, :20], past_key_values=cache, use_cache=True).logits]
        parts += [model(IDS[:1, 20 + i : 21 + i], past_key_values=cache).logits for i in range(3)]
        parts.append(model(IDS[:1, 23:40], past_key_values=cache).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("schedule", [[0.0, 0.4, 0.4, 0.4], [0.4, 0.0, 0.4, 0.0], [0.4, 0.4, 0.0, 0.0]])
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_a_cache_made_without_a_config(name, schedule, kv):
    """transformers takes its layers for unbounded, also those of sliding blocks."""
    model, pruner = family(name), TokenPruner(RandomRouter(1), Schedule(schedule), kv=kv)
    expected = step_by_step(model, DynamicCache(config=model.config), pruner)
    assert torch.allclose(step_by_step(model, DynamicCache(), pruner), expected, atol=1e-5)  # Gemma 2 rounds


@pytest.mark.parametrize("second", ["reset", "chunk"])
def test_a_cache_that_a_pruner_of_the_other_mode_goes_on_with(second):
    """Scores are read of the tokens that this pruner stores, whatever the one before has left out."""
    model, schedule = family("llama"), Schedule([0.0, 0.3, 0.5, 0.5])
    evicting, keeping = (TokenPruner(UntrainedRouter(), schedule, kv=kv) for kv in ("evict", "keep"))
    found = []
    for complete in (False, True):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            with evicting(model):
                model(IDS[:, :20], past_key_values=cache)
            if second == "reset":
                cache.reset()
            for layer in cache.layers[1:]:
                layer.complete = complete
            with keeping(model), keeping.prompt():
                model(IDS[:, 20:], past_key_values=cache)
                found.append([keep.clone() for keep in keeping.trace.keep])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("made", [tuple, list, lambda _: EncoderDecoderCache(DynamicCache(), DynamicCache())])
def test_what_is_no_cache_of_a_decoder_is_refused(made):
    with torch.no_grad(), TokenPruner(RandomRouter(1), SCHEDULE)(MODEL):
        for call in (MODEL, MODEL.generate):
            with pytest.raises(UserError, match="pass a DynamicCache"):
                call(IDS, past_key_values=made(()))


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("parts", ["block", "attention", "mlp", "attention+mlp"])
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_autocast(parts, kv):
    """Two rows, with and without padding, prompt and continuation: near the same in float32."""
    model = family("llama", torch.float32)
    pruner = TokenPruner(RandomRouter(1), SCHEDULE, kv=kv, parts=parts)
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    for more in ({}, {"attention_mask": mask}):
        with torch.no_grad(), pruner(model):
            expected = model(IDS, **more).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = model(IDS, **more)
                model(IDS[:, :1], past_key_values=found.past_key_values)
        error = (found.logits.float() - expected)[mask.bool() if more else slice(None)].abs().max()
        assert error < 0.1 * expected.abs().max()


def test_autocast_with_a_removed_mlp():
    model = family("llama", torch.float32)
    with torch.no_grad(), TokenPruner(RandomRouter(1), SCHEDULE, removed=[(1, "mlp"), (2, "attention")])(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(IDS).logits.isfinite().all()


def test_scores_are_float32_under_autocast():
    """The same queries and keys: what a block writes for the router is no matter of autocast."""
    from ftp_lightning.pruning import scores

    seen, real = [], scores.received_attention
    model, pruner = family("llama", torch.float32), TokenPruner(UntrainedRouter(), SCHEDULE)

    def spy(tapped, queries, keys, *more):
        found = real(tapped, queries, keys, *more)
        with torch.autocast("cpu", enabled=False):
            seen.append((found, real(tapped, queries, keys, *more)))
        return found

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), pruner(model):
        patch.setattr(scores, "received_attention", spy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(IDS)
    assert seen and all(torch.equal(a, b) for found, expected in seen for a, b in zip(found, expected))


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers_is_refused(reentrant):
    model = family("llama", torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    pruner = TokenPruner(DynamicRouter(), SCHEDULE)
    with pruner(model), pruner.masked(20):
        with pytest.raises(UserError, match="recompute=True"):
            model(IDS, use_cache=False)
        model.gradient_checkpointing_disable()
        assert model(IDS, use_cache=False).logits.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_users_checkpoint_around_the_model_is_right_or_refused(reentrant, inside):
    """Backward runs the forward again: inside `masked` it is the same one, outside it would be another."""
    model, pruner = tiny_llama(), TokenPruner(seeded(DynamicRouter), SCHEDULE)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def run(inputs):
        return model(inputs_embeds=inputs, use_cache=False).logits

    with pruner(model):
        with pruner.masked(20):
            run(embedded).square().mean().backward()
            expected, embedded.grad = [weight.grad for weight in (embedded, *pruner.router.parameters())], None
            pruner.router.zero_grad()
            loss = checkpoint(run, embedded, use_reentrant=reentrant).square().mean()
            if inside:
                loss.backward()
        if not inside:
            with pytest.raises(UserError, match="recompute=True"):
                loss.backward()
            checkpoint(run, embedded, use_reentrant=reentrant).square().mean().backward()  # a plain one still works
    found = [weight.grad for weight in (embedded, *pruner.router.parameters())]
    assert not inside or all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_training_forward_leaves_no_cache():
    """One that some blocks have filled and others not would be of no use."""
    pruner = TokenPruner(DynamicRouter(), SCHEDULE, kv="keep")
    model = tiny_llama()
    with pruner(model), pruner.masked(20):
        output = model(IDS, use_cache=True)
        again = model(IDS, use_cache=False)
    assert output.past_key_values is None and torch.equal(output.logits, again.logits)


def test_what_a_training_forward_is_not():
    model, pruner = tiny_llama(), TokenPruner(DynamicRouter(), SCHEDULE)
    for tokens in (0, -1):
        with pytest.raises(ValueError, match="at least 1"), pruner.masked(tokens):
            pass
    with pruner(model), pruner.masked(20), pytest.raises(UserError, match="no training forward"):
        model.generate(IDS, max_new_tokens=2)


def test_what_a_pruner_is_not_made_of():
    for router, schedule in (("static", SCHEDULE), (DynamicRouter(), [0.0, 0.5]), (DynamicRouter(), "schedule.json")):
        with pytest.raises(UserError, match="a router and a Schedule"):
            TokenPruner(router, schedule)
    said = "TokenPruner(StaticRouter, 2 blocks, budget=0.25, kv=keep, choice=topk, decode=dense, skip=identity)"
    assert repr(TokenPruner(StaticRouter(), Schedule([0.0, 0.5]), kv="keep")) == said
    with pytest.raises(UserError, match="whole number of queries"):
        TokenPruner(DynamicRouter(), SCHEDULE, window=2.5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_recompute_drops_what_the_forward_has_dropped(name):
    model = family(name, torch.float32, **({"attention_dropout": 0.3} if name == "llama" else {})).train()
    pruner, gradients = TokenPruner(RandomRouter(1), SCHEDULE), []
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    for recompute in (False, True):
        torch.manual_seed(0)
        with pruner(model), pruner.masked(20, recompute=recompute):
            loss = model(IDS, labels=IDS, use_cache=False).loss
            gradients.append(torch.autograd.grad(loss, embedding)[0])
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_recompute_while_another_pruner_is_attached(kv):
    """A teacher or a validation may be in force by the time of backward; it is, unchanged, afterwards."""
    model, gradients = tiny_llama(), []
    pruner, other = TokenPruner(RandomRouter(1), SCHEDULE, kv=kv), TokenPruner(RandomRouter(2), SCHEDULE, kv=kv)
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad(), other(model):
        expected = model(IDS).logits
    for recompute in (False, True):
        with pruner(model), pruner.masked(20, recompute=recompute):
            loss = model(IDS, labels=IDS, use_cache=False).loss
        with other(model):
            gradients.append(torch.autograd.grad(loss, embedding)[0])
            with torch.no_grad():
                assert torch.equal(model(IDS).logits, expected)
    assert torch.allclose(*gradients)
    assert not any(hasattr(module, "_ftp_tap") for module in model.modules())


# ---------------------------------------------------------------- errors half way


def lengths(cache):
    return [cache.get_seq_length(block) for block in range(4)]


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_a_model_without_its_pruner_refuses_before_anything_has_changed(kv):
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE, kv=kv)
    with torch.no_grad():
        with pruner(model):
            cache = model(IDS[:1, :20], use_cache=True).past_key_values
            expected = model(IDS[:1, 20:21], past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(UserError, match="filled by a TokenPruner"):
            model(IDS[:1, 20:21], past_key_values=cache)
        assert lengths(cache) == [20] * 4
        with pruner(model):
            assert torch.equal(model(IDS[:1, 20:21], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("what", ["block", "mlp", "attention"])
def test_a_cache_that_an_error_left_half_filled_says_so(where, what):
    """Where the error comes before any block has taken the token the cache goes on as if nothing had been."""
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE, kv="keep", decode="strict")
    block = model.model.layers[where]
    module = {"block": block, "mlp": block.mlp, "attention": block.self_attn.k_proj}[what]

    def fail(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), pruner(model):
        cache = model(IDS[:1, :20], use_cache=True).past_key_values
        expected = model(IDS[:1, 20:21], past_key_values=copy.deepcopy(cache)).logits
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:1, 20:21], past_key_values=cache)
        handle.remove()
        if len(set(lengths(cache))) == 1 and lengths(cache)[0] == 20:
            assert torch.equal(model(IDS[:1, 20:21], past_key_values=cache).logits, expected)
            return
        if len(set(lengths(cache))) == 1:  # the last block's MLP: every block has the token, its output is lost
            return
        with pytest.raises(UserError, match="Start with a new cache"):
            model(IDS[:1, 20:21], past_key_values=cache)
    with pytest.raises(UserError), torch.no_grad():
        model(IDS[:1, 20:21], past_key_values=cache)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_positions_with_gaps(kv):
    """A text whose middle was cut out: with a cache transformers accepts it, and each token keeps its position."""
    model, pruner = family("llama"), TokenPruner(StaticRouter(), SCHEDULE, kv=kv)
    positions = (torch.arange(40) * 2)[None]
    with torch.no_grad():
        with pruner(model):
            found = model(IDS, position_ids=positions, use_cache=True).logits
            keep = [kept.clone() for kept in pruner.trace.keep]
            masked = model(IDS, position_ids=positions, attention_mask=torch.ones_like(IDS)).logits
            with pytest.raises(UserError, match="packed texts"):
                model(IDS, position_ids=positions, use_cache=False)
        with TokenPruner(FixedRouter(keep), None, kv=kv)(model):
            replayed = model(IDS, position_ids=positions, use_cache=True).logits
    assert torch.allclose(found, masked) and torch.allclose(found, replayed)


# ---------------------------------------------------------------- handles


def test_the_model_knows_its_pruner_while_attached():
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    assert not hasattr(model, "pruner")
    with pruner(model), torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        assert model.pruner is pruner and model.pruner.trace.sparsity[1] == 0.5
        with model.pruner.prompt():
            model(IDS[:, :10], past_key_values=cache)
        assert model.pruner.trace.prompt.real.shape == (2, 10)
        model.pruner.detach()
    assert not hasattr(model, "pruner")


def test_a_pruner_that_is_attached_is_not_pickled():
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    with pruner(model):
        for what in (pruner, model):
            with pytest.raises(UserError, match="attached cannot be pickled.*\n.*Detach it first"):
                pickle.dumps(what)
    assert pickle.loads(pickle.dumps(pruner)).schedule == SCHEDULE and pickle.dumps(model)


def test_a_models_own_attribute_named_pruner_is_put_back():
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    model.pruner = "mine"
    with pruner(model):
        assert model.pruner is pruner
    assert model.pruner == "mine"
    with pruner(model):
        del model.pruner
    assert "forward" not in model.model.__dict__


def test_attaching_again_looks_at_no_block_twice(monkeypatch):
    """A training step and a search candidate attach a pruner each time."""
    from ftp_lightning.pruning import site

    model, pruner, looked = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE), []
    real = site.Site.of
    monkeypatch.setattr(site.Site, "of", staticmethod(lambda block: looked.append(block) or real(block)))
    for _ in range(3):
        with pruner(model):
            pass
    assert len(looked) == 4
    model.model.layers[2].self_attn.q_proj = torch.nn.Linear(32, 32, bias=False, dtype=torch.float64)
    with pruner(model):
        pass
    assert len(looked) == 5
    assert sites_of(model, model.model.layers)[2].query is model.model.layers[2].self_attn.q_proj


# ---------------------------------------------------------------- beams


def test_beams_move_each_stored_token_once_a_step(monkeypatch):
    """Twice the tokens, twice the moves: what is known of a token is put together before it is moved."""
    moves = []
    real = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda self, *args: moves.append(1) or real(self, *args))
    pruner, counts = TokenPruner(RandomRouter(1), SCHEDULE), []
    for new in (10, 20):
        moves.clear()
        with torch.no_grad(), pruner(MODEL):
            MODEL.generate(TEXT[:1], max_new_tokens=new, num_beams=2, do_sample=False, eos_token_id=None)
        counts.append(len(moves))
    assert counts[1] < 2.3 * counts[0]


# ---------------------------------------------------------------- a last block of which little is read


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_sliding", "gpt2", "mixtral"])
@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("last", [0.0, 0.6])
def test_the_last_block_computes_what_is_read(name, kv, last):
    """Logits of the last tokens, and all that a continuation reads later, are those of the whole computation."""
    exact = name != "mixtral"  # its experts want float32
    model = family(name, torch.float64 if exact else torch.float32)
    pruner, near = TokenPruner(UntrainedRouter(), Schedule([0.0, 0.5, 0.3, last]), kv=kv), 1e-9 if exact else 1e-4
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    for more in ({}, {"attention_mask": mask}):
        for count in (1, 3):
            with torch.no_grad(), pruner(model):
                whole = model(IDS, use_cache=True, **more)
                kept = [keep.clone() for keep in pruner.trace.keep]
                part = model(IDS, use_cache=True, logits_to_keep=count, **more)
                assert all(torch.equal(a, b) for a, b in zip(kept, pruner.trace.keep))
                assert torch.allclose(part.logits, whole.logits[:, -count:], atol=near)
                after = {"attention_mask": torch.cat([mask, mask[:, -1:]], 1)} if more else {}
                steps = [
                    model(IDS[:, :1], past_key_values=out.past_key_values, **after).logits for out in (whole, part)
                ]
                assert torch.allclose(*steps, atol=near)


def test_the_last_block_runs_on_one_token_of_a_generated_prompt():
    rows = []
    block = MODEL.model.layers[-1].mlp
    handle = block.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    try:
        with torch.no_grad(), TokenPruner(StaticRouter(), Schedule([0.0, 0.5, 0.5, 0.25]))(MODEL):
            MODEL.generate(TEXT, max_new_tokens=2, do_sample=False)
            assert rows == [1, 1]
            MODEL(TEXT)  # all logits are read
            MODEL(TEXT, logits_to_keep=1, output_hidden_states=True)
            assert rows[2:] == [18, 18]
            watch = MODEL.model.register_forward_hook(functools.partial(lambda *_: None))
            MODEL(TEXT, logits_to_keep=1)
            watch.remove()
            assert rows[4:] == [18]
    finally:
        handle.remove()


def test_a_model_that_reads_all_outputs_whatever_it_is_told():
    """A classifier hands `logits_to_keep` down with other keywords, and reads the last real token of each row."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(MODEL.config).double().eval()
    mask = torch.ones_like(IDS)
    mask[0, 30:] = 0
    with torch.no_grad(), TokenPruner(RandomRouter(1), SCHEDULE)(model):
        found = [model(IDS * mask, attention_mask=mask, **more).logits for more in ({}, {"logits_to_keep": 1})]
    assert torch.equal(*found)


def test_a_pruner_does_not_keep_the_model_that_it_was_attached_to(tmp_path):
    """Neither alive nor in its copies: they would carry all its weights."""
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    with pruner(model):
        pass
    assert len(pickle.dumps(pruner)) < 20_000
    copied = pickle.loads(pickle.dumps(pruner))
    with torch.no_grad(), copied(model):
        model(IDS)
    pruner.save(tmp_path / "p", base="here")
    assert TokenPruner.load(tmp_path / "p")._base
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


# ---------------------------------------------------------------- copies, and another text beside


def test_a_copy_of_a_pruner_is_attached_to_nothing_but_with_its_model():
    model, pruner = tiny_llama(), TokenPruner(DynamicRouter(), SCHEDULE)
    with pruner(model):
        logits, copies = model(IDS).logits, [copy.copy(pruner), copy.deepcopy(pruner)]
        pairs = [copy.deepcopy({"model": model, "pruner": pruner}), copy.deepcopy({"pruner": pruner, "model": model})]
    for one in copies:
        with one(model):
            assert torch.equal(model(IDS).logits, logits)
        assert one.trace is not pruner.trace
    for pair in pairs:
        assert pair["model"].pruner is pair["pruner"] is not pruner
        assert torch.equal(pair["model"](IDS).logits, logits)
        pair["pruner"].detach()
        assert torch.equal(pair["model"](IDS).logits, model(IDS).logits)


def test_guidance_leaves_the_trace_of_the_prompt_that_was_given():
    model, pruner = tiny_llama(), TokenPruner(DynamicRouter(), SCHEDULE)
    with pruner(model):
        model.generate(IDS, max_new_tokens=3, do_sample=False, guidance_scale=1.5, attention_mask=torch.ones_like(IDS))
    assert [keep.shape for keep in pruner.trace.prompt.keep] == [IDS.shape] * 4


class Renamed(LlamaModel):
    """Its cache is called as in transformers 5.24."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, **kwargs):
        about = {"position_ids": position_ids, "inputs_embeds": inputs_embeds, "past_key_values": cache}
        return super().forward(input_ids, attention_mask=attention_mask, **about, **kwargs)


def test_the_cache_of_a_decoder_may_have_either_name():
    model, pruner = tiny_llama(), TokenPruner(seeded(DynamicRouter), SCHEDULE)
    found = []
    for kind in (LlamaModel, Renamed):
        model.model.__class__ = kind
        with pruner(model), torch.no_grad():
            found.append(model.generate(TEXT, max_new_tokens=3, do_sample=False))
            assert any(share > 0 for share in pruner.trace.prompt.sparsity)
    assert torch.equal(*found)
