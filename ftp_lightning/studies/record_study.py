"""The record: what pruners keep of real models' answers, cell by cell, and its tables.

A method is named by what it is:

* "17-29" or "12,14,18,20-29": the blocks that all prompt tokens but the first and last skip; they get nothing;
* "17-29 fitted 56": the same, and skipped tokens get maps of that rank, fitted on the calibration questions;
* "NAME at 0.2": a ready-made pruner, or one in a folder, at that budget of its family; "NAME shared at 0.2": without
  the maps of their own that it has for small cuts;
* "fast_kv to 0.2": a method of the registry that needs no calibration, under its own schedule, where a prompt of
  1,000 tokens saves that share of its FLOPs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.record import difference, flops_cut, joined, kept, mean, record
from ftp_lightning.studies.grid import Cell

if TYPE_CHECKING:
    from pandas import DataFrame

    from ftp_lightning.evaluation.replayed import Answered
    from ftp_lightning.pruning import TokenPruner
    from ftp_lightning.studies.record_questions import Asked, Sources


PLACED_AT = 1000
"""Tokens of the prompt at which methods of the registry are placed, as in docs/real_models.md."""


@dataclass(frozen=True)
class Recorded(Cell):
    """One method on one chunk of one task."""

    model: str
    split: str
    task: str
    chunk: int
    method: str


@dataclass(frozen=True)
class RecordStudy:
    """Measures cells; the dense model answers a chunk once for all methods that follow each other.

    Attributes:
        asked: model -> its questions. sources: where they come from.
        items: of a chunk. fit_items: of each task that maps are fitted on.
    """

    asked: tuple[tuple[str, Asked], ...]
    sources: Sources
    items: int = 10
    fit_items: int = 8

    def measure(self, cell: Recorded) -> DataFrame:
        from ftp_lightning.evaluation.replayed import replayed

        pruner = self.pruner(cell.model, cell.method)
        dense = self.dense(cell.model, cell.split, cell.task, cell.chunk)
        found = [dict(replayed(*self.loaded(cell.model), one, pruner)) for one in dense]
        first = cell.chunk * self.items
        return joined([record(found, cell.method, cell.task)]).assign(item=range(first, first + len(found)))

    @lru_cache(maxsize=1)  # noqa: B019  it lives as long as the process
    def dense(self, model: str, split: str, task: str, chunk: int) -> list[Answered]:
        """What the dense model answers to one chunk."""
        from ftp_lightning.evaluation.replayed import answered

        questions = self.questions(model, split, task, chunk * self.items, self.items)
        return [answered(*self.loaded(model), question) for question in questions]

    def questions(self, model: str, split: str, task: str, first: int, count: int) -> list[Any]:
        from ftp_lightning.studies.record_questions import record_questions

        asked = dict(self.asked)[model]
        return record_questions(self.loaded(model)[1], asked, self.sources, split, task, first, count)

    @cache  # noqa: B019
    def pruner(self, model: str, method: str) -> TokenPruner:
        """The method of this name. UserError for a name that says none."""
        from ftp_lightning import Schedule, StaticRouter, TokenPruner
        from ftp_lightning.disk.ready import load_pruner
        from ftp_lightning.pruning.family import find_blocks

        if " at " in method:
            name, budget = method.split(" at ")
            found = load_pruner(name.removesuffix(" shared")).at(float(budget))
            if name.endswith(" shared") and found.compensation is not None:
                found = found.changed(compensation=replace(found.compensation, smaller=()))
            return found
        if " to " in method:
            return _placed(method, self.loaded(model)[0])
        named, _, rank = method.partition(" fitted ")
        count = len(find_blocks(self.loaded(model)[0]))
        blocks = blocks_of(named, count)
        schedule = Schedule([float(block in blocks) for block in range(count)], kv="keep")
        if not rank:
            return TokenPruner(StaticRouter(), schedule)
        about: dict[str, Any] = {"parts": "attention+mlp", "skip": "low-rank", "least_tokens": 0}
        return TokenPruner(StaticRouter(), schedule, compensation=self.fitted(model, int(rank)).only(blocks), **about)

    @cache  # noqa: B019
    def fitted(self, model: str, rank: int) -> Any:
        from ftp_lightning import fit_compensation
        from ftp_lightning.data.rows import Row, Rows

        asked = dict(self.asked)[model]
        found = [self.questions(model, "calibration", task, 0, self.fit_items) for task in asked.fitted_on]
        rows = Rows([Row(list(question.ids), []) for questions in found for question in questions])
        return fit_compensation(self.loaded(model)[0], rows, rank, batch_size=1, parts="attention+mlp").rounded()

    @lru_cache(maxsize=1)  # noqa: B019
    def loaded(self, model: str) -> tuple[Any, Any]:
        from ftp_lightning.models import load

        loaded, tokenizer = load(model)
        return loaded.eval().requires_grad_(False), tokenizer


def _placed(method: str, model: Any) -> TokenPruner:
    """ "NAME to CUT" of the registry. UserError where there is no such method, or it has to be calibrated."""
    from ftp_lightning.baselines.registry import METHODS, Profile, Setting

    name, cut = method.split(" to ")
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}\nGive one of {', '.join(METHODS)}.")
    return METHODS[name].place(Setting(model), float(cut), Profile(PLACED_AT))


def blocks_of(name: str, count: int) -> list[int]:
    """The numbers in "12,14,18,20-29". UserError where it is none, or a block that is not there."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", name):
        raise UserError(f"there is no method {name!r}\nGive blocks (17-29), BLOCKS fitted RANK, or PRUNER at BUDGET.")
    ends = [part.split("-") for part in name.split(",")]
    found = [block for part in ends for block in range(int(part[0]), int(part[-1]) + 1)]
    if max(found) >= count:
        raise UserError(f"method {name!r} names block {max(found)}; the model has {count}\nGive 0 to {count - 1}.")
    return found


def record_table(items: DataFrame) -> str:
    """Markdown, one row per method: its cut; of each task the answers kept and the KL; shares of all items."""
    tasks = list(dict.fromkeys(items["task"]))
    heads = ["method, FLOPs cut", *(f"{task}: kept, KL" for task in tasks), "all kept, % [95 %]", "first tokens, %"]
    rows = []
    for method, own in items.groupby("method", sort=False):
        cells = [_share(own[own["task"] == task]) for task in tasks]
        shares = [f"{one.scaled(100):.1f}" for one in (kept(own), mean(own, "first"))]
        rows.append([f"{method}, {flops_cut(own) or 0.0:.1%}", *cells, *shares])
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def differences(items: DataFrame, pairs: Sequence[tuple[str, str]]) -> str:
    """Markdown: of each pair of methods the first minus the second, item by item: KL, and answers kept."""
    lines = ["| comparison | KL | answers kept, points |", "| --- | --- | --- |"]
    for one, two in pairs:
        kl, right = difference(items, one, two, "kl"), difference(items[items["needed"]], one, two).scaled(100)
        lines.append(f"| {one} minus {two} | {kl:+.3f} | {right:+.0f} |")
    return "\n".join(lines)


def _share(items: DataFrame) -> str:
    needed = items[items["needed"].astype(bool)]
    if items.empty:
        return "–"
    return f"{int(needed['right'].sum())} of {len(needed)}, {mean(items, 'kl').value or 0.0:.3f}"
