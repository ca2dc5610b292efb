"""Tasks that are known by name: the metric each is told in, and the examples it is given.

lm-eval reports several metrics for a task and papers quote one of them, seldom saying which; here it is written down
[ours: the paper does not say].
"""

from __future__ import annotations

from dataclasses import dataclass

from ftp_lightning.data.task_names import LAST_WORD, LONG, READING, RULER

PAPER = ("arc_challenge", "arc_easy", "hellaswag", "mmlu", "winogrande")
"""The paper's five tasks, over which it takes its retention."""


@dataclass(frozen=True)
class Declared:
    """What lm-eval leaves open about a task.

    metric: the one it is told in. shots: examples before each item, None: the task's own. needs: fields of the Hub's
    schema. right: the metric whose value 1 makes an answer right, where that is neither accuracy nor exact match.
    """

    metric: str
    shots: int | None = None
    needs: tuple[str, ...] = ()
    right: str | None = None


DECLARED: dict[str, Declared] = {
    "arc_challenge": Declared("acc_norm", 0, ("question", "choices", "answerKey")),
    "arc_easy": Declared("acc_norm", 0, ("question", "choices", "answerKey")),
    "hellaswag": Declared("acc_norm", 0, ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "mmlu": Declared("acc", 5, ("question", "choices", "answer")),
    "winogrande": Declared("acc", 0, ("sentence", "option1", "option2", "answer")),
    "piqa": Declared("acc_norm", 0, ("goal", "sol1", "sol2", "label")),
    "boolq": Declared("acc", 0, ("passage", "question", "label")),
    "openbookqa": Declared("acc_norm", 0, ("question_stem", "choices", "answerKey")),
    "lambada_openai": Declared("acc", 0, ("text",)),
    "lambada_standard": Declared("acc", 0, ("text",)),
    "wikitext": Declared("word_perplexity", 0, ("page",)),
    "gsm8k": Declared("exact_match", 5, ("question", "answer")),
    "drop": Declared("f1", 0, ("passage", "question", "answer", "validated_answers")),
    **dict.fromkeys(("story_recall", *LONG), Declared("exact_match", 0, right="exact_match")),
    **dict.fromkeys(RULER, Declared("string_match", 0, right="string_match")),
    "ruler_qa": Declared("string_match", 0, right="contains"),
    **dict.fromkeys(READING, Declared("f1", 0, right="contains")),
    LAST_WORD: Declared("acc", 0),
}
"""`drop` is the reading comprehension whose answers are generated (Dua et al. 2019)."""


def declared(task: str) -> Declared:
    """What a task is told in; of an MMLU subject as of MMLU. Of others the first metric that counts answers."""
    name = "mmlu" if task.startswith("mmlu_") else task.removesuffix("_deleted")
    return DECLARED.get(name, Declared("acc"))
