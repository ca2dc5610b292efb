"""Questions on facts in a passage, answered greedily, without a harness: what quick studies ask many times."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ftp_lightning.data.text import prompt_ids
from ftp_lightning.evaluation.scoring import score_after_prompt

Question = tuple[list[int], list[int]]
"""Token ids of a context, as `data.text.prompt_ids` gives them, and of its right answer."""


def as_question(tokenizer: Any, item: dict[str, Any], context: str = "context") -> Question:
    """A recall item in tokens; context "context_deleted": without its facts."""
    answer = item["choices"][item["answer"]]
    return prompt_ids(tokenizer, item[context]), tokenizer.encode(answer, add_special_tokens=False)


def greedy_answers(model: Any, questions: Sequence[Question], batch_size: int = 16) -> list[bool]:
    """Whether every token of the right answer is the most probable one, per question, scored as lm-eval's `ftp` does.

    Contexts of one length go together, so that nothing is padded. A pruner is in force where one is attached.
    """
    right = [False] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i][0]))
    for _, group in itertools.groupby(order, key=lambda i: len(questions[i][0])):
        for part in _chunks(list(group), batch_size):
            contexts, answers = zip(*(questions[i] for i in part))
            scores = score_after_prompt(model, contexts, [[answer] for answer in answers], batch_size)
            for i, [score] in zip(part, scores):
                right[i] = score.greedy
    return right


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
