"""One method measured on everything: windows of text in both modes, tasks through lm-eval, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.evaluation import continuation
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.request import realised_cut
from ftp_lightning.stages.inputs import check_questions
from ftp_lightning.stages.task_cells import Results, dense_cell, kept_cell, leak_cell, task_cell
from ftp_lightning.stages.task_files import RECALL, TaskFiles, test_windows

if TYPE_CHECKING:
    from ftp_lightning.processes import Processes
    from ftp_lightning.stages.evaluate import EvaluateStage

TEACHER_BYTES = 1 << 30
"""Dense log-probabilities up to this size are kept for all methods; beyond it the dense model runs along [ours]."""
LABELS = ("id", "hash", "kind", "distance", "document", "prompt_tokens")
PER_METHOD = ("right", "score", "sparsity", "answers")


class Bench:
    """Model, text and tasks, with what the dense model makes of them; `measure` puts a method beside it.

    `tell(what)` is called before each of the 2 + 2 * methods parts. `processes` share the items of tasks; each measures
    the text on its own. `answers`: folder that answers are kept in, see `evaluation.answers`.
    `seen`: documents that no method is asked, see `Schedule.seen`.
    """

    def __init__(
        self,
        settings: EvaluateStage,
        model: Any,
        tokenizer: Any,
        tell: Callable[[str], None],
        processes: Processes | None = None,
        answers: Path | None = None,
        seen: dict[str, float] | None = None,
    ):
        self.settings, self.model, self.tokenizer, self.tell = settings, model, tokenizer, tell
        self.processes, self.answers, self.seen = processes, answers, seen
        self.windows = test_windows(settings, tokenizer)
        self.files = TaskFiles(settings, tokenizer)
        for rows in self.files.with_facts():
            check_questions(model.config, tokenizer, rows)
        self.results: dict[str, Results] = {}
        size = 4 * len(self.windows) * self.windows.continuation_tokens * model.config.vocab_size
        self.teacher = None
        if size <= TEACHER_BYTES:
            self.teacher = continuation.teacher_logprobs(model, self.windows, settings.batch_size)

    def dense_results(self) -> dict[str, Any]:
        """{"dense": {"ppl", "tasks"}, "noise_floor": {"kl", "top1", "against"}}."""
        self.tell("noise floor")
        floor = continuation.noise_floor(self.model, self.windows, self.settings.batch_size, self.teacher)
        against = f"{continuation.other_attention(self.model)} attention, one window at a time"
        self.tell("dense, tasks")
        self.dense = self.results["dense"] = self._run_tasks(None, self._modes[0])
        tasks = {name: dense_cell(summary) for name, summary in self.dense.items() if not name.endswith("_deleted")}
        return {
            "dense": {"ppl": floor.dense_ppl, "tasks": tasks},
            "noise_floor": {"kl": floor.kl_mean, "top1": floor.top1_agreement, "against": against},
        }

    def measure(self, name: str, pruner: TokenPruner) -> dict[str, Any]:
        """The record of one method, see `results.json`; `with_retention` adds what needs all methods."""
        self.tell(f"{name}, text")
        prompt = self._score(pruner, "prompt")
        trace = pruner.trace.routed  # of the last batch of prompts
        cut = realised_cut(self.model, pruner, trace)
        sequence = self._score(pruner, "sequence")
        self.tell(f"{name}, tasks")
        found = self.results[name] = self._run_tasks(pruner, self._modes[0])
        return {
            "name": name,
            "budget": pruner.scheduled.budget,
            "kv": pruner.kv[0] if len(set(pruner.kv)) == 1 else "mixed",
            "realised_sparsity": prompt.mean_sparsity,
            "realised_per_block": prompt.sparsity,
            "flops_reduction": cut,
            "kl": {"mean": prompt.kl_mean, "p99": prompt.kl_p99, "top1": prompt.top1_agreement},
            "kl_sequence": sequence.kl_mean,
            "ppl": {"prompt": prompt.ppl, "sequence": sequence.ppl},
            "kept": kept_cell(RECALL, self.dense, found),
            "tasks": self._cells(name, pruner, found),
        }

    def _cells(self, name: str, pruner: TokenPruner, found: Results) -> dict[str, dict[str, Any]]:
        """One per task; with --mode both, what the same model makes of it when the whole text is routed."""
        cells = {task: task_cell(task, self.dense, found) for task in found}
        if len(self._modes) > 1:
            other = self.results[f"{name} (sequence)"] = self._run_tasks(pruner, self._modes[1])
            for task, cell in cells.items():
                cell["sequence"] = leak_cell(task, found[task], other[task])
        return cells

    def samples(self) -> list[dict[str, Any]]:
        """One row per item of every task: its labels, and what every method made of it."""
        rows = []
        for task in self.dense:
            logs = {name: found[task]["items"] for name, found in self.results.items() if task in found}
            for place, item in enumerate(self.dense[task]["items"]):
                labels = {key: item.get(key) for key in LABELS}
                said = {key: {name: items[place][key] for name, items in logs.items()} for key in PER_METHOD}
                rows.append({"task": task, **labels, **said})
        return rows

    @property
    def _modes(self) -> tuple[str, ...]:
        return ("prompt", "sequence") if self.settings.mode == "both" else (self.settings.mode,)

    def _score(self, pruner: TokenPruner, mode: str) -> continuation.ContinuationScores:
        size = self.settings.batch_size
        return continuation.evaluate_windows(self.model, self.windows, pruner, mode, size, self.teacher)

    def _run_tasks(self, pruner: TokenPruner | None, mode: str) -> Results:
        """All tasks; the questions without their facts are asked of the dense model alone."""
        from ftp_lightning.evaluation.harness.model import FtpLM
        from ftp_lightning.evaluation.harness.tasks import run_tasks
        from ftp_lightning.pruning.places import home

        settings = self.settings
        if not settings.tasks:
            return {}
        window: dict[str, Any] = {
            "prompt_tokens": settings.prompt_tokens,
            "continuation_tokens": settings.continuation_tokens,
        }
        lm = FtpLM(
            self.model, pruner=pruner, mode=mode, tokenizer=self.tokenizer, batch_size=settings.batch_size,
            device=str(home(self.model)), answers=self.answers, **window,
        )  # fmt: skip
        try:
            with self.files.named(with_deleted=pruner is None) as files:
                asked = (settings.limit, settings.num_fewshot, settings.apply_chat_template)
                found = run_tasks(lm, files, *asked, seen=self.seen)
        finally:
            lm.close()
        return found if self.processes is None else self.processes.from_first(found)
