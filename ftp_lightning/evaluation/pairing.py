"""Two methods on the same items, item by item: what was lost and gained, and whether it can be told from chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.evaluation.record import DENSE, difference, joined, outcomes, pairs, read_record
from ftp_lightning.evaluation.statistics import mcnemar_p

if TYPE_CHECKING:
    from pandas import DataFrame

RECORD = "record.jsonl"


def compare(items: DataFrame, a: str, b: str) -> list[dict[str, Any]]:
    """Per task A against B, over the items that both have scored; tasks without such items are left out.

    difference: mean score of A minus that of B, with its 95 % interval. lost: items that B alone has right; gained:
    that A alone has; p: McNemar's on the two.
    """
    known = items[items["method"].isin([a, b])]
    known = known[known["score"].notna()] if "score" in known else known.iloc[:0]
    found = []
    for task, own in known.groupby("task", sort=False):
        if {a, b} <= set(own["method"]):
            apart, right = difference(own, a, b, "score"), pairs(own, a, b, "right")
            if not apart.items:
                continue
            lost, gained = outcomes(right["a"].tolist(), right["b"].tolist())
            ends = {"difference": apart.value, "low": apart.low, "high": apart.high}
            counts = {"lost": lost, "gained": gained, "p": mcnemar_p(lost, gained)}
            stands_on = {"items": apart.items, "clusters": apart.clusters, "seeds": apart.seeds}
            found.append({"task": task, "a": a, "b": b, **stands_on, **ends, **counts})
    return found


def claims(items: DataFrame, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Every method against dense, and the last one against every other: the claims that a table makes."""
    wanted = [(name, DENSE) for name in methods] + [(methods[-1], name) for name in methods[:-1]]
    return [pair for a, b in wanted for pair in compare(items, a, b)]


# ---------------------------------------------------------------- two runs


def record_of(run: str | Path) -> DataFrame:
    """The record of a run; `run`: that file, or a folder that holds it. UserError where there is none."""
    path = Path(run).expanduser()
    places = (path / RECORD, path / "evaluate" / RECORD)
    return read_record(next((place for place in places if place.is_file()), path))


def side_by_side(first: DataFrame, second: DataFrame, a: str, b: str) -> tuple[DataFrame, int]:
    """Method `a` of the first run as "A" beside method `b` of the second as "B", and how many items have no partner.

    Items are the same where the very same words were asked (`hash`).
    """
    sides = []
    for items, method, name in ((first, a, "A"), (second, b, "B")):
        own = items[items["method"] == method].assign(method=name)
        number = own.groupby(["task", "hash"]).cumcount()  # the same words may be asked twice
        sides.append(own.assign(item=[*zip(own["hash"], number)]))
    both = joined(sides)
    counts = both.groupby(["task", "item"])["method"].transform("size")
    return both[counts == 2], int((counts == 1).sum())
