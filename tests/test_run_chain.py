"""What `run` makes of its settings: the stages of the chain, and what each reads of those before it."""

import pytest

from ftp_lightning.__main__ import parse


def stages(*flags):
    return parse("run", ["--output", "out", *flags]).stages()


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_static_baseline_searches_as_long_as_the_trained_router(rounds):
    chain = stages(f"--rounds={rounds}", "--generations=9", "--finetune_generations=4", "--offspring=5")
    tuned = [chain[name] for name in chain if name.endswith("finetune")]
    search, static = chain["search"], chain["static"]
    assert len(tuned) == rounds and static.generations == sum(one.generations for one in tuned) == 4 * rounds
    assert static.pruned is None and static.schedule == "out/search/schedule.json" == tuned[0].schedule
    same = ("windows", "offspring", "recall_share", "budget", "kv", "sensitivity", "seed", "data", "allocations")
    for name in same:
        assert getattr(static, name) == getattr(search, name) == getattr(tuned[-1], name)
    assert chain["evaluate"].static_schedule == "out/static/schedule.json"
    assert list(chain)[-3:] == ["static", "evaluate", "benchmark"]


def test_nothing_is_searched_for_a_baseline_that_is_not_compared():
    chain = stages("--compare=uniform")
    assert "static" not in chain and chain["evaluate"].static_schedule is None
