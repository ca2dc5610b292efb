"""BlockPruner: attention and MLP parts removed greedily."""

from __future__ import annotations

from collections.abc import Iterator

from ftp_lightning.baselines.removal import Part, RemovalPeer, greedy_order
from ftp_lightning.baselines.setting import Setting


class BlockPruner(RemovalPeer):
    """BlockPruner (Zhong et al. 2024, arXiv 2406.10594): again and again the attention or MLP part is removed without
    which the model loses least on calibration text.

    Adapted: the loss is the KL to the dense model on the continuation of the calibration rows, as for every other
    method here, in place of perplexity over all positions. The order is found once and serves all budgets
    (`setting.memo[ORDER]`).
    """

    name, title, paper = "block_pruner", "BlockPruner (parts removed)", "BlockPruner, arXiv 2406.10594"
    parts = "attention+mlp"
    ORDER = "block_pruner"

    def order(self, setting: Setting) -> Iterator[Part]:
        known = setting.memo.setdefault(self.ORDER, [])
        yield from known
        parts = [(block, part) for block in range(setting.blocks) for part in ("attention", "mlp")]
        rest = [part for part in parts if part not in known]
        before = list(known)
        for part in greedy_order(rest, lambda removed: self.loss(setting, [*before, *removed])):
            known.append(part)
            yield part

    def loss(self, setting: Setting, removed: list[Part]) -> float:
        """Mean KL of the continuation without these parts, in nats per token."""
        from ftp_lightning.evaluation.continuation import evaluate_rows, teacher_logprobs

        windows = setting.needed("windows", self.name)
        if "teacher" not in setting.memo:
            setting.memo["teacher"] = teacher_logprobs(setting.model, windows)
        pruner = self.without(setting, removed)
        return evaluate_rows(setting.model, windows, pruner, teacher=setting.memo["teacher"]).kl_mean
