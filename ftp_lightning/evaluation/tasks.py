"""Running lm-eval tasks: the embedded ones, its own on local files, its own from the Hub."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from unittest import mock

from ftp_lightning.data.records import LONE_SURROGATE
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.task_results import METRICS, summaries

# name -> the field that holds the context; the rows are made by ftp_lightning.data.choices
EMBEDDED = {
    "story_recall": "context",
    "story_recall_deleted": "context_deleted",
    "story_ending": "context",
    "story_name": "context",
}


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
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    progress: bool = False,
) -> dict[str, dict]:
    """Run tasks on an lm-eval model; tasks: name -> JSONL file(s), or None for the data lm-eval fetches from the Hub.

    Returns for each task (for a group like mmlu: for its members, and for the group pooled) acc, acc_stderr, acc_norm
    and exact_match (None where the task has no such metric), n, chance (mean of 1 / number of choices), exercised
    (share of the items), prompt_tokens and sparsity (means; all three None without accounts), truncated (count),
    metrics (lm-eval's own numbers) and items. An item: id, right (see `task_results.ASKED`), its metrics, distance,
    kind, document, and of the model's account prompt_tokens, sparsity, exercised, truncated. Empty on ranks other than
    0. UserError: unknown task, file missing or broken, Hub out of reach.
    """
    import lm_eval

    before = len(getattr(lm, "accounts", ()))
    with tempfile.TemporaryDirectory() as cache, contextlib.nullcontext() if progress else _quiet():
        definitions = [_definition(name, files, cache) for name, files in tasks.items()]
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=definitions,
                task_manager=_task_manager(definitions),
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                bootstrap_iters=0,
                log_samples=True,
            )
        except ConnectionError as error:
            raise _unreachable(tasks, error) from None
    return summaries(results, list(tasks), lm.accounts[before:] if hasattr(lm, "accounts") else ()) if results else {}


def load_tasks(files: Mapping[str, str | Path | None]) -> list:
    """lm-eval's task objects, groups taken apart; files as in `run_tasks`.

    UserError: unknown task, broken file, Hub out of reach.
    """
    with tempfile.TemporaryDirectory() as cache, _quiet():
        definitions = [_definition(name, file, cache) for name, file in files.items()]
        try:
            return list(_task_manager(definitions).load(definitions)["tasks"].values())
        except ConnectionError as error:
            raise _unreachable(files, error) from None


def _definition(name: str, files, cache_dir: str) -> str | dict:
    if files is None:
        if name in EMBEDDED:
            raise UserError(f"task {name} needs its JSONL file\nftp_lightning.data.choices makes the rows.")
        return name
    return embedded_task(name, files, cache_dir) if name in EMBEDDED else local_task(name, files, cache_dir)


def _task_manager(definitions: list[str | dict]):
    """lm-eval's index of tasks, without its own where none of them is asked for (they take seconds to read)."""
    from lm_eval.tasks import TaskManager

    wanted = [
        d if isinstance(d, str) else d["task"][0]["task"] for d in definitions if isinstance(d, str) or "group" in d
    ]
    manager = TaskManager(include_defaults=bool(wanted))
    for name in wanted:
        if name not in manager.all_tasks:
            raise _unknown_task(name, [*EMBEDDED, *manager.all_tasks])
    return manager


def _unknown_task(name: str, known: Iterable[str]) -> UserError:
    close = difflib.get_close_matches(name, list(known), n=3)
    return UserError(
        f"unknown task {name!r}\n" + (f"Did you mean {', '.join(close)}?" if close else "See lm-eval's list.")
    )


def _unreachable(names: Iterable[str], error: Exception) -> UserError:
    return UserError(
        f"the Hub is out of reach for the tasks {', '.join(names)}: {str(error).splitlines()[0]}\n"
        "Run `ftp-lightning prefetch` where there is a network, or give local files by --task_data."
    )


def _local_data(files: Mapping[str, str | Path], cache_dir: str | Path | None) -> dict:
    """lm-eval's keys for JSONL files; absolute, as it reads relative ones from the working directory."""
    options = {"data_files": {split: str(Path(path).resolve()) for split, path in files.items()}}
    return {"dataset_path": "json", "dataset_kwargs": options | ({"cache_dir": str(cache_dir)} if cache_dir else {})}


def _check_rows(task: str, path: Path, keys: tuple[str, ...]) -> None:
    """UserError naming the line where a row is no JSON object or lacks a key that the task reads."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"task {task}: {path} is not UTF-8 text (byte {error.start})\nConvert it first.") from None
    except OSError as error:
        raise UserError(
            f"task {task}: cannot read {path}: {error.strerror}\nGive the path of its JSONL file."
        ) from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            missing = [key for key in keys if key not in row.keys()]
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"task {task}: {path}, line {number} {LONE_SURROGATE}") from None
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"task {task}: {path}, line {number} is not a JSON object") from None
        if missing:
            raise UserError(f"task {task}: {path}, line {number} has no {', '.join(missing)}")
    if not lines:
        raise UserError(f"task {task}: {path} has no rows")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets without progress bars and notes; errors still come as exceptions.

    Nor does lm-eval describe checkout and machine, which nobody reads here: that takes seconds of subprocesses, and
    outside a checkout git complains on the terminal.
    """
    import datasets
    from lm_eval import evaluator

    bars, logger = datasets.are_progress_bars_disabled(), logging.getLogger("lm_eval")
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),  # tqdm bars that lm-eval offers no switch for
            mock.patch.object(evaluator, "get_git_commit_hash", return_value=None),
            mock.patch.object(evaluator, "add_env_info"),
        ):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
