"""One method measured on everything: windows of text in both modes, tasks through lm-eval, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ftp_lightning.data.choices import distance_bucket
from ftp_lightning.evaluation import continuation, statistics
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.request import realised_cut
from ftp_lightning.stages.inputs import check_questions
from ftp_lightning.stages.task_files import DELETED, RECALL, TaskFiles, test_windows

if TYPE_CHECKING:
    from ftp_lightning.stages.evaluate import EvaluateStage

Results = dict[str, dict]
"""Task -> summary, as `evaluation.tasks.run_tasks` gives it."""

TEACHER_BYTES = 1 << 30
"""Dense log-probabilities up to this size are kept for all methods; beyond it the dense model runs along [ours]."""


class Bench:
    """Model, text and tasks, with what the dense model makes of them; `measure` puts a method beside it.

    `tell(what)` is called before each of the 2 + 2 * methods parts.
    """

    def __init__(self, settings: EvaluateStage, model: Any, tokenizer: Any, tell: Callable[[str], None]):
        self.settings, self.model, self.tokenizer, self.tell = settings, model, tokenizer, tell
        self.windows = test_windows(settings, tokenizer)
        self.files = TaskFiles(settings, tokenizer)
        if RECALL in self.files.rows:
            check_questions(model.config, tokenizer, self.files.rows[RECALL])
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
        self.dense = self.results["dense"] = self._run_tasks(None)
        tasks = {name: self._dense_cell(summary) for name, summary in self.dense.items() if name != DELETED}
        return {
            "dense": {"ppl": floor.dense_ppl, "tasks": tasks},
            "noise_floor": {"kl": floor.kl_mean, "top1": floor.top1_agreement, "against": against},
        }

    def measure(self, name: str, pruner: TokenPruner) -> dict[str, Any]:
        """The record of one method, see `results.json`; `with_retention` adds what needs all methods."""
        self.tell(f"{name}, text")
        prompt = self._score(pruner, "prompt")
        trace = pruner.trace.prompt  # of the last batch of prompts
        cut = realised_cut(self.model, pruner, trace)
        sequence = self._score(pruner, "sequence")
        self.tell(f"{name}, tasks")
        found = self.results[name] = self._run_tasks(pruner)
        return {
            "name": name,
            "budget": pruner.schedule.budget,
            "kv": pruner.kv[0] if len(set(pruner.kv)) == 1 else "mixed",
            "realised_sparsity": prompt.mean_sparsity,
            "realised_per_block": prompt.sparsity,
            "flops_reduction": cut,
            "kl": {"mean": prompt.kl_mean, "p99": prompt.kl_p99, "top1": prompt.top1_agreement},
            "kl_sequence": sequence.kl_mean,
            "ppl": {"prompt": prompt.ppl, "sequence": sequence.ppl},
            "kept": self._kept(found),
            "tasks": {task: self._cell(task, summary) for task, summary in found.items()},
        }

    def samples(self) -> list[dict[str, Any]]:
        """One row per item of every task: its labels, and which method got it right."""
        rows = []
        for task in self.dense:
            answers = {name: found[task]["items"] for name, found in self.results.items() if task in found}
            for place, item in enumerate(self.dense[task]["items"]):
                labels = {key: item.get(key) for key in ("id", "kind", "distance", "document", "prompt_tokens")}
                right = {name: items[place]["right"] for name, items in answers.items()}
                sparsity = {name: items[place]["sparsity"] for name, items in answers.items()}
                rows.append({"task": task, **labels, "right": right, "sparsity": sparsity})
        return rows

    def _score(self, pruner: TokenPruner, mode: str) -> continuation.ContinuationScores:
        size = self.settings.batch_size
        return continuation.evaluate_windows(self.model, self.windows, pruner, mode, size, self.teacher)

    def _run_tasks(self, pruner: TokenPruner | None) -> Results:
        """All tasks; the questions without their facts are asked of the dense model alone."""
        from ftp_lightning.evaluation.lm_eval_model import FtpLM
        from ftp_lightning.evaluation.tasks import run_tasks

        settings = self.settings
        if not settings.tasks:
            return {}
        window = {"prompt_tokens": settings.prompt_tokens, "continuation_tokens": settings.continuation_tokens}
        lm = FtpLM(
            self.model, pruner=pruner, mode=settings.mode, tokenizer=self.tokenizer, batch_size=settings.batch_size,
            device=str(self.model.device), **window,
        )  # fmt: skip
        try:
            with self.files.named(with_deleted=pruner is None) as files:
                return run_tasks(lm, files, settings.limit, settings.num_fewshot, settings.apply_chat_template)
        finally:
            lm.close()

    def _kept(self, found: Results) -> dict[str, Any] | None:
        """Answers kept of those that need the passage, in all and by how far back the fact lies."""
        if RECALL not in found:
            return None
        rows = self.dense[RECALL]["items"], self.dense[DELETED]["items"], found[RECALL]["items"]
        right = [[item["right"] for item in items] for items in rows]
        buckets = [distance_bucket(item["distance"]) for item in rows[0]]
        total = asdict(statistics.kept(*right))
        groups = statistics.kept_by(buckets, *right)
        near_first = sorted((bucket for bucket in groups if groups[bucket].items), key=lambda b: int(b.split("-")[0]))
        names = ("share", "low", "high", "items")
        by_distance = {bucket: {name: getattr(groups[bucket], name) for name in names} for bucket in near_first}
        return total | {"by_distance": by_distance} if total["items"] else None

    def _dense_cell(self, summary: dict) -> dict[str, Any]:
        names = {"stderr": "acc_stderr", "chance": "chance", "n": "n"}
        return {"acc": _accuracy(summary)} | {name: summary[key] for name, key in names.items()}

    def _cell(self, task: str, summary: dict) -> dict[str, Any]:
        """Accuracy, its standard error, skill, and whether it measures anything: `measures` where dense is not
        `near_chance` and the prompts were long enough to be pruned, `exercised` (method.md, section 8)."""
        dense, acc = self.dense[task], _accuracy(summary)
        known = None not in (acc, dense["acc_stderr"], dense["chance"])
        skill = statistics.skill(acc, _accuracy(dense), dense["chance"], dense["acc_stderr"]) if known else None
        exercised = (summary["exercised"] or 0.0) >= 0.5
        return {
            "acc": acc,
            "stderr": summary["acc_stderr"],
            "skill": skill,
            "measures": skill is not None and exercised,
            "near_chance": known and skill is None,
            "exercised": exercised,
            "truncated": summary["truncated"],
            "prompt_tokens": summary["prompt_tokens"],
            "sparsity": summary["sparsity"],
        }


def with_retention(records: list[dict[str, Any]], tasks: Sequence[str], dense: Results) -> list[dict[str, Any]]:
    """The records with the paper's retention, over one and the same tasks for all methods; None where there are none.

    They are those asked for by name (a group counts once, not its members again) that measure something in every
    method.
    """
    counted = [task for task in tasks if all(record["tasks"].get(task, {}).get("measures") for record in records)]
    for record in records:
        accuracies = [record["tasks"][task]["acc"] for task in counted], [_accuracy(dense[task]) for task in counted]
        record["retention"] = statistics.retention(*accuracies) if counted else None
    return records


def _accuracy(summary: dict) -> float | None:
    return summary["acc"] if summary["acc"] is not None else summary["exact_match"]
