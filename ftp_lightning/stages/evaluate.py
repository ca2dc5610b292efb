"""Stage `evaluate`: pruned models against dense, on text and on tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.baselines.names import EQUAL_FLOPS, EQUAL_TOKENS, NEEDS_SENSITIVITY
from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import PrunedSettings
from ftp_lightning.data.task_names import LONG, OURS
from ftp_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

    from ftp_lightning.processes import Processes
    from ftp_lightning.stages.measuring import Bench
    from ftp_lightning.stages.methods import Methods

OUR_TASKS = OURS


@dataclass(frozen=True, kw_only=True)
class EvaluateStage(PrunedSettings):
    """Measure KL, perplexity, answers kept, retention and skill. Writes results.json, samples.jsonl, tokens.json and
    tables (Markdown, CSV, LaTeX)."""

    stage: ClassVar[str] = "evaluate"

    compare: tuple[str, ...] = option(
        (), f"methods at the same tokens: {', '.join(EQUAL_TOKENS)}; at the same FLOPs: {', '.join(EQUAL_FLOPS)}"
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
            if name not in EQUAL_TOKENS + EQUAL_FLOPS:
                known = ", ".join(EQUAL_TOKENS + EQUAL_FLOPS)
                raise UserError(f"compare names {name!r}, which is none of {known}\nChange --compare.")
        for name in set(NEEDS_SENSITIVITY) & set(self.compare):
            if not self.sensitivity:
                raise UserError(f"the baseline {name} needs what `sensitivity` measured\nGive --sensitivity FILE.")
        if "static" in self.compare and not (self.static_schedule or self.schedule):
            raise UserError("the baseline static needs the schedule searched with it\nGive --static_schedule FILE.")

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.models import resolve_device
        from ftp_lightning.processes import run_in

        folder.adopt(run_in(self.processes, resolve_device(self.device), carry_out, self, folder, progress.place()))


ANSWERS = "answers"


def carry_out(
    processes: Processes, device: torch.device, settings: EvaluateStage, folder: StageFolder, timing: dict[str, Any]
) -> list[str]:
    """Measure all methods, the same in every process; the first tells, keeps answers and writes. Returns the names of
    the files written."""
    import shutil

    from ftp_lightning.evaluation.harness.seen import furthest
    from ftp_lightning.stages.inputs import check_chat_template, load_model
    from ftp_lightning.stages.measuring import Bench
    from ftp_lightning.stages.methods import choose_methods

    progress, first = Progress(**timing), processes.rank == 0
    model, tokenizer = load_model(settings, device)
    if settings.apply_chat_template:
        check_chat_template(settings.model, tokenizer)
    methods = choose_methods(settings, model)
    steps = 2 * len(methods) + 2
    told = iter(range(steps))

    def tell(what: str) -> None:
        done = next(told)
        if first:
            progress.step(done, steps, what)

    place = Path(settings.answers).expanduser() if settings.answers else folder.path / ANSWERS
    seen = furthest(pruner.schedule.seen for _, pruner in methods if pruner.schedule)
    bench = Bench(settings, model, tokenizer, tell, processes if processes.count > 1 else None, place, seen)
    if first:
        folder.save_state({"answers": str(place)})  # from here on an end leaves what was answered
    results = _measured(settings, bench, methods)
    if first:
        for task, cell in results["dense"]["tasks"].items():
            if cell["left_out"]:
                progress.say(f"{task}: {cell['left_out']} documents that a schedule was searched on are left out")
        tokens = _write(settings, folder, results, bench, methods)
        _track(settings, folder, results["methods"], tokens)
        if not settings.answers:
            shutil.rmtree(place, ignore_errors=True)
        last = results["methods"][-1]
        skipped = f"{last['realised_sparsity']:.1%} skipped"
        progress.done(f"{len(methods)} methods; {last['name']}: KL {last['kl']['mean']:.3g}, {skipped}")
    return folder.files


def _measured(settings: EvaluateStage, bench: Bench, methods: Methods) -> dict[str, Any]:
    """What results.json holds."""
    from ftp_lightning.evaluation.pairing import pairs_of
    from ftp_lightning.stages.task_cells import counted_tasks, with_retention

    results = bench.dense_results()
    records = [bench.measure(*method) for method in methods]
    results["methods"] = with_retention(records, settings.tasks, bench.dense, bench.results)
    results["counted"] = counted_tasks(records, settings.tasks)
    results["paired"] = pairs_of(bench.samples(), [record["name"] for record in records], settings.seed)
    return results


def _write(
    settings: EvaluateStage, folder: StageFolder, results: dict[str, Any], bench: Bench, methods: Methods
) -> dict[str, Any]:
    import json

    from ftp_lightning.evaluation.result_tables import result_tables
    from ftp_lightning.evaluation.tables import written
    from ftp_lightning.stages.routed_story import story_tokens

    folder.write_json("results.json", results)
    folder.write_text("samples.jsonl", "".join(json.dumps(row) + "\n" for row in bench.samples()))
    tokens = story_tokens(settings, bench.model, bench.tokenizer, methods[-1][1])
    folder.write_json("tokens.json", tokens)
    for name, content in written(result_tables(results)).items():
        folder.write_text(name, content)
    summary = {method["name"]: {"kl": method["kl"], "kept": method["kept"]} for method in results["methods"]}
    folder.write_json("metrics.json", {"methods": summary, "windows": bench.windows.hash()})
    return tokens


def _track(settings: EvaluateStage, folder: StageFolder, methods: list[dict[str, Any]], tokens: dict[str, Any]) -> None:
    """The methods as a table; schedule and gates of the last one as images. The CSV would say nothing new."""
    from ftp_lightning.report import tracked
    from ftp_lightning.tracking import log_outcome, logging_to

    if settings.tracking == "csv":
        return
    rows = [_row(method) for method in methods]
    images = {
        "realised": lambda: tracked.schedule_png(methods[-1]["realised_per_block"]),
        "gates": lambda: tracked.gates_png(tokens["keep"]),
    }
    with logging_to(settings.tracking, folder.place("logs").parent, settings.config(), settings.stage) as logger:
        numbers = {"kl": rows[-1]["kl"], "kept": rows[-1]["kept"]}
        log_outcome(logger, numbers=numbers, images=images, tables={"methods": rows})


def _row(method: dict[str, Any]) -> dict[str, Any]:
    kept = method["kept"]["share"] if method["kept"] else None
    names = ("name", "budget", "kv", "realised_sparsity", "flops_reduction")
    return {name: method[name] for name in names} | {"kl": method["kl"]["mean"], "kept": kept}
