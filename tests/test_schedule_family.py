"""A family of schedules gives one for every budget, with exactly that mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftp_lightning import Schedule, ScheduleFamily, UserError

FAMILY = ScheduleFamily({0.5: Schedule([0.2, 0.8]), 0.2: Schedule([0.0, 0.4])})


def test_it_is_sorted_and_gives_back_what_was_found():
    assert FAMILY.budgets == (0.2, 0.5) and FAMILY.num_blocks == 2
    assert FAMILY.at(0.2) == Schedule([0.0, 0.4]) and FAMILY.at(0.5) == Schedule([0.2, 0.8])
    assert FAMILY.at(0.35).sparsity == pytest.approx((0.1, 0.6))
    assert FAMILY.at(0.1).sparsity == pytest.approx((0.0, 0.2)) and FAMILY.at(0.0) == Schedule([0.0, 0.0])


@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=6), st.floats(0, 1))
def test_the_mean_is_exact_between_any_two(rows, share):
    family = ScheduleFamily([Schedule(row) for row in rows])
    budget = share * family.budgets[-1]
    found = family.at(budget)
    assert abs(found.budget - budget) <= 1e-9 and all(0 <= s <= 1 for s in found.sparsity)


def test_beyond_the_highest_budget_nothing_is_known():
    with pytest.raises(UserError, match="at most 0.5"):
        FAMILY.at(0.6)
    with pytest.raises(UserError, match="budget is -0.1"):
        FAMILY.at(-0.1)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    FAMILY.save(tmp_path / "schedules.json")
    assert ScheduleFamily.load(tmp_path / "schedules.json") == FAMILY
    assert list(tmp_path.iterdir()) == [tmp_path / "schedules.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "Expecting"), ("[]", "format"), ('{"format": "ftp-lightning/schedules", "version": 1}', "no 'schedules'")],
)
def test_another_file_is_refused(tmp_path, text, reason):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        ScheduleFamily.load(tmp_path / "x.json")
    with pytest.raises(UserError, match="No such file"):
        ScheduleFamily.load(tmp_path / "y.json")


def test_schedules_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        ScheduleFamily([])
    with pytest.raises(ValueError, match="must agree"):
        ScheduleFamily([Schedule([0.1]), Schedule([0.1, 0.2])])
