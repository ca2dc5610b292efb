"""How much work each stage of a run is, so that the progress line can tell the time left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftp_lightning.stages.benchmark import LENGTHS

TRAINED = 3.5
"""Forwards that a training step costs per token: the teacher's, the student's, and its gradients [ours, measured]."""
CHILD = 0.35
"""Share of the windows that a child of the search is measured on, on average: most drop out early [ours, measured]."""
STARTS = 11
"""Schedules that a search measures on all windows before its first generation [ours, measured]."""
QUESTION = 1.3
"""Cost of a question, with its answers, per token of its context [ours, measured]."""
PRUNED_ALONE = 0.6
"""Cost of a forward with one pruned block, of which the blocks before it are known [ours, measured]."""
STORY = 400
"""Tokens of the context of `story_ending` and `story_name`, of which there are about 120 [ours]."""
PREFILLS, WARM_UP = 20, 3
"""Prefills of a benchmark's cell beside its timed pairs, and pairs that are not timed [ours, measured]."""
REPORT = 10.0
"""Seconds that the report takes after the chain, whatever the model is [ours, measured]."""


def shares(stages: dict[str, Any], blocks: int) -> dict[str, float]:
    """Stage -> its share of the time of the whole chain, by forward tokens; adds up to 1.

    Args:
        stages: settings by name, as `RunStage.stages` gives them.
        blocks: blocks of the model.
    """
    work = {name: WORK[name.split("/")[-1]](settings, blocks) for name, settings in stages.items()}
    for name, settings in stages.items():
        work[name] /= getattr(settings, "processes", 1)
    total = sum(work.values())
    return {name: one / total for name, one in work.items()}


def _row(settings: Any) -> int:
    return settings.prompt_tokens + settings.continuation_tokens


def _sensitivity(settings: Any, blocks: int) -> float:
    return settings.windows * _row(settings) * (1 + PRUNED_ALONE * blocks * len(settings.levels))


def searched(settings: Any, generation: int) -> float:
    """Work of one search up to the end of a generation; generation 0 is what it starts from."""
    return settings.windows * _row(settings) * (STARTS + CHILD * generation * settings.offspring)


def _search(settings: Any, blocks: int) -> float:
    return searched(settings, settings.generations)


def _train(settings: Any, blocks: int) -> float:
    return TRAINED * settings.steps * settings.batch_size * settings.processes * _row(settings)


def evaluated(settings: Any, methods: int, done: int | None = None) -> float:
    """Work of an evaluation of `methods` methods beside dense, up to the questions of method number `done`.

    Texts come first, of all methods. Number 0 is dense, which is asked twice: with and without the facts. None: all.
    """
    texts = methods * 2 * (settings.windows or 41) * _row(settings)
    items = sum(120 * STORY if task in ("story_ending", "story_name") else _items(settings) for task in settings.tasks)
    times = methods + 2 if done is None else done + 1 if done else 0
    return texts + QUESTION * times * items


def _evaluate(settings: Any, blocks: int) -> float:
    return evaluated(settings, len(settings.compare) + 2)


def _items(settings: Any) -> int:
    return min(settings.items, settings.limit or settings.items) * settings.prompt_tokens


def _benchmark(settings: Any, blocks: int) -> float:
    """Pairs are timed twice: for the speed-up, and for the router's share."""
    return (4 * (settings.pairs + WARM_UP) + PREFILLS) * sum(settings.lengths or LENGTHS)


WORK: dict[str, Callable[[Any, int], float]] = {
    "sensitivity": _sensitivity,
    "search": _search,
    "train": _train,
    "finetune": _search,
    "static": _search,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
}
"""Stage -> its forward tokens, roughly."""
