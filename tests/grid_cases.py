"""Grids of test cases of which the fast tests run a part."""

from itertools import combinations, product

import pytest


def pairwise(*values: list | tuple) -> list:
    """All combinations of the values, as pytest parameters; `slow` but for a few in which every two values meet.

    The few are chosen greedily: the first combination with the most pairs of values that have not met.
    """
    cases = list(product(*values))
    missing = {pair for case in cases for pair in _pairs(case)}
    few = set()
    while missing:
        best = max(cases, key=lambda case: len(_pairs(case) & missing))
        few.add(best)
        missing -= _pairs(best)
    return [pytest.param(*case, marks=[] if case in few else pytest.mark.slow) for case in cases]


def _pairs(case: tuple) -> set:
    return set(combinations(enumerate(case), 2))
