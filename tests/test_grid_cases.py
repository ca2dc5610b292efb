"""The few cases that stay in the fast tests let every two values meet."""

from itertools import combinations, product

from grid_cases import pairwise


def test_every_two_values_meet_in_a_fast_case():
    values = (["lookup", "assistant"], ["llama", "gemma2", "gemma3"], ["dense", "strict"], ["evict", "keep"])
    cases = pairwise(*values)
    assert [case.values for case in cases] == list(product(*values))
    few = [case.values for case in cases if not case.marks]
    assert len(few) < len(cases) / 2
    for (a, ones), (b, others) in combinations(enumerate(values), 2):
        assert {(case[a], case[b]) for case in few} == set(product(ones, others))
