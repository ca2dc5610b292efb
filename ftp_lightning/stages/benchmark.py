"""Stage `benchmark`: prefill time of the pruned model against the same stock model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ftp_lightning.artifact import StageFolder
from ftp_lightning.errors import UserError
from ftp_lightning.stages.base import PrunedSettings
from ftp_lightning.stages.option import check_reachable, option
from ftp_lightning.stages.progress import Progress

LENGTHS = (512, 1024, 2048)
"""Prompt lengths by default, of these the ones that the model takes: at a few hundred tokens a small model's time is
mostly overhead."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkStage(PrunedSettings):
    """Time the prefill, dense and pruned in turn, beside the limit that the FLOPs set. Writes benchmark.json."""

    stage: ClassVar[str] = "benchmark"

    lengths: tuple[int, ...] = option((), "prompt lengths; by default 512, 1024, 2048 as far as the model goes")
    batches: tuple[int, ...] = option((1,), "prompts per forward")
    pairs: int = option(15, "pairs of a dense and a pruned prefill", least=2)

    def check(self) -> None:
        super().check()
        if min(self.lengths or LENGTHS) < 4 or not self.batches or min(self.batches) < 1:
            raise UserError(
                f"lengths {self.lengths} must be >= 4, batches {self.batches} >= 1\nChange --lengths or --batches."
            )
        if self.budget_kind == "tokens":
            check_reachable(self.budget or 0.0, min(self.lengths or LENGTHS))

    def work(self, folder: StageFolder, progress: Progress) -> None:
        import torch

        from ftp_lightning.evaluation.speed import prefill_speed
        from ftp_lightning.stages.inputs import chosen_pruner, load_model

        model, _ = load_model(self)
        pruner = chosen_pruner(self, model)
        if self.budget_kind == "flops":  # known in tokens only now
            check_reachable(pruner.schedule.budget, min(self.lengths or _usual(model)))
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [(length, batch) for batch in self.batches for length in self.lengths or _usual(model)]
        rows = []
        for done, (length, batch) in enumerate(sizes):
            progress.step(done, len(sizes), f"{batch} x {length} tokens")
            rows.append(_row(prefill_speed(model, pruner, length, batch, self.pairs, generator=generator), pruner))
        folder.write_json("benchmark.json", {"rows": rows})
        speedup = {f"{row['batch']}x{row['length']}": row["speedup"] for row in rows}
        folder.write_json("metrics.json", {"speedup": speedup})
        last = rows[-1]
        progress.done(
            f"{last['speedup']:.2f}x as fast at {last['length']} tokens (FLOPs allow {last['flops_limit']:.2f}x)"
        )


def _usual(model: Any) -> tuple[int, ...]:
    """The default lengths that fit the model's positions; where none does, all of its positions."""
    limit = getattr(model.config, "max_position_embeddings", None) or LENGTHS[-1]
    return tuple(length for length in LENGTHS if length <= limit) or (limit,)


def _row(speed: Any, pruner: Any) -> dict[str, Any]:
    return {
        "length": speed.length,
        "batch": speed.batch,
        "kv": pruner.kv[0] if len(set(pruner.kv)) == 1 else "mixed",
        "budget": pruner.schedule.budget,
        "speedup": speed.ratio,
        "low": speed.ratio_low,
        "high": speed.ratio_high,
        "flops_limit": speed.flops_limit,
        "dense_ms": speed.dense_ms,
        "pruned_ms": speed.pruned_ms,
        "realised_sparsity": speed.sparsity,
        "pairs": speed.pairs,
    }
