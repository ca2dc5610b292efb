"""Rows: batches, their padding and order, what is hashed, sampled and counted."""

import itertools

import pytest
import torch

from ftp_lightning.data.rows import Row, Rows, moved, scored_tokens

ROWS = Rows(
    [Row([1, 5, 6], [7, 2]), Row([1, 8], [9, 9, 9], "chat", 1), Row([1, 4, 4], [4, 2], "plain", 3)],
    {"long_prompt": 2},
    1,
)


def test_prompts_are_padded_on_the_left_and_continuations_on_the_right():
    batch = ROWS.batch([1, 0])
    assert batch["input_ids"].tolist() == [[0, 1, 8, 9, 9, 9], [1, 5, 6, 7, 2, 0]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert batch["prompt_tokens"] == 3 and batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert scored_tokens(batch).tolist() == [[True] * 3, [True, True, False]]
    even = ROWS.batch([2, 0])
    assert set(even) == {"input_ids", "prompt_tokens"} and scored_tokens(even) is None
    assert even["input_ids"].tolist() == [[1, 4, 4, 4, 2], [1, 5, 6, 7, 2]]
    assert moved(batch, torch.device("cpu"))["prompt_tokens"] == 3


def test_rows_of_one_length_come_together_and_in_their_order():
    batches = list(ROWS.batches(2))
    assert [numbers for numbers, _ in batches] == [[1, 0], [2]] and ROWS.order == [1, 0, 2]
    assert [numbers for numbers, _ in ROWS.subset([0, 2]).batches(2)] == [[0, 1]]
    even = Rows.even(torch.arange(60).reshape(10, 6), 4, ["plain"] * 10, list(range(10)))
    assert even.one_shape and not ROWS.one_shape
    for (numbers, batch), start in itertools.zip_longest(even.batches(4), (0, 4, 8)):
        assert numbers == list(range(start, min(start + 4, 10))) and "attention_mask" not in batch
        assert torch.equal(batch["input_ids"], torch.arange(60).reshape(10, 6)[start : start + 4])
    assert torch.equal(even.input_ids, torch.arange(60).reshape(10, 6))


def test_rows_are_hashed_sampled_and_counted():
    moved_end = Rows([Row([1, 5], [6, 7, 2]), *ROWS.rows[1:]])
    other = Rows([Row([1, 5, 6], [7, 2], "plain", 9), *ROWS.rows[1:]])
    kind = Rows([Row([1, 5, 6], [7, 2], "recall"), *ROWS.rows[1:]])
    assert len({rows.hash() for rows in (ROWS, moved_end, other, kind, ROWS.subset([1, 0, 2]))}) == 5
    assert ROWS.hash() == Rows(ROWS.rows).hash()
    assert ROWS.subset([1]).counts() == {"rows": 1, "cut": 1, "long_prompt": 2}
    assert (ROWS + ROWS).counts() == {"rows": 6, "cut": 2, "long_prompt": 4}
    many = Rows([Row([i], [i], "plain", i) for i in range(50)])
    assert many.sample(10, 1).rows == many.sample(30, 1).rows[:10] != many.sample(10, 2).rows
    assert len(many.sample(99, 0)) == len(many.sample(None, 0)) == 50 and many.sample(10, 1).rows != many.rows[:10]


def test_prompts_lose_their_continuations_alone():
    prompts = ROWS.prompts()
    assert prompts.shapes == [(3, 0), (2, 0), (3, 0)] and prompts.kinds == ROWS.kinds
    with pytest.raises(ValueError, match="without prompt tokens"):
        Rows([Row([], [1])])
