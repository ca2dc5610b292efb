"""`TokenPruner.changed`: a chain of changes ends at the pruner that is made at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import BLOCKS, tiny_llama

from ftp_lightning import Schedule, StaticRouter, TokenPruner, UserError
from ftp_lightning.training.compensation import Compensation, shapes

ROUTER, SCHEDULE = StaticRouter(), Schedule([0.0, 0.25, 0.5, 0.75])
MODES = st.sampled_from(["evict", "keep"])
REMOVED = st.lists(
    st.tuples(st.integers(0, BLOCKS - 1), st.sampled_from(["block", "attention", "mlp"])), max_size=3
).map(tuple)
CHANGES = {
    "kv": MODES | st.lists(MODES, min_size=BLOCKS, max_size=BLOCKS),
    "removed": REMOVED,
    "schedule": st.sampled_from([SCHEDULE, Schedule.uniform(BLOCKS, 0.5)]),
    "choice": st.sampled_from(["topk", "threshold"]),
    "decode": st.sampled_from(["dense", "threshold", "strict"]),
    "attention": st.sampled_from(["window", "exact"]),
    "threshold": st.floats(0, 1),
    "window": st.integers(1, 9),
    "parts": st.sampled_from(["block", "attention", "mlp", "attention+mlp"]),
}
CHANGE = st.sampled_from(sorted(CHANGES)).flatmap(lambda name: st.tuples(st.just(name), CHANGES[name]))


@given(first=st.lists(CHANGE, max_size=4).map(dict), chain=st.lists(CHANGE, max_size=6))
def test_a_chain_of_changes_ends_at_the_pruner_made_at_once(first, chain):
    start = {"router": ROUTER, "schedule": SCHEDULE} | first
    pruner, whole = TokenPruner(**start), dict(start)
    for name, value in chain:
        pruner, whole = pruner.changed(**{name: value}), whole | {name: value}
    assert pruner.identity() == TokenPruner(**whole).identity()
    assert pruner.changed(removed=()).identity() == TokenPruner(**whole | {"removed": ()}).identity()


@pytest.mark.parametrize("own", ["keep", "evict", ("keep", "evict", "keep", "evict")])
def test_blocks_put_back_have_the_mode_of_their_schedule(own):
    pruner = TokenPruner(ROUTER, Schedule(SCHEDULE.sparsity, own), removed=[(0, "block"), (2, "attention")])
    assert pruner.kv != TokenPruner(ROUTER, Schedule(SCHEDULE.sparsity, own)).kv or own == "evict"
    whole = TokenPruner(ROUTER, Schedule(SCHEDULE.sparsity, own))
    assert pruner.changed(removed=()).identity() == whole.identity()
    assert pruner.changed(schedule=SCHEDULE).changed(removed=()).kv == whole.kv
    assert pruner.changed(kv="keep").changed(removed=()).identity() == whole.changed(kv="keep").identity()


def test_one_kv_mode_fits_a_schedule_of_other_length():
    longer = Schedule.uniform(BLOCKS + 1, 0.5)
    assert TokenPruner(ROUTER, SCHEDULE, kv="keep").changed(schedule=longer).kv == ("keep",) * (BLOCKS + 1)


def test_a_compensation_comes_and_goes():
    sizes = {"parts": ("block",), "num_blocks": BLOCKS, "hidden_size": 8, "rank": 0}
    given = Compensation(tensors={name: torch.ones(shape) for name, shape in shapes(**sizes).items()}, **sizes)
    plain = TokenPruner(ROUTER, SCHEDULE, kv="keep")
    mean = plain.changed(skip="mean", compensation=given)
    assert mean.identity() == TokenPruner(ROUTER, SCHEDULE, kv="keep", skip="mean", compensation=given).identity()
    assert mean.changed(skip="identity", compensation=None).identity() == plain.identity()


def test_a_changed_pruner_is_still_that_of_its_base(tmp_path):
    TokenPruner(ROUTER, SCHEDULE).save(tmp_path / "p", base="mine", model=tiny_llama(torch.float32))
    changed = TokenPruner.load(tmp_path / "p").changed(window=5).changed(decode="strict")
    with pytest.raises(UserError, match="another base"):
        changed.attach(tiny_llama(torch.float32, seed=1))
    changed.attach(tiny_llama(torch.float32))
