"""What a text goes on to use: heard in a dense forward, and taught to a router by the guide loss."""

import pytest
import torch
from families import family
from test_engine import seeded, tiny_llama
from test_router_training import SCHEDULE, windows

from ftp_lightning import TokenPruner
from ftp_lightning.lit.router_training import RouterTraining
from ftp_lightning.lit.training_settings import TrainingSettings
from ftp_lightning.routing import make_router
from ftp_lightning.training.listening import listening, needed_later


def by_hand(attentions, real, last):
    """The score's formula, head by head and query by query: lists of (B, T)."""
    found = []
    for weights in attentions:
        scores = torch.zeros(real.shape)
        for row in range(len(real)):
            queries = real[row].nonzero().flatten().tolist()[-last:]
            for j in real[row].nonzero().flatten().tolist():
                visible = [i for i in queries if i >= j]
                if visible:
                    seen = [int(real[row, : i + 1].sum()) for i in visible]
                    said = [n * weights[row, :, i, j].mean().item() for i, n in zip(visible, seen)]
                    scores[row, j] = sum(said) / len(said)
        found.append(scores)
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_scores_are_those_of_the_formula_and_the_forward_is_the_stock_one(padded):
    model, ids = tiny_llama(torch.float32), windows(2).input_ids  # stock eager gives nan for padding in float64
    real = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        real[1, :5] = False
    about = {"attention_mask": real.long()} if padded else {}
    with torch.no_grad():
        plain = model(ids, **about, use_cache=False).logits
        with listening(model, 6, real if padded else None) as heard:
            logits = model(ids, **about, use_cache=False).logits
        model.set_attn_implementation("eager")
        attentions = model(ids, **about, use_cache=False, output_attentions=True).attentions
    assert torch.equal(logits[real], plain[real])
    assert not any("_ftp_tap" in vars(module) for module in model.modules())
    for found, expected in zip(heard, by_hand(attentions, real, 6), strict=True):
        assert torch.allclose(found[real], expected[real], atol=1e-4)


def test_taps_are_gone_also_after_an_error():
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="stop"), listening(model, 3):
        raise RuntimeError("stop")
    assert not any("_ftp_tap" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mistral_sliding", "phi3"])
def test_other_families_are_heard(name):
    model = family(name)
    ids = torch.arange(24).view(2, 12) % model.config.get_text_config().vocab_size
    with torch.no_grad(), listening(model, 4) as heard:
        model(input_ids=ids, use_cache=False)
    assert len(heard) == model.config.get_text_config().num_hidden_layers
    assert all(scores.shape == (2, 12) and scores.isfinite().all() for scores in heard)


def test_what_is_needed_later_never_falls_towards_the_first_block():
    heard = [torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 2.0]]), torch.tensor([[2.0, 0.0]])]
    assert [one.tolist() for one in needed_later(heard)] == [[[3.0, 5.0]], [[3.0, 2.0]], [[2.0, 0.0]]]


def test_the_guide_names_as_many_tokens_as_the_schedule_keeps_and_the_most_needed():
    model, rows = tiny_llama(), windows(3)
    pruner = TokenPruner(seeded(lambda: make_router("projected", 4, model.config.hidden_size)), SCHEDULE)
    system = RouterTraining(model, pruner, TrainingSettings(guide="future"))
    batch = {"input_ids": rows.input_ids, "prompt_tokens": 18, "number": 0}
    decisions = system.student_and_teacher(batch)[2].decisions
    needed = needed_later(system.heard)
    for decision, guide in zip(decisions, system._by_the_future(decisions), strict=True):
        chosen, free = guide.bool(), ~decision.routed.reserved
        assert guide.sum(1).tolist() == decision.keep.sum(1).tolist()
        scores = needed[decision.context.block][:, :18]
        for row in range(3):
            skipped = scores[row][~chosen[row]]
            assert chosen[row][~free[row]].all() and scores[row][chosen[row] & free[row]].min() >= skipped.max()


def test_a_router_learns_what_the_future_needs():
    """The guide alone moves the router towards its decisions."""
    model, rows = tiny_llama(), windows(4)
    pruner = TokenPruner(seeded(lambda: make_router("projected", 4, model.config.hidden_size)), SCHEDULE)
    system = RouterTraining(
        model, pruner, TrainingSettings(guide="future", guide_share=1.0, lambda_d=0.0, lambda_s=0.0)
    )
    system.log = system.log_dict = lambda *args, **kwargs: None
    batch, optimiser = {"input_ids": rows.input_ids, "prompt_tokens": 18, "number": 0}, None
    optimiser, losses = torch.optim.Adam(pruner.router.parameters(), lr=1e-2), []
    for _ in range(40):
        optimiser.zero_grad()
        loss = system.training_step(batch, 0)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
