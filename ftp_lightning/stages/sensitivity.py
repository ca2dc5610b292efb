"""Stage `sensitivity`: how much each block changes its tokens, and what pruning it alone costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.cli.kv import kv_option, modes_of
from ftp_lightning.cli.option import check_reachable, option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import RowsSettings, StageSettings
from ftp_lightning.errors import UserError
from ftp_lightning.schedule import kv_name
from ftp_lightning.whole_files import write_bytes

if TYPE_CHECKING:
    import torch

    from ftp_lightning.lit.block_sensitivity import BlockSensitivity


BOTH = "both"


@dataclass(frozen=True, kw_only=True)
class SensitivityStage(RowsSettings, StageSettings):
    """Measure Block Influence, redundancy, gradient, and the KL when one block alone is pruned. Writes
    sensitivity.json and sensitivity.png."""

    stage: ClassVar[str] = "sensitivity"

    kv: str = kv_option(
        "keep", "skipped tokens give no keys and values (evict), or do (keep); both are measured in one run", BOTH
    )
    router: Literal["static", "random"] = option("static", "which tokens skip the block that is pruned alone")
    levels: tuple[float, ...] = option((0.3, 0.6, 0.9), "sparsities at which each block is pruned alone, rising")
    thresholds: tuple[float, ...] = option((0.7, 0.8, 0.9), "cosines above which a token counts as redundant, rising")
    gradient: bool = option(True, "measure the gradient as well; it takes the memory of a backward pass")
    windows: int = option(16, "calibration rows to measure on, at most", least=1, most=10**7)
    recall_share: float = option(0.5, "share of the windows that hold facts to recall", least=0.0, most=1.0)
    batch_size: int = option(8, "rows per forward", least=1, most=10**6)

    def check(self) -> None:
        levels, thresholds = list(self.levels), list(self.thresholds)
        if not levels or levels != sorted({*levels}) or levels[0] <= 0 or levels[-1] > 1:
            raise UserError(f"levels are {levels}, must rise within (0, 1]\nGive for example --levels 0.3,0.6,0.9.")
        if not thresholds or thresholds != sorted({*thresholds}) or thresholds[0] <= -1 or thresholds[-1] >= 1:
            raise UserError(
                f"thresholds are {thresholds}, must rise within (-1, 1)\nGive for example --thresholds 0.7,0.8,0.9."
            )
        check_reachable(self.levels[0], self.prompt_tokens)

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.data.module import RowsData
        from ftp_lightning.pruning.devices import home
        from ftp_lightning.stages.inputs import load_model, measured_rows

        model, tokenizer = load_model(self)
        rows = measured_rows(self, model, tokenizer, self.windows, self.recall_share)
        system = self.system(model, rows.prompt_tokens if rows.one_shape else None)
        batches = -(-len(rows) // self.batch_size)
        trainer = quiet_trainer(home(model), lambda done: progress.step(done, batches, f"batch {done} of {batches}"))
        trainer.predict(system, datamodule=RowsData(rows, batch_size=self.batch_size), return_predictions=False)
        found = {"router": self.router, "kv": self.kv} | system.summary()
        folder.write_json("sensitivity.json", found)
        write_bytes(folder.place("sensitivity.png"), self.picture(found))
        folder.write_json("metrics.json", {"rows_hash": rows.hash(), "tokens": found["tokens"]} | rows.counts())
        self._track(folder, found)
        weakest = min(range(found["num_blocks"]), key=lambda block: found["kl"][block][-1])
        kl = found["kl"][weakest][-1]
        progress.done(f"block {weakest + 1} is cheapest to prune, KL {kl:.2g} at {self.levels[-1]:.0%}")

    def system(self, model: Any, prompt_tokens: int | None) -> BlockSensitivity:
        """What measures: this router in every kv mode asked for; `prompt_tokens` where all prompts are so long."""
        from ftp_lightning.lit.block_sensitivity import BlockSensitivity
        from ftp_lightning.pruning import TokenPruner
        from ftp_lightning.routing import RandomRouter, StaticRouter
        from ftp_lightning.stages.inputs import num_blocks

        router = RandomRouter(self.seed) if self.router == "random" else StaticRouter()
        measured = ("keep", "evict") if self.kv == BOTH else (modes_of(self.kv),)
        makers = {kv_name(kv): partial(TokenPruner, router, kv=kv) for kv in measured}
        shape: dict[str, Any] = {"prompt_tokens": prompt_tokens, "gradient": self.gradient}
        return BlockSensitivity(model, makers, num_blocks(model), self.levels, self.thresholds, **shape)

    def _track(self, folder: StageFolder, found: dict[str, Any]) -> None:
        """One row per block, and the picture. The CSV of a logger would say nothing new."""
        from ftp_lightning.tracking import log_outcome, logging_to

        if self.tracking == "csv":
            return
        columns = {"block_influence": found["block_influence"]}
        columns |= {f"kl at {level}": [row[i] for row in found["kl"]] for i, level in enumerate(found["levels"])}
        rows = [{"block": 1 + block, **dict(zip(columns, cells))} for block, cells in enumerate(zip(*columns.values()))]
        with logging_to(self.tracking, folder.place("logs").parent, self.config(), self.stage) as logger:
            log_outcome(logger, images={"sensitivity": lambda: self.picture(found)}, tables={"blocks": rows})

    def picture(self, found: dict[str, Any]) -> bytes:
        """All that was found as a PNG."""
        from ftp_lightning.report.sensitivity_figure import overview
        from ftp_lightning.report.style import house_style, to_png

        with house_style():
            return to_png(overview(found))


def quiet_trainer(device: torch.device, tell):
    """A Lightning trainer for one pass over batches that leaves no files; `tell(batches done)` hears of the way."""
    import lightning

    from ftp_lightning.lit.trainer_device import trainer_device

    class Tell(lightning.Callback):
        def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
            tell(batch_idx + 1)

    return lightning.Trainer(
        **trainer_device(device),
        logger=False,
        callbacks=[Tell()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
