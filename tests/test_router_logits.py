"""Router logits of mixtures of experts while a pruner is attached: right, or refused in a sentence."""

import pytest
import torch
from families import family

from ftp_lightning import RandomRouter, Schedule, TokenPruner, UserError

SCHEDULE = Schedule([0.0, 0.5, 0.5, 0.5])
MOE = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe")
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("asked", ["in the call", "in the config"])
@pytest.mark.parametrize("name", MOE)
def test_router_logits_of_a_pruned_forward_are_refused(name, asked, masked):
    model, pruner = family(name, torch.float32), TokenPruner(RandomRouter(1), SCHEDULE)
    model.config.output_router_logits = asked == "in the config"
    about = {"output_router_logits": True} if asked == "in the call" else {}
    with pruner(model), pytest.raises(UserError, match="Leave output_router_logits off") as told:
        if masked:
            with pruner.masked(8):
                model(IDS, labels=IDS, use_cache=False, **about)
        else:
            model(IDS, attention_mask=MASK, labels=IDS, **about)
    assert str(told.value).count("\n") == 1
    dense = model(IDS, attention_mask=MASK, labels=IDS, **about)
    assert dense.aux_loss is not None


@torch.no_grad()
@pytest.mark.parametrize("name", MOE)
def test_where_all_tokens_are_computed_the_auxiliary_loss_is_the_dense_one(name):
    """Under a schedule of 0; and in a continuation, all of which is computed, its logits are there."""
    model, about = family(name, torch.float32), {"output_router_logits": True}
    dense = model(IDS, attention_mask=MASK, labels=IDS, **about)
    with TokenPruner(RandomRouter(1), Schedule.uniform(4, 0.0))(model):
        pruned = model(IDS, attention_mask=MASK, labels=IDS, **about)
    assert torch.equal(pruned.aux_loss, dense.aux_loss) and torch.equal(pruned.loss, dense.loss)
    with TokenPruner(RandomRouter(1), SCHEDULE)(model):
        cache = model(IDS[:, :9], use_cache=True).past_key_values
        rest = model(IDS[:, 9:], past_key_values=cache, **about)
        assert [len(logits) for logits in rest.router_logits] == [2 * 3] * 4


@torch.no_grad()
def test_generate_does_without_them():
    model, pruner = family("mixtral", torch.float32), TokenPruner(RandomRouter(1), SCHEDULE, decode="threshold")
    about = {"attention_mask": MASK, "max_new_tokens": 3, "do_sample": False}
    with pruner(model):
        expected = model.generate(IDS, **about)
        model.config.output_router_logits = True
        assert torch.equal(model.generate(IDS, **about), expected)


@torch.no_grad()
@pytest.mark.parametrize("removed", ["block", "mlp"])
def test_removed_experts_have_no_logits(removed):
    model = family("mixtral", torch.float32)
    pruner = TokenPruner(RandomRouter(1), Schedule.uniform(4, 0.0), removed=[(1, removed)])
    with pruner(model), pytest.raises(UserError, match="router logits"):
        model(IDS, output_router_logits=True)
