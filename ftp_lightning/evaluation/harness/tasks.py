"""Running lm-eval tasks: the embedded ones, its own on local files, its own from the Hub."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError, hub_errors
from ftp_lightning.evaluation.harness.declared import declared
from ftp_lightning.evaluation.harness.index import names_like, task_manager
from ftp_lightning.evaluation.harness.made import CONTEXTS, local_data, made_task, unknown_task
from ftp_lightning.evaluation.harness.results import labels_of, summaries
from ftp_lightning.evaluation.harness.seen import leave_out
from ftp_lightning.evaluation.harness.shots import set_shots
from ftp_lightning.evaluation.harness.task_data import LAYOUT, by_subject, read_rows


def local_task(name: str, files: str | Path | Mapping[str, str | Path], cache_dir: str | Path | None = None) -> dict:
    """lm-eval's own task `name` on local JSONL of the Hub's schema: one file for all splits, or one per split.

    Given as a group of one: the public way to override the data of a task that lm-eval knows. `mmlu` and its subjects
    take files with a field `subject`, and need a `cache_dir` to part them in. UserError: missing file, broken row.
    """
    files = _by_split(files)
    if name == "mmlu" or (name.startswith("mmlu_") and _has_subjects(files)):
        return _local_mmlu(name, files, cache_dir)
    for path in set(files.values()):
        read_rows(name, Path(path), declared(name).needs)
    return {"group": f"local_{name}", "task": [_on_files(name, files, cache_dir)]}


def _by_split(files: str | Path | Mapping[str, str | Path]) -> Mapping[str, str | Path]:
    return files if isinstance(files, Mapping) else dict.fromkeys(("train", "validation", "test", "dev"), files)


def _on_files(name: str, files: Mapping[str, Any], cache_dir: str | Path | None) -> dict:
    """Splits without a file are not there: lm-eval would look for their examples while it loads the task."""
    keys = {"train": "training_split", "validation": "validation_split", "test": "test_split", "dev": "fewshot_split"}
    missing = {key: None for split, key in keys.items() if split not in files}
    return {"task": name, "dataset_name": None, **missing, **local_data(files, cache_dir)}


def _has_subjects(files: Mapping[str, Any]) -> bool:
    return "subject" in read_rows("mmlu", Path(next(iter(files.values()))))[0]


def _local_mmlu(name: str, files: Mapping[str, Any], cache_dir: str | Path | None) -> dict:
    """All subjects that the files hold, or the one asked for."""
    found = by_subject({split: Path(path) for split, path in files.items()}, Path(tempfile.mkdtemp(dir=cache_dir)))
    if name != "mmlu":
        subject = name.removeprefix("mmlu_")
        if subject not in found:
            raise UserError(f"task {name}: the files hold no subject {subject!r}\nThey hold {', '.join(found)}.")
        found = {subject: found[subject]}
    members = [_on_files(f"mmlu_{subject}", parts, cache_dir) for subject, parts in found.items()]
    return {"group": f"local_{name}", "task": members}


def run_tasks(
    lm,
    tasks: Mapping[str, str | Path | Mapping[str, str | Path] | None],
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    progress: bool = False,
    seen: Mapping[str, float] | None = None,
    only: Mapping[str, list[int]] | None = None,
) -> dict[str, dict]:
    """Run tasks on an lm-eval model; tasks: name -> JSONL file(s), or None for the data lm-eval fetches from the Hub.

    Returns for each task (for a group like mmlu: for its members, and for the group pooled) its items, its chance (that
    of the best constant answer, see `statistics.chance_of`), metrics (lm-eval's own numbers) and `left_out`. An item:
    id, right (see `Declared.right`), score and metric, its metrics, distance, kind, document, hash, and of the model's
    account prompt_tokens, sparsity, exercised, truncated. Empty on ranks other than 0. seen: documents that a search
    has looked at (`Schedule.seen`) are left out; `left_out` counts them.
    only: task -> numbers of the documents to ask, of the tasks that are not asked whole; in place of a limit.
    UserError: unknown task, file missing or broken, Hub out of reach.
    """
    from lm_eval import evaluate

    before = len(getattr(lm, "accounts", ()))
    with tempfile.TemporaryDirectory() as cache, contextlib.nullcontext() if progress else _quiet():
        loaded = _loaded(lm, tasks, cache)
        for name, task in loaded["tasks"].items():
            set_shots(name, task, num_fewshot)
        labels = {name: labels_of(task) for name, task in loaded["tasks"].items()}
        left_out = {name: leave_out(name, task, seen or {}) for name, task in loaded["tasks"].items()}
        results = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            samples=None if only is None else dict(only),
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            bootstrap_iters=0,
            log_samples=True,
        )
    accounts = [account for share in lm.gather_object(getattr(lm, "accounts", [])[before:]) or [] for account in share]
    return summaries(results, list(tasks), accounts, left_out, labels) if results else {}


def load_tasks(files: Mapping[str, str | Path | Mapping[str, Path] | None], num_fewshot: int | None = None) -> list:
    """lm-eval's task objects with the examples that `run_tasks` gives them, groups taken apart; files as there.

    UserError: unknown task, broken file, Hub out of reach.
    """
    with tempfile.TemporaryDirectory() as cache, _quiet():
        loaded = _loaded(None, files, cache)["tasks"]
        for name, task in loaded.items():
            set_shots(name, task, num_fewshot)
        return list(loaded.values())


def _loaded(lm, tasks: Mapping, cache: str) -> dict:
    """lm-eval's tasks and groups; what cannot be had is told in a sentence.

    `lm`: some tasks make their texts with the model's own tokenizer (RULER).
    """
    definitions = [_definition(name, files, cache) for name, files in tasks.items()]
    metadata = {} if lm is None else _for_makers(lm)
    try:
        return _task_manager(definitions, metadata).load(definitions)
    except hub_errors(ConnectionError) as error:
        raise _unreachable(tasks, error) from None
    except ImportError as error:
        raise UserError(
            f"a task of {', '.join(tasks)} needs the package {error.name}, which is not installed\nInstall it with pip."
        ) from None


def _for_makers(lm) -> dict:
    """Tokenizer and longest text, for tasks that make texts of a length."""
    name = getattr(getattr(lm, "tokenizer", None), "name_or_path", "")
    return {"pretrained": name, "max_seq_lengths": [lm.max_length]} if name else {}


def _definition(name: str, files, cache_dir: str) -> str | dict:
    if files is None:
        if name in CONTEXTS:
            raise UserError(f"task {name} needs its JSONL file\nftp_lightning.stages.task_files makes the rows.")
        return name
    return made_task(name, files, cache_dir) if name in CONTEXTS else local_task(name, files, cache_dir)


def _task_manager(definitions: list[str | dict], metadata: dict):
    """lm-eval's index of the tasks that are asked for by name, or taken as they are but for their data."""
    names = [d for d in definitions if isinstance(d, str)]
    groups = [d["task"] for d in definitions if not isinstance(d, str) and "group" in d]
    wanted = names + [member["task"] for group in groups for member in group]
    manager = task_manager(wanted, metadata)
    for name in wanted:
        if name not in manager.all_tasks:
            raise unknown_task(name, [*CONTEXTS, *names_like(name)])
    return manager


def _unreachable(names: Iterable[str], error: Exception) -> UserError:
    return UserError(
        f"the Hub is out of reach for the tasks {', '.join(names)}: {str(error).splitlines()[0]}\n"
        f"Run `ftp-lightning prefetch` where there is a network, or give files by --task_data DIR: {LAYOUT}."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets without progress bars and notes; errors still come as exceptions."""
    import datasets

    bars, logger = datasets.are_progress_bars_disabled(), logging.getLogger("lm_eval")
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tqdm bars that lm-eval offers no switch for
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
