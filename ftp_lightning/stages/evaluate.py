"""Stage `evaluate`: pruned models against dense, on text and on tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.data.task_names import LONG, OURS
from ftp_lightning.errors import UserError
from ftp_lightning.stages.base import PrunedSettings
from ftp_lightning.stages.option import option
from ftp_lightning.stages.progress import Progress

OUR_TASKS = OURS
BASELINES = ("random", "uniform", "block_influence", "static")
PEERS = (
    "last_block_free", "deletion_recent", "deletion_random", "deletion_surprisal", "short_gpt", "lazy_llm", "fast_kv",
    "gem_filter", "ffn_only", "spatten", "zero_tprune",
)  # fmt: skip
"""Those of `ftp_lightning.baselines` that need no training and no calibration but a sensitivity.json."""


@dataclass(frozen=True, kw_only=True)
class EvaluateStage(PrunedSettings):
    """Measure KL, perplexity, answers kept, retention and skill. Writes results.json, samples.jsonl, tokens.json and
    tables (Markdown, CSV, LaTeX)."""

    stage: ClassVar[str] = "evaluate"

    compare: tuple[str, ...] = option(
        (), f"baselines of the same budget: {', '.join(BASELINES)}; peers of the same FLOPs: {', '.join(PEERS)}"
    )
    before: str | None = option(None, "pruner before fine-tuning, to compare with", is_file=True)
    static_schedule: str | None = option(None, "schedule of the baseline `static`; else --schedule", is_file=True)
    sensitivity: str | None = option(None, "sensitivity.json, for the baseline `block_influence`", is_file=True)
    tasks: tuple[str, ...] = option(OUR_TASKS, f"ours, also {', '.join(LONG)}, or any that lm-eval knows")
    task_data: str | None = option(
        None, "folder of TASK.jsonl or TASK_SPLIT.jsonl, in the Hub's schema, for lm-eval's tasks", is_file=True
    )
    mode: Literal["prompt", "sequence", "both"] = option(
        "prompt", "tasks: the context alone is routed, or the whole text; both shows the difference"
    )
    threshold: float | None = option(
        None, "p_compute below which --decode threshold skips; else the pruner's, 0.5", least=0.0, most=1.0
    )
    items: int = option(300, "questions with facts to recall", least=1)
    limit: int | None = option(None, "items per task at most", least=1)
    num_fewshot: int | None = option(None, "examples before each item of lm-eval's tasks; else as declared", least=0)
    apply_chat_template: bool = option(False, "put the items into the model's chat template")
    windows: int | None = option(None, "windows of text at most; all of them by default", least=1)
    batch_size: int = option(8, "windows or contexts per forward", least=1)
    answers: str | None = option(None, "folder to keep answers in and take them from, for several runs", passive=True)
    processes: int = option(1, "processes that share the items of tasks, on this machine", least=1, passive=True)

    def check(self) -> None:
        super().check()
        for name in self.compare:
            if name not in BASELINES + PEERS:
                known = ", ".join(BASELINES + PEERS)
                raise UserError(f"compare names {name!r}, which is none of {known}\nChange --compare.")
        for name in {"block_influence", "short_gpt"} & set(self.compare):
            if not self.sensitivity:
                raise UserError(f"the baseline {name} needs what `sensitivity` measured\nGive --sensitivity FILE.")
        if "static" in self.compare and not (self.static_schedule or self.schedule):
            raise UserError("the baseline static needs the schedule searched with it\nGive --static_schedule FILE.")

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.models import resolve_device
        from ftp_lightning.processes import run_in
        from ftp_lightning.stages.evaluating import carry_out

        folder.adopt(run_in(self.processes, resolve_device(self.device), carry_out, self, folder, progress.place()))
