"""Running lm-eval tasks: the embedded ones, its own on local files, its own from the Hub."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ftp_lightning.errors import UserError

# name -> the field that holds the context; the rows are made by ftp_lightning.data.choices
EMBEDDED = {
    "story_recall": "context",
    "story_recall_deleted": "context_deleted",
    "story_ending": "context",
    "story_name": "context",
}
METRICS = ("acc", "acc_norm", "exact_match")


def embedded_task(name: str, jsonl_path: str | Path, cache_dir: str | Path | None = None) -> dict:
    """The lm-eval task `name` on JSONL rows with keys id, context, choices, answer (index), and more that pass through.

    exact_match: the gold choice is the greedy continuation. Choices begin with their space, hence no delimiter.
    cache_dir: where `datasets` puts its copy. UserError for an unknown name, a missing file, or a row without a key.
    """
    if name not in EMBEDDED:
        raise _unknown_task(name, EMBEDDED)
    _check_rows(name, Path(jsonl_path), keys=(EMBEDDED[name], "choices", "answer"))
    return {
        "task": name,
        **_local_data({"test": jsonl_path}, cache_dir),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": f"{{{{{EMBEDDED[name]}}}}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS],
        "metadata": {"version": 1.0},
    }


def local_task(name: str, files: str | Path | Mapping[str, str | Path], cache_dir: str | Path | None = None) -> dict:
    """lm-eval's own task `name` on local JSONL of the Hub's schema: one file for all splits, or one per split.

    Given as a group of one: the public way to override the data of a task that lm-eval knows. UserError: missing file.
    """
    if not isinstance(files, Mapping):
        files = dict.fromkeys(("train", "validation", "test"), files)
    for path in files.values():
        _check_rows(name, Path(path), keys=())
    return {"group": f"local_{name}", "task": [{"task": name, "dataset_name": None, **_local_data(files, cache_dir)}]}


def run_tasks(
    lm,
    tasks: Mapping[str, str | Path | Mapping[str, str | Path] | None],
    limit: int | None = None,
    num_fewshot: int = 0,
    apply_chat_template: bool = False,
    progress: bool = False,
) -> dict[str, dict]:
    """Run tasks on an lm-eval model; tasks: name -> JSONL file(s), or None for the data lm-eval fetches from the Hub.

    Returns for each task (and, for a group like mmlu, for its members and the group, pooled): acc, acc_stderr, acc_norm,
    exact_match (None where the task has no such metric), n, chance (mean of 1 / number of choices), exercised (share of
    items), metrics (lm-eval's own numbers) and items. An item: id, right (exact_match, else acc), acc, distance, kind,
    document, and from the model's accounts prompt_tokens, sparsity, exercised. Empty on ranks other than 0.
    UserError: unknown task, file missing or broken, Hub out of reach.
    """
    import lm_eval

    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        if not progress:
            stack.enter_context(_quiet())
        wanted = [_task(name, files, cache) for name, files in tasks.items()]
        manager = _task_manager([task for task in wanted if isinstance(task, str)], any("group" in t for t in wanted))
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=wanted,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                bootstrap_iters=0,
                log_samples=True,
            )
        except ConnectionError as error:
            raise UserError(
                f"cannot reach the Hub for the tasks {', '.join(tasks)}: {str(error).splitlines()[0]}\n"
                "Run `ftp-lightning prefetch` where there is a network, or give local files by --task_data."
            ) from None
    return _summaries(results, list(tasks), _accounts(lm)) if results else {}
