"""The record: one table of items. Every table, figure, interval and claim of an evaluation is made from it.

A record is a pandas.DataFrame with one row per item and method. Columns that a measurement does not know are missing.

| column | meaning |
|---|---|
| method, seed, task, item | whose answer to what; `item` is unique within a task |
| document | what the item was made from; items of one document go together in every interval |
| hash | of the words that were asked; without a document, items of the same words go together |
| prompt_tokens, continuation_tokens | tokens of the prompt, and of what followed it |
| right, score | whether the answer is right, and its score by the task's metric |
| first, agreed, kl | first token and whole answer as the dense model's; KL per continuation token, nats |
| needed | whether the item counts for `kept`: dense is right, and wrong without the passage where that can be asked |
| sparsity | share of (token, block) pairs of the prompt that were skipped |
| flops, dense_flops | of prompt and answer |
| kv_bytes, dense_kv_bytes | keys and values that the prompt leaves in the cache |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.statistics import Interval, clustered, paired

if TYPE_CHECKING:
    from pandas import DataFrame

KEY = ["task", "item"]
COLUMNS = ["method", "seed", *KEY]
"""Those that every record has."""
DENSE = "dense"
_WHOSE = ("document", "hash")


def record(items: Iterable[Mapping[str, Any]], method: str, task: str, seed: int = 0) -> DataFrame:
    """The items of one measurement as a record."""
    import pandas

    rows = [{"method": method, "seed": seed, "task": task, "item": number, **item} for number, item in enumerate(items)]
    return pandas.DataFrame(rows)


def joined(parts: Sequence[DataFrame]) -> DataFrame:
    """Several records as one."""
    import pandas

    filled = [part for part in parts if len(part)]
    return pandas.concat(filled, ignore_index=True) if filled else pandas.DataFrame(columns=COLUMNS, dtype=object)


def with_need(items: DataFrame, dense: DataFrame, without: DataFrame | None = None) -> DataFrame:
    """The record with `dense_right`, and `needed`: dense answers the item right, and wrong without its passage.

    `without`: the dense model's answers where the passage was taken away; the tasks it lacks need dense right alone.
    """
    right = _verdicts(dense)
    alone = {} if without is None else _verdicts(without)
    needed = {key: verdict and not alone.get(key, False) for key, verdict in right.items()}
    keys = _keys(items)
    told = {"needed": [needed.get(key, False) for key in keys], "dense_right": [right.get(key) for key in keys]}
    return items.assign(**told) if len(items) else items


def flops_cut(items: DataFrame) -> float | None:
    """Share of the FLOPs that was saved, all items added up: 1 - sum(flops) / sum(dense_flops)."""
    if "flops" not in items or "dense_flops" not in items:
        return None
    known = items[items["flops"].notna() & items["dense_flops"].notna()]
    dense = float(known["dense_flops"].sum())
    return 1.0 - float(known["flops"].sum()) / dense if dense else None


def mean(items: DataFrame, column: str) -> Interval:
    """Mean of a column with its 95 % interval over documents and, where they vary, seeds."""
    known = items[items[column].notna()] if column in items else items.iloc[:0]
    values = known[column].astype(float).tolist() if column in known else []
    return clustered(values, documents(known), seeds(known))


def kept(items: DataFrame, column: str = "right") -> Interval:
    """Share of the needed items whose answer is still right, with its interval. `column`: what counts as kept."""
    return mean(items[items["needed"].astype(bool)], column)


def difference(items: DataFrame, a: str, b: str, column: str = "right") -> Interval:
    """Method `a` minus method `b` on the items (and seeds) that both have measured, item by item."""
    both = pairs(items, a, b, column)
    return paired(both["a"].tolist(), both["b"].tolist(), documents(both), seeds(both))


def outcomes(right: Sequence[Any], other: Sequence[Any]) -> tuple[int, int]:
    """(lost, gained): how many items the other alone has right, and how many this one alone."""
    known = [pair for pair in zip(right, other, strict=True) if not any(map(_missing, pair))]
    both = [(bool(one), bool(two)) for one, two in known]
    return both.count((False, True)), both.count((True, False))


def pairs(items: DataFrame, a: str, b: str, column: str) -> DataFrame:
    """Task, item, document, hash and seed of the items that both methods have measured, and the two values `a` and `b`.

    A method that was measured once (dense, or one that no seed changes) is held against every seed of the other. Items
    of one number whose documents or words differ are not the same item: they make no pair. ValueError where a method
    has an item twice under one seed.
    """
    one, two = (_measured(items, name, column) for name in (a, b))
    both_vary = min(len(set(side["seed"])) for side in (one, two)) > 1
    key = [*KEY, "seed"] if both_vary else KEY
    left = one.reindex(columns=[*KEY, *_WHOSE, "seed", column]).rename(columns={column: "a"})
    right = two.reindex(columns=[*key, *_WHOSE, column]).rename(columns={column: "b"})
    both = left.merge(right, on=key, suffixes=("", " b"))
    for name in _WHOSE:
        own, other = both[name], both.pop(f"{name} b")
        both = both[own.isna() | other.isna() | (own == other)]
    return both.astype({"a": float, "b": float})


def _measured(items: DataFrame, method: str, column: str) -> DataFrame:
    """The items of a method that have this column, each once under a seed; else ValueError."""
    own = items[(items["method"] == method) & items[column].notna()] if column in items else items.iloc[:0]
    twice = own[own.duplicated([*KEY, "seed"])]
    if len(twice):
        task, item = twice.iloc[0][KEY]
        raise ValueError(f"{method} has item {item} of task {task!r} twice: no telling which one is meant")
    return own


def documents(items: DataFrame) -> list[tuple[Any, ...]]:
    """Whose item each one is, within its task: its document; where it has none, the words asked (`hash`), else itself.

    So a question that comes back under every seed is one cluster, as a document is, and questions that were drawn anew
    for every seed are clusters within their seeds. Of items without either, those of one number count as one question:
    the interval is then too wide where they are not, and never too narrow [ours, by simulation].
    """
    if not len(items):
        return []
    none = [None] * len(items)
    known, words = (items[name].tolist() if name in items else none for name in ("document", "hash"))
    own = zip(items["task"], items["item"], known, words, strict=True)
    return [_cluster(*one) for one in own]


def _cluster(task: str, item: Any, document: Any, words: Any) -> tuple[Any, ...]:
    if not _missing(document):
        return task, document
    return (task, "item", item) if _missing(words) else (task, "words", words)


def seeds(items: DataFrame) -> list[Any] | None:
    """The seeds, where there are several."""
    found = items["seed"].tolist() if "seed" in items else []
    return found if len(set(found)) > 1 else None


def as_lines(items: DataFrame) -> str:
    """The record as JSON lines; what an item does not have is left out of its line."""
    rows = ({key: value for key, value in row.items() if not _missing(value)} for row in items.to_dict("records"))
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_record(path: Path) -> DataFrame:
    """What `as_lines` has written. UserError where the file holds no record."""
    import pandas

    try:
        found = pandas.read_json(path, orient="records", lines=True, dtype=False)
        found[COLUMNS]  # noqa: B018  says which column is missing
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} holds no record: {str(error)[:80]}\nMake one with `ftp-lightning evaluate`.") from None
    return found


def _keys(items: DataFrame) -> list[tuple[Any, ...]]:
    return list(items[KEY].itertuples(index=False, name=None)) if len(items) else []


def _verdicts(items: DataFrame) -> dict[tuple[Any, ...], bool]:
    if not len(items):
        return {}
    known = zip(_keys(items), items["right"], strict=True)
    return {key: bool(verdict) for key, verdict in known if not _missing(verdict)}


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
