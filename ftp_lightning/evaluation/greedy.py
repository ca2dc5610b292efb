"""Questions on facts in a passage, answered greedily, without a harness: what studies ask many times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftp_lightning.costs.request import row_costs
from ftp_lightning.data.text import prompt_ids
from ftp_lightning.evaluation.record import joined, record
from ftp_lightning.evaluation.scoring import score_after_prompt

if TYPE_CHECKING:
    from pandas import DataFrame

    from ftp_lightning.pruning import TokenPruner

Question = tuple[list[int], list[int]]
"""Token ids of a context, begun as the tokenizer begins a text, and of its right answer."""


@dataclass(frozen=True)
class Questions:
    """Recall items as a task of `evaluation.bench.Bench`: the right answer counts where greedy decoding would give it.

    It is scored as lm-eval's `ftp` scores it, without the wrong choices.
    """

    model: Any
    tokenizer: Any
    items: Sequence[Mapping[str, Any]]
    name: str = "story_recall"
    batch_size: int = 16

    def __call__(self, pruner: TokenPruner | None, mode: str = "prompt") -> DataFrame:
        """The record of all items; dense also that of their twins without facts. `mode` is always "prompt"."""
        if pruner is None:
            twins = [("context", self.name), ("context_deleted", f"{self.name}_deleted")]
            return joined([record(self._answers(None, context), "", name) for context, name in twins])
        with pruner(self.model):
            return record(self._answers(pruner, "context"), "", self.name)

    def _answers(self, pruner: TokenPruner | None, context: str) -> list[dict[str, Any]]:
        asked = [as_question(self.tokenizer, item, context) for item in self.items]
        found: list[dict[str, Any]] = [{} for _ in asked]
        for numbers, scores in _batches(self.model, asked, self.batch_size):
            costs = None if pruner is None else vars(row_costs(self.model, pruner, pruner.trace.routed))
            for place, (number, score) in enumerate(zip(numbers, scores)):
                labels = {key: self.items[number].get(key) for key in ("document", "distance", "kind")}
                spent = {} if costs is None else {name: values[place] for name, values in costs.items()}
                tokens = {"prompt_tokens": len(asked[number][0]), "right": score.greedy}
                found[number] = labels | tokens | spent
        return found


def as_question(tokenizer: Any, item: Mapping[str, Any], context: str = "context") -> Question:
    """A recall item in tokens; context "context_deleted": without its facts."""
    answer = tokenizer.encode(item["choices"][item["answer"]], add_special_tokens=False)
    return prompt_ids(tokenizer, item[context]), answer


def _batches(model: Any, questions: Sequence[Question], batch_size: int) -> Iterator[tuple[list[int], list[Any]]]:
    """Numbers and scores of the questions, contexts of one length together, so that nothing is padded."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i][0]))
    for _, group in itertools.groupby(order, key=lambda i: len(questions[i][0])):
        numbers = list(group)
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            contexts, answers = zip(*(questions[i] for i in part))
            found = score_after_prompt(model, contexts, [[answer] for answer in answers], batch_size)
            # The trace is that of the prompts: a dense continuation leaves it as it is.
            yield part, [score for [score] in found]
