"""The schedule is a value, the rounding rule is one, and the level step divides N * B."""

import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.decide import kept_tokens
from ftp_lightning.schedule import Schedule, level_step
from ftp_lightning.schedule_family import ScheduleFamily

unit = st.floats(0.0, 1.0)


def test_stages_hold_up_to_the_next_one():
    schedule = Schedule.stages(6, [(1, 0.5), (4, 1.0)], kv="keep")
    assert schedule == Schedule([0.0, 0.5, 0.5, 0.5, 1.0, 1.0], "keep")
    for stages in ([], [(2, 0.5), (2, 0.6)], [(3, 0.5), (1, 0.6)], [(6, 0.5)], [(-1, 0.5)]):
        with pytest.raises(ValueError, match="stages begin at blocks"):
            Schedule.stages(6, stages)


def test_uniform_has_its_budget_in_every_block():
    schedule = Schedule.uniform(7, 0.3)
    assert schedule.sparsity == (0.3,) * 7
    assert schedule.num_blocks == 7
    assert schedule.budget == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize("value", [1.2, -0.1, math.nan, math.inf])
def test_a_value_outside_the_unit_interval_names_its_block(value):
    with pytest.raises(ValueError, match=r"sparsity of block 3 is .*, must be in \[0, 1\]"):
        Schedule([0, 0.5, 1, value])


def test_an_empty_schedule_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        Schedule([])


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Schedule(3), "sparsity is 3, must be one number per block"),
        (lambda: Schedule(None), "sparsity is None, must be one number per block"),
        (lambda: Schedule("01"), "sparsity is '01', must be one number per block"),
        (lambda: Schedule([0.1, None]), r"sparsity is \[0.1, None\], must be one number per block"),
        (lambda: Schedule({0: 0.1}), "must be one number per block"),
        (lambda: Schedule([0.1, 0.2], kv=3), "kv is 3, must be one of evict, keep"),
        (lambda: Schedule.uniform(2.5, 0.3), "num_blocks is 2.5, must be a whole number"),
        (lambda: Schedule.uniform("a", 0.3), "num_blocks is 'a', must be a whole number"),
        (lambda: Schedule.uniform(0, 0.3), "num_blocks is 0, .* at least one block"),
        (lambda: Schedule.uniform(3, "much"), "must be one number per block"),
        (lambda: Schedule.stages(6, 3), r"stages are 3, must be pairs \(first block, sparsity\)"),
        (lambda: Schedule.stages(6, [(1.5, 0.2)]), "must be pairs"),
        (lambda: Schedule.stages(None, [(1, 0.2)]), "num_blocks is None"),
        (lambda: Schedule.default(12, None), r"budget is None, must be in \[0, 1\]"),
        (lambda: Schedule.default(12, 1.5), r"budget is 1.5, must be in \[0, 1\]"),
        (lambda: Schedule.default(12, math.nan), r"budget is nan, must be in \[0, 1\]"),
        (lambda: Schedule.default("a", 0.3), "num_blocks is 'a'"),
        (lambda: ScheduleFamily(3), "a family is made of schedules, and not of 3"),
        (lambda: ScheduleFamily([0.3]), r"a family is made of schedules, and not of \[0.3\]"),
    ],
)
def test_what_makes_no_schedule_is_refused_in_a_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_equality_hash_and_key_go_by_value():
    a, b, other = Schedule([0, 0.25, 1]), Schedule((0.0, 0.25, 1.0)), Schedule([0, 0.25, 0.9999999999999999])
    assert a == b and hash(a) == hash(b) and a.key() == b.key()
    assert a != other and a.key() != other.key()
    assert Schedule([-0.0]).key() == Schedule([0.0]).key()
    assert pickle.loads(pickle.dumps(a)) == a
    assert a.key() == "b30154a6a577e5b6"  # the same on every machine


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        Schedule([0.5]).sparsity = (0.1,)


@given(st.lists(unit, min_size=1, max_size=40))
def test_save_and_load_give_the_same_numbers_to_the_last_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    Schedule(values).save(path)
    assert Schedule.load(path) == Schedule(values)
    assert [p.name for p in path.parent.iterdir()] == ["schedule.json"]
    assert json.loads(path.read_text()).keys() == {"format", "version", "sparsity", "key"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": "ftp-lightning/schedule", "version": 2, "sparsity": [0.1]}',
        '{"format": "other", "version": 1, "sparsity": [0.1]}',
        '{"format": "ftp-lightning/schedule", "version": 1}',
        '{"format": "ftp-lightning/schedule", "version": 1, "sparsity": [1.5]}',
        '{"format": "ftp-lightning/schedule", "version": 1, "sparsity": 3}',
    ],
)
def test_a_broken_file_is_a_user_error_that_names_it(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError, match="broken.json") as caught:
        Schedule.load(path)
    assert str(caught.value).count("\n") <= 2


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="absent.json"):
        Schedule.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("length", "sparsity", "reserved", "kept"),
    [
        (10, 0.0, 2, 10),
        (10, 0.25, 2, 8),  # 2.5 rounds to the even 2
        (10, 0.35, 2, 6),  # 3.5 rounds to the even 4
        (10, 0.9, 2, 2),
        (10, 1.0, 2, 2),
        (1, 1.0, 2, 1),
        (192, 0.3, 2, 134),  # 57.6 -> 58
        (0, 0.5, 2, 0),
    ],
)
def test_kept_tokens(length, sparsity, reserved, kept):
    assert kept_tokens(length, sparsity, reserved) == kept


@given(st.integers(0, 10_000), unit, st.integers(0, 4))
def test_kept_tokens_lie_between_the_reserved_and_all(length, sparsity, reserved):
    assert min(reserved, length) <= kept_tokens(length, sparsity, reserved) <= length


@given(st.integers(1, 80), st.floats(0.001, 0.999), st.floats(0.005, 0.5))
def test_the_level_step_divides_the_budget_and_no_other_divisor_is_nearer(num_blocks, budget, requested):
    step = level_step(num_blocks, budget, requested)
    total = num_blocks * budget / step
    assert abs(total - round(total)) < 1e-9 * total
    neighbours = [num_blocks * budget / k for k in (round(total) - 1, round(total) + 1) if k > 0]
    assert all(abs(step - requested) <= abs(n - requested) + 1e-12 for n in neighbours)


def test_a_step_that_divides_already_stays():
    assert level_step(8, 0.3) == pytest.approx(0.05, abs=1e-15)
    assert level_step(8, 0.0, 0.1) == 0.1


@pytest.mark.parametrize("budget", [-0.1, 1.0, 1.5, math.nan])
def test_an_impossible_budget_is_named(budget):
    with pytest.raises(UserError, match="budget is"):
        level_step(8, budget)
