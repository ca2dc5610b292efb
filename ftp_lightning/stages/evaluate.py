"""Stage `evaluate`: pruned models against dense, on text and on tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.baselines.names import EQUAL_FLOPS, EQUAL_TOKENS, NEEDS_SENSITIVITY
from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import PrunedSettings, RowsSettings
from ftp_lightning.data.task_names import MADE, OURS
from ftp_lightning.errors import UserError
from ftp_lightning.stages.run_work import evaluated

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame

    from ftp_lightning.evaluation.bench import Bench
    from ftp_lightning.processes import Processes
    from ftp_lightning.stages.methods import Methods

OUR_TASKS = OURS


@dataclass(frozen=True, kw_only=True)
class EvaluateStage(RowsSettings, PrunedSettings):
    """Measure KL, perplexity, answers kept, retention and skill. Writes results.json, record.jsonl (one line per item
    and method), tokens.json and tables (Markdown, CSV, LaTeX)."""

    stage: ClassVar[str] = "evaluate"

    compare: tuple[str, ...] = option(
        (), f"methods at the same tokens: {', '.join(EQUAL_TOKENS)}; at the same FLOPs: {', '.join(EQUAL_FLOPS)}"
    )
    before: str | None = option(None, "pruner before fine-tuning, to compare with", is_file=True)
    static_schedule: str | None = option(None, "schedule of the baseline `static`; else --schedule", is_file=True)
    sensitivity: str | None = option(None, "sensitivity.json, for the baseline `block_influence`", is_file=True)
    tasks: tuple[str, ...] = option(OUR_TASKS, f"{', '.join(MADE)}, or any that lm-eval knows")
    task_data: str | None = option(
        None,
        "folder of TASK.jsonl or TASK_SPLIT.jsonl, in the Hub's schema; or one file of SQuAD's records",
        is_file=True,
    )
    mode: Literal["prompt", "sequence", "both"] = option(
        "prompt", "tasks: the context alone is routed, or the whole text; both shows the difference"
    )
    threshold: float | None = option(
        None, "p_compute below which --decode threshold skips; else the pruner's, 0.5", least=0.0, most=1.0
    )
    items: int = option(300, "items of a task that is made here", least=1, most=10**7)
    limit: int | None = option(None, "items per task at most", least=1, most=10**7)
    num_fewshot: int | None = option(
        None, "examples before each item of lm-eval's tasks; else as declared", least=0, most=10_000
    )
    apply_chat_template: bool = option(False, "put the items into the model's chat template")
    windows: int | None = option(None, "rows of text at most; all of them by default", least=1, most=10**7)
    batch_size: int = option(8, "rows or contexts per forward", least=1, most=10**6)
    answers: str | None = option(None, "folder to keep answers in and take them from, for several runs", passive=True)
    processes: int = option(
        1, "processes that share the items of tasks, on this machine", least=1, most=1024, passive=True
    )

    def check(self) -> None:
        super().check()
        for name in self.compare:
            if name not in EQUAL_TOKENS + EQUAL_FLOPS:
                known = ", ".join(EQUAL_TOKENS + EQUAL_FLOPS)
                raise UserError(f"compare names {name!r}, must be among {known}\nChange --compare.")
        for name in set(NEEDS_SENSITIVITY) & set(self.compare):
            if not self.sensitivity:
                raise UserError(f"the baseline {name} needs what `sensitivity` measured\nGive --sensitivity FILE.")
        if "static" in self.compare and not (self.static_schedule or self.schedule):
            raise UserError("the baseline static needs the schedule searched with it\nGive --static_schedule FILE.")

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.models import resolve_device
        from ftp_lightning.processes import run_in
        from ftp_lightning.stages.task_files import check_tasks

        if self.task_data is None:
            check_tasks(self.tasks)
        folder.adopt(run_in(self.processes, resolve_device(self.device), carry_out, self, folder, progress.place()))


ANSWERS = "answers"


def carry_out(
    processes: Processes, device: torch.device, settings: EvaluateStage, folder: StageFolder, timing: dict[str, Any]
) -> list[str]:
    """Measure all methods, the same in every process; the first writes. Returns the names of the files written."""
    import shutil

    from ftp_lightning.evaluation.harness.seen import furthest
    from ftp_lightning.stages.inputs import check_chat_template, load_model
    from ftp_lightning.stages.methods import choose_methods

    model, tokenizer = load_model(settings, device)
    if settings.apply_chat_template:
        check_chat_template(settings.model, tokenizer)
    methods = choose_methods(settings, model)
    place = Path(settings.answers).expanduser() if settings.answers else folder.path / ANSWERS
    seen = furthest(pruner.schedule.seen for _, pruner in methods if pruner.schedule)
    bench = bench_of(settings, model, tokenizer, processes if processes.count > 1 else None, place, seen)
    if processes.rank == 0:
        folder.save_state({"answers": str(place)})  # from here on an end leaves what was answered
    _score_texts(bench, methods, processes)
    items = _measured(settings, bench, methods, Progress(**timing) if processes.rank == 0 else None)
    if processes.rank == 0:
        _write(settings, folder, bench, tokenizer, items, methods, Progress(**timing))
        if not settings.answers:
            shutil.rmtree(place, ignore_errors=True)
    return folder.files


def bench_of(
    settings: EvaluateStage,
    model: Any,
    tokenizer: Any,
    processes: Processes | None,
    answers: Path,
    seen: dict[str, float] | None = None,
) -> Bench:
    """The rows of text and the tasks that the settings ask for, without the documents that a search has `seen`.

    UserError for what cannot be had.
    """
    from ftp_lightning.evaluation.bench import OWN_ANSWERS, TEXT, Bench
    from ftp_lightning.evaluation.harness.asking import HarnessTasks
    from ftp_lightning.stages.inputs import answered, check_questions
    from ftp_lightning.stages.task_files import TaskFiles, test_rows

    rows = answered(settings, model, test_rows(settings, tokenizer))
    files = TaskFiles(settings, tokenizer)
    for questions in files.with_facts():
        check_questions(model.config, tokenizer, questions)
    names = ("batch_size", "prompt_tokens", "continuation_tokens")
    about = {name: getattr(settings, name) for name in names} | {"answers": answers}
    run = {name: getattr(settings, name) for name in ("limit", "num_fewshot", "apply_chat_template")}
    run["seen"] = seen
    texts = {OWN_ANSWERS if settings.rows == "own_answers" else TEXT: rows}
    return Bench(model, texts, HarnessTasks(model, tokenizer, files, about, run, processes), settings.batch_size)


def _score_texts(bench: Bench, methods: Methods, processes: Processes) -> None:
    """Score the text under every method and mode, shared among the processes; `bench` keeps what all have found."""
    from ftp_lightning.evaluation.continuation import MODES

    jobs = [(name, pruner, text, mode) for name, pruner in methods for text in bench.texts for mode in MODES]
    found = processes.map(lambda job: bench.score(*job), jobs)
    bench.scores |= {(name, text, mode): one for (name, _, text, mode), one in zip(jobs, found, strict=True)}


def _measured(settings: EvaluateStage, bench: Bench, methods: Methods, progress: Progress | None) -> DataFrame:
    """The record of dense and all methods."""
    from ftp_lightning.evaluation.outcome import SEQUENCE
    from ftp_lightning.evaluation.record import joined

    def tell(done: int, what: str) -> None:
        if progress is not None:
            progress.step(evaluated(settings, len(methods), done), evaluated(settings, len(methods)), what)

    tell(0, "dense")
    parts, first = [bench.dense], "prompt" if settings.mode == "both" else settings.mode
    for done, (name, pruner) in enumerate(methods, start=1):
        tell(done, name)
        parts.append(bench.measure(name, pruner, settings.seed, first, scored=True))
        if settings.mode == "both":
            parts.append(bench.needed(bench.asked(name + SEQUENCE, pruner, settings.seed, "sequence")))
    return joined(parts)


def _write(
    settings: EvaluateStage,
    folder: StageFolder,
    bench: Bench,
    tokenizer: Any,
    items: DataFrame,
    methods: Methods,
    progress: Progress,
) -> None:
    """All files of the stage, the outcome to the logger, and its last line to the terminal."""
    from ftp_lightning.evaluation.outcome import results_of
    from ftp_lightning.evaluation.pairing import RECORD
    from ftp_lightning.evaluation.record import as_lines
    from ftp_lightning.evaluation.tables import result_tables, written
    from ftp_lightning.stages.routed_story import story_tokens

    results = results_of(bench, items, methods, settings.tasks)
    for task, cell in results["dense"]["tasks"].items():
        cell["left_out"] = getattr(bench.ask, "left_out", {}).get(task, 0)
        if cell["left_out"]:
            progress.say(f"{task}: {cell['left_out']} documents that a schedule was searched on are left out")
    folder.write_json("results.json", results)
    folder.write_text(RECORD, as_lines(items))
    tokens = story_tokens(settings, bench.model, tokenizer, methods[-1][1])
    folder.write_json("tokens.json", tokens)
    for name, content in written(result_tables(results)).items():
        folder.write_text(name, content)
    summary = {method["name"]: {"kl": method["kl"], "kept": method["kept"]} for method in results["methods"]}
    (rows,) = bench.texts.values()
    folder.write_json("metrics.json", {"methods": summary, "rows_hash": rows.hash()} | rows.counts())
    _track(settings, folder, results["methods"], tokens)
    last = results["methods"][-1]
    skipped = f"{last['realised_sparsity']:.1%} skipped"
    progress.done(f"{len(methods)} methods; {last['name']}: KL {last['kl']['mean']:.3g}, {skipped}")


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
