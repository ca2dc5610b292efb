"""What one process of an evaluation does: read the inputs, measure, and, if it is the first, write what was found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ftp_lightning.artifact import StageFolder
from ftp_lightning.evaluation.pairing import pairs_of
from ftp_lightning.evaluation.result_tables import result_tables
from ftp_lightning.evaluation.tables import written
from ftp_lightning.processes import Processes
from ftp_lightning.report import tracked
from ftp_lightning.stages.evaluate import EvaluateStage
from ftp_lightning.stages.inputs import check_chat_template, load_model
from ftp_lightning.stages.measuring import Bench
from ftp_lightning.stages.methods import Methods, choose_methods
from ftp_lightning.stages.progress import Progress
from ftp_lightning.stages.showcase import story_tokens
from ftp_lightning.stages.task_cells import counted_tasks, with_retention
from ftp_lightning.tracking import log_outcome, logging_to

ANSWERS = "answers"


def carry_out(
    processes: Processes, device: torch.device, settings: EvaluateStage, folder: StageFolder, timing: dict[str, Any]
) -> list[str]:
    """Measure all methods, the same in every process; the first tells, keeps answers and writes. Returns the names of
    the files written."""
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
    bench = Bench(settings, model, tokenizer, tell, processes if processes.count > 1 else None, place)
    if first:
        folder.save_state({"answers": str(place)})  # from here on an end leaves what was answered
    results = _measured(settings, bench, methods)
    if first:
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
    results = bench.dense_results()
    records = [bench.measure(*method) for method in methods]
    results["methods"] = with_retention(records, settings.tasks, bench.dense, bench.results)
    results["counted"] = counted_tasks(records, settings.tasks)
    results["paired"] = pairs_of(bench.samples(), [record["name"] for record in records], settings.seed)
    return results


def _write(
    settings: EvaluateStage, folder: StageFolder, results: dict[str, Any], bench: Bench, methods: Methods
) -> dict[str, Any]:
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
