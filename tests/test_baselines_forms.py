"""A rival is compared under the best schedule it can have, and no schedule of ours leaves it nothing to select."""

import math

import pytest
from tiny import random_llama

from ftp_lightning.baselines.peer import ever_flatter, steps
from ftp_lightning.baselines.registry import METHODS, Profile, Setting, best_form
from ftp_lightning.costs.budget import OutOfReach
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.schedule import Schedule

BLOCKS, PROFILE = 8, Profile(128)
SEARCHED = Schedule([0.0, 0.1, 0.9, 0.9, 0.2, 0.2, 0.9, 1.0])


@pytest.fixture(scope="module")
def setting():
    return Setting(random_llama(99, num_hidden_layers=BLOCKS), searched=SEARCHED)


@pytest.mark.parametrize("name", ["lazy_llm", "zero_tprune", "spatten"])
@pytest.mark.parametrize("cut", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_a_rising_schedule_of_a_rival_never_leaves_a_block_without_tokens(setting, name, cut):
    pruner = METHODS[name].place(setting, cut, PROFILE)
    sparsity = pruner.scheduled.sparsity
    assert max(sparsity) <= 0.8 and sparsity[0] == 0.0 and list(sparsity) == sorted(sparsity)
    assert planned_cut(setting.model, pruner, PROFILE.prompt_tokens) == pytest.approx(cut, abs=0.01)


def test_forms_get_flatter_until_all_pruned_blocks_are_alike():
    forms = list(ever_flatter(steps(4)))
    assert forms[0] == steps(4) and forms[-1].sparsity == (0.0, 1.0, 1.0, 1.0)
    assert forms[2].sparsity == pytest.approx((0.0, 2 / 3, 5 / 6, 1.0))


def test_the_own_schedule_of_skip_gpt_leaves_the_first_block_dense(setting):
    sparsity = METHODS["skip_gpt"].place(setting, 0.3, PROFILE).scheduled.sparsity
    assert sparsity[0] == 0.0 and len(set(sparsity[1:])) == 1 and sparsity[1] > 0.2


def by_form(losses):
    """A measure by the form that a schedule has, and the list of what it was asked."""
    asked = []

    def measure(pruner):
        s = pruner.scheduled.sparsity
        name = "searched" if s[2] > s[1] > 0 and s[4] < s[2] else "first dense" if s[1] == s[7] > 0 else "own"
        asked.append(name)
        return losses[name]

    return measure, asked


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({"own": 3.0, "first dense": 2.0, "searched": 1.0}, "searched"),
        ({"own": 3.0, "first dense": 1.0, "searched": 2.0}, "first dense"),
        ({"own": 1.0, "first dense": 1.0, "searched": 1.0}, "own"),
        ({"own": math.nan, "first dense": 9.0, "searched": math.inf}, "first dense"),
    ],
)
def test_the_form_of_least_loss_is_taken(setting, losses, best):
    measure, asked = by_form(losses)
    name, pruner = best_form(METHODS["lazy_llm"], setting, 0.2, PROFILE, measure)
    assert (name, asked) == (best, ["own", "first dense", "searched"])
    assert measure(pruner) is losses[best]
    assert planned_cut(setting.model, pruner, PROFILE.prompt_tokens) == pytest.approx(0.2, abs=0.01)


def test_forms_that_are_none_or_out_of_reach_are_not_asked(setting):
    measure, asked = by_form({"own": 1.0, "first dense": 0.5})
    assert best_form(METHODS["deletion_recent"], setting, 0.2, PROFILE, lambda pruner: 0.0)[0] == "own"
    bare = Setting(setting.model)
    assert best_form(METHODS["lazy_llm"], bare, 0.2, PROFILE, measure)[0] == "first dense" and len(asked) == 2
    last = Setting(setting.model, searched=Schedule([0.0] * 7 + [1.0]))
    measure, asked = by_form({"own": 1.0, "first dense": 0.5})
    assert best_form(METHODS["lazy_llm"], last, 0.5, PROFILE, measure)[0] == "first dense" and len(asked) == 2
    with pytest.raises(OutOfReach):
        best_form(METHODS["lazy_llm"], setting, 0.99, PROFILE, measure)
