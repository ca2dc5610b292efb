"""How much does it matter which generated tokens skip blocks? The decode policies on tasks and text.

    python experiments/decode_sensitivity.py --pruned runs/demo/finetune/pruned --tasks story_recall,multi_key_recall
    python experiments/decode_sensitivity.py --tables

The prompt is pruned alike under all policies: `dense` (no generated token skips a block), `threshold` at 0.3 to 0.7
(0.5 in the paper) and `strict`. The static router computes every generated token, so give a trained one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from ftp_lightning.studies.grid import Cell, arguments, finished, sentences

POLICIES = "dense,threshold 0.3,threshold 0.5,threshold 0.7,strict"


@dataclass(frozen=True)
class Policy(Cell):
    policy: str


def main() -> None:
    sizes: dict[str, Any] = {"items": 100, "windows": 64}
    names = {"model": "embedded", "pruned": "", "tasks": "story_recall,multi_key_recall"}
    args = arguments(__doc__, "runs/decode_sensitivity", **names, policies=POLICIES, **sizes)
    grid = [Policy(policy) for policy in args.policies.split(",")]

    @cache
    def prepared() -> tuple[Any, Any]:
        from ftp_lightning.models import load
        from ftp_lightning.stages.evaluate import EvaluateStage, bench_of
        from ftp_lightning.stages.inputs import load_pruner

        stage = EvaluateStage(
            model=args.model, tasks=tuple(args.tasks.split(",")), items=args.items, windows=args.windows
        )
        model, tokenizer = load(args.model)
        return bench_of(stage, model, tokenizer, None, args.output / "answers"), load_pruner(args.pruned, model)

    def measure(cell: Policy) -> Any:
        bench, pruner = prepared()
        decode, _, threshold = cell.policy.partition(" ")
        changes = {"threshold": float(threshold)} if threshold else {}
        return bench.measure(cell.policy, pruner.changed(decode=decode, **changes))

    with sentences():
        found = finished(grid, measure, args)
    shown = found.pivot_table(["right", "skipped", "kl"], "policy", "task", dropna=False, sort=False)
    print(shown.dropna(axis="columns", how="all").to_markdown())


if __name__ == "__main__":
    main()
