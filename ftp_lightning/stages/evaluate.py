"""Stage `evaluate`: pruned models against dense, on text and on tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.errors import UserError
from ftp_lightning.stages.base import PrunedSettings
from ftp_lightning.stages.option import option
from ftp_lightning.stages.progress import Progress

if TYPE_CHECKING:
    from ftp_lightning.stages.methods import Methods

OUR_TASKS = ("story_recall", "story_ending", "story_name")
BASELINES = ("random", "uniform", "block_influence", "static")


@dataclass(frozen=True, kw_only=True)
class EvaluateStage(PrunedSettings):
    """Measure KL, perplexity, answers kept, retention and skill. Writes results.json, samples.jsonl and tokens.json."""

    stage: ClassVar[str] = "evaluate"

    compare: tuple[str, ...] = option((), f"baselines of the same budget: {', '.join(BASELINES)}")
    before: str | None = option(None, "pruner before fine-tuning, to compare with", is_file=True)
    static_schedule: str | None = option(None, "schedule of the baseline `static`; else --schedule", is_file=True)
    sensitivity: str | None = option(None, "sensitivity.json, for the baseline `block_influence`", is_file=True)
    tasks: tuple[str, ...] = option(OUR_TASKS, "our tasks, or any that lm-eval knows")
    task_data: str | None = option(None, "folder of TASK.jsonl, in the Hub's schema, for lm-eval's tasks", is_file=True)
    mode: Literal["prompt", "sequence"] = option("prompt", "tasks: the context alone is routed, or the whole text")
    items: int = option(300, "questions with facts to recall", least=1)
    limit: int | None = option(None, "items per task at most", least=1)
    num_fewshot: int | None = option(None, "examples before each item of lm-eval's tasks; else the task's own", least=0)
    apply_chat_template: bool = option(False, "put the items into the model's chat template")
    windows: int | None = option(None, "windows of text at most; all of them by default", least=1)
    batch_size: int = option(8, "windows or contexts per forward", least=1)

    def check(self) -> None:
        super().check()
        for name in self.compare:
            if name not in BASELINES:
                raise UserError(f"compare names {name!r}, which is none of {', '.join(BASELINES)}\nChange --compare.")
        if "block_influence" in self.compare and not self.sensitivity:
            raise UserError("the baseline block_influence needs what `sensitivity` measured\nGive --sensitivity FILE.")
        if "static" in self.compare and not (self.static_schedule or self.schedule):
            raise UserError("the baseline static needs the schedule searched with it\nGive --static_schedule FILE.")

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.stages.inputs import check_chat_template, load_model
        from ftp_lightning.stages.measuring import Bench, with_retention
        from ftp_lightning.stages.methods import choose_methods

        model, tokenizer = load_model(self)
        if self.apply_chat_template:
            check_chat_template(self.model, tokenizer)
        methods = choose_methods(self, model)
        steps = 2 * len(methods) + 2
        told = iter(range(steps))

        def tell(what: str) -> None:
            progress.step(next(told), steps, what)

        bench = Bench(self, model, tokenizer, tell)
        results = bench.dense_results()
        results["methods"] = with_retention([bench.measure(*method) for method in methods], self.tasks, bench.dense)
        tokens = self.write(folder, results, bench, methods)
        self._track(folder, results["methods"], tokens)
        last = results["methods"][-1]
        skipped = f"{last['realised_sparsity']:.1%} skipped"
        progress.done(f"{len(methods)} methods; {last['name']}: KL {last['kl']['mean']:.3g}, {skipped}")

    def write(self, folder: StageFolder, results: dict[str, Any], bench: Any, methods: Methods) -> dict[str, Any]:
        from ftp_lightning.stages.showcase import story_tokens

        folder.write_json("results.json", results)
        folder.write_text("samples.jsonl", "".join(json.dumps(row) + "\n" for row in bench.samples()))
        tokens = story_tokens(self, bench.model, bench.tokenizer, methods[-1][1])
        folder.write_json("tokens.json", tokens)
        summary = {method["name"]: {"kl": method["kl"], "kept": method["kept"]} for method in results["methods"]}
        folder.write_json("metrics.json", {"methods": summary, "windows": bench.windows.hash()})
        return tokens

    def _track(self, folder: StageFolder, methods: list[dict[str, Any]], tokens: dict[str, Any]) -> None:
        """The methods as a table; schedule and gates of the last one as images. The CSV would say nothing new."""
        from ftp_lightning.report import tracked
        from ftp_lightning.tracking import log_outcome, logging_to

        if self.tracking == "csv":
            return
        rows = [_row(method) for method in methods]
        images = {
            "realised": lambda: tracked.schedule_png(methods[-1]["realised_per_block"]),
            "gates": lambda: tracked.gates_png(tokens["keep"]),
        }
        with logging_to(self.tracking, folder.place("logs").parent, self.config(), self.stage) as logger:
            log_outcome(
                logger,
                numbers={"kl": rows[-1]["kl"], "kept": rows[-1]["kept"]},
                images=images,
                tables={"methods": rows},
            )


def _row(method: dict[str, Any]) -> dict[str, Any]:
    kept = method["kept"]["share"] if method["kept"] else None
    names = ("name", "budget", "kv", "realised_sparsity", "flops_reduction")
    return {name: method[name] for name in names} | {"kl": method["kl"]["mean"], "kept": kept}
