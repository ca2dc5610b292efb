"""Does our harness give a real model the scores that others have published for it?

    python experiments/dense_scores.py --task_data FOLDER --limit 200
    python experiments/dense_scores.py --tables    # the table of docs/real_models.md, from what is published

Nothing is pruned. The models are 4-bit files (GGUF), so a few points below the originals are expected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pandas import DataFrame

from ftp_lightning.evaluation.harness.model import FtpLM
from ftp_lightning.evaluation.harness.task_data import find_files
from ftp_lightning.evaluation.harness.tasks import run_tasks
from ftp_lightning.evaluation.statistics import wilson_interval
from ftp_lightning.models import load
from ftp_lightning.studies.grid import Cell, arguments, finished, sentences

PACKED = "experiments/found/dense_scores.jsonl.xz"
PUBLISHED = {
    ("smollm2-135m-instruct", "arc_easy"): ("acc", 0, 54.1),
    ("smollm2-135m-instruct", "arc_challenge"): ("acc_norm", 0, 27.7),
    ("smollm2-135m-instruct", "hellaswag"): ("acc_norm", 0, 43.0),
    ("gemma3-270m", "arc_easy"): ("acc", 0, 57.7),
}
"""Metric, examples in the prompt, published percent. SmolLM2: measured by lm-eval on the card of
lldois/SmolLM2-135M-Reasoning-SLERP-Champion. Gemma: its own card."""


@dataclass(frozen=True)
class Score(Cell):
    model: str
    task: str
    limit: int


def measure(score: Score, folder: str) -> DataFrame:
    model, tokenizer = load(score.model)
    metric, shots, _ = PUBLISHED[score.model, score.task]
    lm = FtpLM(model.eval(), tokenizer=tokenizer, batch_size=8, device="cpu", dtype="float32")
    found = run_tasks(lm, {score.task: find_files(score.task, folder)}, score.limit, shots)[score.task]
    return DataFrame(
        {"id": [item["id"] for item in found["items"]], "right": [item[metric] for item in found["items"]]}
    )


def table(found: DataFrame) -> str:
    rows = []
    for (model, task), items in found.groupby(["model", "task"], sort=False):
        metric, shots, published = PUBLISHED[model, task]
        low, high = wilson_interval(int(items["right"].sum()), len(items))
        rows.append(
            {
                "model": model,
                "task": f"{task}, {metric}, {shots} examples",
                "items": len(items),
                "ours [95 %]": f"{100 * items['right'].mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                "published": published,
            }
        )
    return DataFrame(rows).to_markdown(index=False, floatfmt=".1f")


def main() -> None:
    args = arguments(__doc__, "runs/dense_scores", PACKED, task_data="data", limit=200)
    torch.set_num_threads(1)
    with sentences():
        cells = [Score(model, task, args.limit) for model, task in PUBLISHED]
        print(table(finished(cells, lambda cell: measure(cell, args.task_data), args)))


if __name__ == "__main__":
    main()
