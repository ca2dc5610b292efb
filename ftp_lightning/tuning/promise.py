"""The promise of `tune`: which cut may be called one that keeps a share of the answers.

Several cuts are tested on the same validation prompts, so the largest one that looks good may look good by chance. This
is why cuts are tested in one order that was fixed before, from the smallest upward, and the first that fails ends it.
Then no correction is needed: a cut that breaks the promise is only reached where the first such cut in the order has
passed its own test by mistake. The chance of that is the error of one test, however many cuts there are. This is fixed
sequence testing (Maurer, Hothorn and Lehmacher 1995), which "Learn then Test" (Angelopoulos et al. 2021, arXiv
2110.01052, Section 2.3) uses to calibrate models. A corrected level, such as Bonferroni's, would hold as well. It finds
smaller cuts, because more skipping hardly ever keeps more answers.

One test: the lower end of the 95 % interval of kept answers (`evaluation.record.kept`) is at least the target. Of
answers that are documents of their own this is Wilson's interval, whose lower end is too high in about 2.5 % of
samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

from ftp_lightning.evaluation.spread import Z
from ftp_lightning.evaluation.statistics import Interval, clustered
from ftp_lightning.tuning.parts import SHARES


def holds(kept: Interval, keep: float) -> bool:
    """Whether at least a share `keep` of the answers is kept, with 95 % confidence."""
    return kept.low is not None and kept.low >= keep


def climb(measure: Callable[[int], Interval], cuts: int, keep: float, go_on: Callable[[], bool] = lambda: True) -> int:
    """How many cuts hold, counted from the smallest: cuts 0, 1, ... are measured up to the first that fails.

    Args:
        measure: the kept answers at a cut, by its number in ascending order.
        cuts: how many there are.
        keep: the share of answers to keep.
        go_on: asked before each cut but the first; ending early is always safe.
    """
    for number in range(cuts):
        if (number and not go_on()) or not holds(measure(number), keep):
            return number
    return cuts


def step_down(measure: Callable[[int], Interval], passed: int, keep: float) -> int:
    """How many cuts are left once held-out prompts were asked about those that passed, from the largest downward.

    A cut is confirmed where the share that held-out prompts keep is at least `keep`. Only the first question is a
    confirmation. Where it fails, the smaller cuts are asked in turn, and what comes back is the best guess.
    """
    for left in range(passed, 0, -1):
        value = measure(left - 1).value
        if value is not None and value >= keep:
            return left
    return 0


def reachable(documents: Sequence[Hashable]) -> float:
    """The largest share that these validation prompts can show: the lower end where all answers are kept.

    documents: whose prompt each one is. 0 where there are fewer than two documents.
    """
    return clustered([1.0] * len(documents), documents).low or 0.0


def prompts_needed(keep: float) -> int:
    """Prompts in all, each a document of its own, of which enough validate for Wilson's lower end to reach `keep`.

    With all n validation answers kept that end is n / (n + z^2), so n >= z^2 keep / (1 - keep).
    """
    if keep >= 1.0:
        raise ValueError(f"keep is {keep}: no number of prompts is enough")
    return math.ceil(math.ceil(Z**2 * keep / (1.0 - keep)) / SHARES["validation"])
