"""Few-shot examples: how many a task gets, and that the asked row is never one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.harness.declared import declared

FEWSHOT_SEED = 1234
"""lm-eval's own."""

IDENTIFIERS = ("id", "idx", "ind", "index")
"""Fields that number rows; two rows that differ in them alone ask the same."""
ANSWERS = ("answer", "answerKey", "label", "target", "validated_answers")
"""Fields that hold or number the right answer: what is asked does not depend on them."""


def set_shots(name: str, task: Any, num_fewshot: int | None) -> None:
    """Give a task the examples asked for, else those declared; a task that fixes none keeps none, as in lm-eval.

    UserError where local files have none to take them from.
    """
    own = task.get_config("num_fewshot")
    asked = declared(name).shots if num_fewshot is None else num_fewshot
    if own != 0 and asked is not None:
        task.set_config(key="num_fewshot", value=asked)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    shots, local = task.get_config("num_fewshot"), task.config.dataset_path == "json"
    if local and shots and not (task.config.fewshot_split or task.config.training_split):
        split = "dev" if name.startswith("mmlu") else "train"
        raise UserError(
            f"task {name} takes its {shots} examples from the split {split}, which has no file"
            f"\nPut {name.split('_')[0] if split == 'dev' else name}_{split}.jsonl beside it, or give --num_fewshot 0."
        )
    if shots and hasattr(task, "sampler"):
        _leave_asked_row_out(name, task)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


class OtherRows:
    """A sampler of lm-eval that leaves out every row that asks the same as the asked one.

    lm-eval does so only where examples and items come from a split of one name. Where no example asks the same, the
    draws are lm-eval's own.
    """

    def __init__(self, name: str, sampler: Any):
        self.name, self.sampler, self.rows = name, sampler, list(sampler.fewshot_docs())
        sampler.fewshot_indices = None  # applied already
        self.contents = [self._content(row) for row in self.rows]
        self.known, self.asked = set(self.contents), ""

    def ask(self, row: Mapping[str, Any]) -> None:
        """Name the row that the next examples stand before."""
        self.asked = self._content(row)

    def set_rnd(self, seed: int | None) -> OtherRows:
        self.sampler.set_rnd(seed)
        return self

    def sample(self, n: int, **_: Any) -> Sequence[dict]:
        """`n` examples; UserError where too few rows are left."""
        rows = self.rows
        if self.asked in self.known:
            rows = [row for row, content in zip(self.rows, self.contents, strict=True) if content != self.asked]
        if n > len(rows):
            raise UserError(
                f"task {self.name}: {n} examples are asked for, and {len(rows)} rows differ from the asked one"
                "\nGive a smaller --num_fewshot, or more rows."
            )
        return self.sampler.replace_df(rows).sample(n)

    def _content(self, row: Mapping[str, Any]) -> str:
        """What a row asks: the words of the fields the task reads (of an unknown task all that number nothing), in any
        order of its choices, and in any case and spacing."""
        keys = [key for key in declared(self.name).needs if key in row] or [
            key for key in row if key not in IDENTIFIERS
        ]
        asked = [key for key in keys if key not in ANSWERS] or keys
        return json.dumps(sorted(words for key in asked for words in _words(row[key])))


def _words(value: Any) -> Iterator[str]:
    """All texts and numbers in a value, however deep."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _words(one)
    else:
        yield " ".join(str(value).split()).casefold()


def _leave_asked_row_out(name: str, task: Any) -> None:
    """lm-eval tells a sampler the asked row only within one split; so the task tells it here, for every context."""
    task.sampler = OtherRows(name, task.sampler)
    make_context = task.fewshot_context

    def context(doc: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        task.sampler.ask(doc)
        return make_context(doc, *args, **kwargs)

    task.fewshot_context = context
