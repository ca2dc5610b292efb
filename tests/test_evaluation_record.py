"""The record: sums over all items, what is needed, pairs by item and seed, and the way to disk and back."""

import numpy as np
import pandas
import pytest

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation import record as of
from ftp_lightning.evaluation.pairing import compare


def items(method, right, task="t", seed=0, **columns):
    rows = [{"right": r, "document": n // 2, **{k: v[n] for k, v in columns.items()}} for n, r in enumerate(right)]
    return of.record(rows, method, task, seed)


def test_the_flops_cut_adds_up_all_items_and_is_no_mean_of_shares():
    found = items("a", [1, 1], flops=[50.0, 900.0], dense_flops=[100.0, 1000.0], kv_bytes=[1, 1], dense_kv_bytes=[4, 4])
    assert of.flops_cut(found) == pytest.approx(1 - 950 / 1100)
    assert of.flops_cut(items("a", [1])) is None
    half = of.joined([found, items("a", [1], task="u")])  # items without an account count in no sum
    assert of.flops_cut(half) == pytest.approx(1 - 950 / 1100)


def test_needed_is_right_with_the_passage_and_wrong_without():
    dense, without = items("dense", [True, True, False, True]), items("dense", [False, True, False, False])
    pruned = of.with_need(items("a", [True, True, True, False]), dense, without)
    assert pruned.needed.tolist() == [True, False, False, True]
    found = of.kept(pruned)
    assert found.value == 0.5 and found.items == 2
    assert of.with_need(items("a", [True] * 4), dense).needed.tolist() == [True, True, False, True]


def test_pairs_go_by_task_and_item_whatever_the_order():
    a, b = items("a", [True, False, True]), items("b", [False, False, True]).iloc[::-1]
    other = items("b", [True, True, True], task="u")
    found = of.pairs(of.joined([a, b, other]), "a", "b", "right")
    assert sorted(zip(found.item, found.a, found.b)) == [(0, 1.0, 0.0), (1, 0.0, 0.0), (2, 1.0, 1.0)]
    assert of.difference(of.joined([a, b]), "a", "b").value == pytest.approx(1 / 3)


def test_pairs_of_trained_methods_go_by_seed_and_those_of_one_run_by_item():
    a = of.joined([items("a", [True, False], seed=seed) for seed in (0, 1)])
    b = of.joined([items("b", [seed == 1, False], seed=seed) for seed in (0, 1)])
    found = of.pairs(of.joined([a, b]), "a", "b", "right")
    assert len(found) == 4 and (found.a - found.b).tolist() == [1.0, 0.0, 0.0, 0.0]
    once = of.pairs(of.joined([a, items("c", [False, False])]), "a", "c", "right")
    assert len(once) == 4 and once.seed.tolist() == [0, 0, 1, 1]
    assert of.mean(a, "right").seeds == 2


def test_items_that_are_not_the_same_make_no_pair():
    for name in ("document", "hash"):
        a = items("a", [True] * 3).assign(**{name: [1, 2, 3]})
        b = items("b", [False] * 3).assign(**{name: [1, 5, None]})
        found = of.pairs(of.joined([a, b]), "a", "b", "right")
        assert found.item.tolist() == [0, 2] and list(found.columns).count(name) == 1
    twice = of.joined([items("a", [True, True]), items("a", [False, False])])
    with pytest.raises(ValueError, match="a has item 0 of task 't' twice"):
        of.pairs(twice, "a", "a", "right")


def test_a_comparison_of_nothing_claims_nothing():
    empty = of.joined([])
    assert of.difference(empty, "a", "b").note == "no items" and of.mean(empty, "right").value is None
    apart = of.joined([items("a", [True]), items("b", [True]).assign(item=7)]).assign(score=1.0)
    assert compare(apart, "a", "b") == []


def test_documents_of_two_tasks_are_not_one():
    both = of.joined([items("a", [1, 1, 0, 0]), items("a", [0, 0, 1, 1], task="u")])
    assert of.mean(both, "right").clusters == 4


def test_a_record_comes_back_from_disk(tmp_path):
    found = of.joined([items("a", [True, False], kl=[0.5, None]), items("b", [True, True])])
    path = tmp_path / "record.jsonl"
    path.write_text(of.as_lines(found))
    again = of.read_record(path)
    pandas.testing.assert_frame_equal(
        again[["method", "task", "item", "document"]], found[["method", "task", "item", "document"]]
    )
    assert again.kl.dropna().tolist() == [0.5] and of.mean(again, "right").value == 0.75
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="holds no record"):
        of.read_record(path)


def seeded(values, same_questions):
    """A record without documents; values (seeds, items). `hash` is that of the words asked."""
    words = [[n if same_questions else f"{n}/{seed}" for n in range(len(row))] for seed, row in enumerate(values)]
    parts = [
        of.record([{"right": v, "needed": True, "hash": w} for v, w in zip(*one)], "a", "t", seed)
        for seed, one in enumerate(zip(values, words))
    ]
    return of.joined(parts)


def test_a_question_without_a_document_is_one_cluster_however_often_it_is_asked():
    values = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    same, other = seeded(values, True), seeded(values, False)
    assert (of.kept(same).clusters, of.kept(same).seeds) == (3, 2)
    assert (of.kept(other).clusters, of.kept(other).seeds) == (6, 2)
    assert of.kept(other.drop(columns="hash")).clusters == 3  # unknown words: taken for the same, the wider reading
    named = other.assign(method="b", right=0.0)
    assert of.difference(of.joined([other, named]), "a", "b").clusters == 6


@pytest.mark.parametrize("same_questions", [True, False])
@pytest.mark.parametrize("between", [0.0, 0.3])
def test_answers_of_three_seeds_are_covered_whether_or_not_they_were_asked_the_same(same_questions, between):
    """30 questions, kept where a difficulty plus the seed's own effect is below a bound: 80 % in the long run."""
    rng, hits, trials = np.random.default_rng(7), 0, 80
    bound = 0.8416 * (1 + between**2) ** 0.5
    for _ in range(trials):
        difficulty = np.repeat(rng.normal(size=(1, 30)), 3, 0) if same_questions else rng.normal(size=(3, 30))
        right = difficulty + between * rng.normal(size=(3, 1)) < bound
        found = of.kept(seeded(right.astype(float).tolist(), same_questions))
        hits += found.low <= 0.8 <= found.high
    assert hits >= 0.92 * trials
