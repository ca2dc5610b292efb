"""What a pruner will do with each block of a model: known when it is attached, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.attention import interface
from ftp_lightning.pruning.site import Site
from ftp_lightning.routing.base import ADDRESSED, Needs
from ftp_lightning.routing.fixed import FixedRouter

if TYPE_CHECKING:
    from ftp_lightning.pruning.pruner import TokenPruner


@dataclass(frozen=True)
class BlockPlan:
    """What is done with one block.

    Attributes:
        index: of the block. site: where its parts are. is_last: no block comes after it.
        stock: the attention function that the model has without a pruner.
        sparsity: the schedule's; 0 where a FixedRouter goes without.
        keeps: skipped tokens leave their keys and values (`kv="keep"`).
        routed: the router is asked. parts: what it decides apart: ("block",), or "attention", "mlp" or both.
        removed: "attention", "mlp", both or neither: what no token enters.
    """

    index: int
    site: Site
    stock: Callable
    is_last: bool
    sparsity: float
    keeps: bool
    routed: bool
    parts: tuple[str, ...]
    removed: frozenset[str]

    @property
    def splits_keys(self) -> bool:
        """Keys and values may be made apart from the queries: of tokens that are skipped, or that nobody reads."""
        return self.keeps or self.is_last


@dataclass(frozen=True)
class Plan:
    """What is done with a model.

    Attributes:
        blocks: first to last. sparsity: the schedule's; empty where a FixedRouter goes without.
        needs: what the router looks at.
        scored: blocks whose attention scores a later router reads. greatest: the greatest of several scores counts.
        routes: the router is asked somewhere. changes: or something is removed.
        enters_parts: attention and MLP are entered by different tokens in some block.
        least_tokens: tokens from which on a prompt is routed.
    """

    blocks: tuple[BlockPlan, ...]
    sparsity: tuple[float, ...]
    needs: Needs
    scored: frozenset[int]
    greatest: bool
    routes: bool
    changes: bool
    enters_parts: bool
    least_tokens: int

    @staticmethod
    def of(pruner: TokenPruner, model: nn.Module, sites: list[Site]) -> Plan:
        """UserError where decisions address parts of a block that are not understood."""
        from ftp_lightning.costs.least_tokens import routed_from

        router, schedule = pruner.router, pruner.schedule
        fixed = router if isinstance(router, FixedRouter) else None
        named = "attention+mlp" if fixed is not None and fixed.by_parts else "block"
        sparsity = () if schedule is None else schedule.sparsity
        blocks = tuple(
            BlockPlan(
                index=index,
                site=site,
                stock=interface(site.backend.name, site.attention),
                is_last=index == len(sites) - 1,
                sparsity=sparsity[index] if sparsity else 0.0,
                keeps=pruner.kv[index] == "keep",
                routed=sparsity[index] > 0.0 if fixed is None else not fixed.is_all_kept(index),
                parts=ADDRESSED[pruner.parts_by_block[index] if fixed is None else named],
                removed=pruner.removed_parts(index),
            )
            for index, site in enumerate(sites)
        )
        routes = any(block.routed for block in blocks)
        enters_parts = any("block" not in block.parts or len(block.removed) == 1 for block in blocks)
        for block in blocks if enters_parts else ():
            if block.site.mlp is None:
                raise UserError(
                    f"block {block.index} has no feed-forward part that is understood (one module with its matrices, "
                    "or two linear maps): decisions can only address whole blocks of this model.\nUse parts='block'."
                )
        return Plan(
            blocks=blocks,
            sparsity=sparsity,
            needs=router.needs,
            scored=frozenset(block.index for block in blocks if _is_read(pruner, blocks, block.index)),
            greatest=pruner.attention_score.greatest,
            routes=routes,
            changes=routes or bool(pruner.removed),
            enters_parts=enters_parts,
            least_tokens=routed_from(model, pruner),
        )


def _is_read(pruner: TokenPruner, blocks: tuple[BlockPlan, ...], index: int) -> bool:
    """Whether a later router reads what a block writes: not if a block in between writes every token anew."""
    needs = pruner.router.needs
    asks = [block.routed and len(block.removed) < 2 for block in blocks]
    if not needs.attention or (needs.once == "from block 0" and index) or not pruner.attention_score.reads(index):
        return False
    if needs.once == "at first" and any(asks[: index + 1]):
        return False
    for later in blocks[index + 1 :]:
        if asks[later.index]:
            return True
        writes_all = later.site.window is None and not later.removed
        if writes_all and needs.once != "from block 0" and pruner.reads_from is None:
            return False
    return False
