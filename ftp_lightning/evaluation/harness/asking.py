"""lm-eval's tasks, asked of a model under one pruner after the other; the answers as a record."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ftp_lightning.evaluation.record import joined, record

if TYPE_CHECKING:
    from pandas import DataFrame

    from ftp_lightning.processes import Processes
    from ftp_lightning.pruning import TokenPruner


class Files(Protocol):
    """What knows the JSONL files of tasks, see `stages.task_files.TaskFiles`."""

    def named(self, with_deleted: bool) -> AbstractContextManager[dict[str, Any]]:
        """Task -> its files; `with_deleted` adds the twins without passages."""
        ...


@dataclass
class HarnessTasks:
    """All tasks of an evaluation, for `evaluation.bench.Bench`.

    Attributes:
        files: of the tasks.
        about: arguments of `FtpLM` that are the same for all methods: batch_size, prompt_tokens, answers ...
        run: arguments of `run_tasks`: limit, num_fewshot, apply_chat_template, seen.
        processes: those that share the items, if there are several.
        metrics: lm-eval's own numbers of the last call, by task.
        left_out: documents that were not asked, as a search has seen them, by task.
        only: numbers of the documents that methods are asked, by task; None asks all. Of the answers that methods keep
            only those that the dense model has right say anything, and they alone need be paid for.
    """

    model: Any
    tokenizer: Any
    files: Files
    about: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    processes: Processes | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    only: dict[str, list[int]] | None = None

    def __call__(self, pruner: TokenPruner | None, mode: str = "prompt") -> DataFrame:
        """Ask all tasks; the questions without their passages are asked of the dense model alone."""
        from ftp_lightning.evaluation.harness.model import FtpLM
        from ftp_lightning.evaluation.harness.tasks import run_tasks
        from ftp_lightning.pruning.devices import home

        place, only = str(home(self.model)), None if pruner is None else self.only
        lm = FtpLM(self.model, pruner=pruner, mode=mode, tokenizer=self.tokenizer, device=place, **self.about)
        try:
            with self.files.named(with_deleted=pruner is None) as files:
                found = run_tasks(lm, files, **self.run, only=only) if files else {}
        finally:
            lm.close()
        if self.processes is not None:
            found = self.processes.from_first(found)
        self.metrics = {task: summary["metrics"] for task, summary in found.items()}
        self.left_out = {task: summary["left_out"] for task, summary in found.items()}
        for task, numbers in (only or {}).items():  # an item keeps its number among all
            found[task]["items"] = [{**one, "item": n} for n, one in zip(numbers, found[task]["items"], strict=True)]
        parts = [record(told["items"], "", task).assign(chance=told["chance"]) for task, told in found.items()]
        return joined(parts)
