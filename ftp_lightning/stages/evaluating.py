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
from ftp_lightning.stages.evaluate import EvaluateStage
from ftp_lightning.stages.inputs import check_chat_template, load_model
from ftp_lightning.stages.measuring import Bench
from ftp_lightning.stages.methods import Methods, choose_methods
from ftp_lightning.stages.progress import Progress
from ftp_lightning.stages.showcase import story_tokens
from ftp_lightning.stages.task_cells import counted_tasks, with_retention

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
        _write(settings, folder, results, bench, methods)
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
) -> None:
    folder.write_json("results.json", results)
    folder.write_text("samples.jsonl", "".join(json.dumps(row) + "\n" for row in bench.samples()))
    folder.write_json("tokens.json", story_tokens(settings, bench.model, bench.tokenizer, methods[-1][1]))
    for name, content in written(result_tables(results)).items():
        folder.write_text(name, content)
    summary = {method["name"]: {"kl": method["kl"], "kept": method["kept"]} for method in results["methods"]}
    folder.write_json("metrics.json", {"methods": summary, "windows": bench.windows.hash()})
