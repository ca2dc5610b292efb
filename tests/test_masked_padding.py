"""The training forward on padded rows: every row is what it is alone, in value and in gradient."""

import pytest
import torch
from families import family
from test_engine import ROUTERS, seeded, tiny_llama

from ftp_lightning import DynamicRouter, Schedule, TokenPruner
from ftp_lightning.pruning.family import find_decoder
from ftp_lightning.pruning.forward import Forward
from ftp_lightning.pruning.kept import Kept
from ftp_lightning.training.gates import Soft

LENGTHS = ((18, 6), (11, 4), (5, 1), (2, 6))
"""(prompt, response) tokens of every row."""
SCHEDULE = Schedule([0.2, 0.5, 0.7, 0.4])
KV = ("evict", "keep", ("evict", "keep", "keep", "evict"))
ROWS = [torch.randint(3, 64, (p + c,), generator=torch.Generator().manual_seed(p)) for p, c in LENGTHS]


def padded():
    """ids and mask (B, P + C): prompts padded on the left to P = 18, responses on the right to C = 6."""
    ids, mask = torch.full((len(ROWS), 24), 0), torch.zeros(len(ROWS), 24, dtype=torch.long)
    for row, (tokens, (prompt, response)) in enumerate(zip(ROWS, LENGTHS)):
        place = slice(18 - prompt, 18 + response)
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


def student(model, pruner, prompt, ids, mask=None, gates=None, recompute=False):
    """Last hidden states (B, T, D) of the training forward, and what was kept."""
    more = {}
    if mask is not None:
        more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with pruner(model), pruner.masked(prompt, gates, recompute):
        hidden = find_decoder(model)[0](input_ids=ids, use_cache=False, **more).last_hidden_state
    return hidden, pruner.trace.keep


def assert_rows_stand_alone(model, pruner):
    """Same decisions, and hidden states of the prompt's last token and of the response within 1e-9."""
    with torch.no_grad():
        together, keep = student(model, pruner, 18, *padded())
        for row, (tokens, (prompt, response)) in enumerate(zip(ROWS, LENGTHS)):
            alone, own = student(model, pruner, prompt, tokens[None])
            place = slice(18 - prompt, 18 + response)
            assert all(torch.equal(k[row, place], o[0]) for k, o in zip(keep, own))
            assert not any(k[row, : 18 - prompt].any() or k[row, 18 + response :].any() for k in keep)
            assert (together[row, 17 : 18 + response] - alone[0, prompt - 1 :]).abs().max() < 1e-9


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("choice", ["topk", "threshold"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_padded_row_is_what_it_is_alone(router, choice, kv):
    assert_rows_stand_alone(tiny_llama(), TokenPruner(ROUTERS[router](), SCHEDULE, kv=kv, choice=choice, window=4))


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral_sliding", "gemma3"])
def test_of_other_families_too(name, kv):
    assert_rows_stand_alone(family(name), TokenPruner(seeded(DynamicRouter), SCHEDULE, kv=kv, window=4))


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("parts", ["attention", "mlp", "attention+mlp"])
def test_of_parts_too(parts, kv):
    assert_rows_stand_alone(tiny_llama(), TokenPruner(seeded(DynamicRouter), SCHEDULE, kv=kv, parts=parts, window=4))


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("how", [(None, False), (None, True), (Soft(), False)], ids=["hard", "recomputed", "soft"])
def test_padding_moves_no_gradient(kv, how):
    """The router's gradient of a batch is the sum of those of its rows."""

    def loss(hidden):  # not the sum of squares, which the final norm makes the same for all
        return (hidden * torch.linspace(-1, 1, hidden.shape[-1])).pow(2).sum()

    model, router = tiny_llama(), seeded(DynamicRouter)
    pruner = TokenPruner(router, SCHEDULE, kv=kv, window=4)
    weights = list(router.parameters())
    hidden, _ = student(model, pruner, 18, *padded(), *how)
    kept = [hidden[row, 17 : 17 + response] for row, (_, response) in enumerate(LENGTHS)]
    together = torch.autograd.grad(sum(map(loss, kept)), weights)
    alone = [torch.zeros_like(w) for w in weights]
    for tokens, (prompt, _) in zip(ROWS, LENGTHS):
        hidden, _ = student(model, pruner, prompt, tokens[None], None, *how)
        found = torch.autograd.grad(loss(hidden[0, prompt - 1 : -1]), weights)
        alone = [a + f for a, f in zip(alone, found)]
    assert all((t - a).abs().max() < 1e-5 * a.abs().max() for t, a in zip(together, alone))


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_the_whole_text_routed_is_what_it_is_alone(kv):
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv=kv, window=4)
    with torch.no_grad():
        together, _ = student(tiny_llama(), pruner, 24, *padded())
        for row, (tokens, (prompt, response)) in enumerate(zip(ROWS, LENGTHS)):
            alone, _ = student(tiny_llama(), pruner, len(tokens), tokens[None])
            assert (together[row, 18 - prompt : 18 + response] - alone[0]).abs().max() < 1e-9


def test_what_a_padded_row_keeps_is_counted_right(monkeypatch):
    from ftp_lightning.pruning import training_run

    made = []
    monkeypatch.setattr(training_run, "Kept", lambda keep, counts: made.append(Kept(keep, counts)) or made[-1])
    with torch.no_grad():
        student(tiny_llama(), TokenPruner(seeded(DynamicRouter), SCHEDULE), 18, *padded())
    assert len(made) == 4 and all(list(rows.counts) == rows.keep.sum(1).tolist() for rows in made)


def test_padding_is_no_token_that_skips():
    forward = Forward.of((2, 4), 0, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), torch.device("cpu"))
    keep = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 1]], dtype=torch.bool)
    forward.note(keep, keep)
    forward.note(forward.real, keep)  # the MLP alone is skipped: that counts half
    trace = forward.trace
    assert trace.sparsity == pytest.approx([2 / 6, 1 / 6]) and trace.row_sparsity.tolist() == [0.375, 0.1875]
