"""Decode policies: which continuation tokens skip a block, decided causally (paper, Section 4.4).

Shapes: B rows, T continuation tokens of this forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning.cache import RoutedLayer
from ftp_lightning.pruning.continuation_scores import ContinuationTable
from ftp_lightning.pruning.decide import kept_tokens, replayed, reserved_tokens
from ftp_lightning.pruning.kept import Kept
from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.fixed import FixedRouter

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun

DECODE = ("dense", "threshold", "strict")
PROMPT, COMPUTED, SKIPPED = 0, 1, 2
"""What an account says of a slot: prompt (or padding), a continuation token that was computed, one that skipped."""


def follow(run: BlockRun, part: str) -> tuple[Kept, None]:
    """The decision about continuation tokens, each by what is known up to itself. Asks the device how many skip."""
    pruner, forward = run.attached.pruner, run.forward
    if isinstance(pruner.router, FixedRouter):
        return Kept(*replayed(run, part, longer=True)), None
    with torch.no_grad():
        probability = pruner.router.probability(_context(run, part)).to(forward.real.device)
    if pruner.decode == "threshold":
        skips = below_threshold(probability, forward.real, pruner.threshold)
    else:
        layer = run.routed_layer(run.call.cache, run.plan.keeps)
        assert layer is not None  # a continuation has a cache
        account = account_of(layer, part, forward.real, forward.past)
        skips = within_allowance(probability, forward.real, run.plan.sparsity, account)
        enter(layer, part, account, skips, forward.real)
    keep = forward.real & ~skips
    return Kept(keep, keep.sum(1).tolist()), None


def _context(run: BlockRun, part: str) -> RoutingContext:
    """Token i of a row has T_i = i + 1 tokens: itself, the last, and those before it (method.md, section 4)."""
    forward, plan, home = run.forward, run.plan, run.forward.home
    real, position = forward.real.to(home), forward.position.to(home)
    counts = [[kept_tokens(n, plan.sparsity, reserved_tokens(n)) for n in row] for row in forward.host_lengths]
    own = rank = None
    if isinstance(forward.table, ContinuationTable):
        own, rank = forward.table.own.to(home), forward.table.rank.to(home)
    hidden = run.call.hidden.to(home) if run.attached.plan.needs.hidden else run.call.hidden
    return RoutingContext(
        plan.index, plan.sparsity, real, position, position + 1, torch.tensor(counts, device=home), own, hidden,
        rank=rank, schedule=run.attached.plan.sparsity, part=part, padded=forward.padded, memo=forward.memo,
    )  # fmt: skip


def below_threshold(probability: Tensor, real: Tensor, threshold: float) -> Tensor:
    """`threshold`: skip where p_compute < threshold. (B, T) bool, True = skips."""
    return (probability < threshold) & real


def within_allowance(probability: Tensor, real: Tensor, sparsity: float, account: Tensor) -> Tensor:
    """`strict`: a row skips iff p_compute < 0.5 and skipped + 1 <= s_l (generated + 1), token after token.

    account (B, past) uint8 says what the row's earlier tokens did; `skipped` and `generated` count its continuation
    tokens in this block. (B, T) bool, True = skips.
    """
    skipped, generated = (account == SKIPPED).sum(1), (account != PROMPT).sum(1)
    wants, skips = (probability < 0.5) & real, []
    for token in range(real.shape[1]):
        allowed = skipped + 1 <= sparsity * (generated + 1).to(torch.float64)
        skips.append(wants[:, token] & allowed)
        skipped, generated = skipped + skips[-1], generated + real[:, token]
    return torch.stack(skips, 1)


def account_of(layer: RoutedLayer, part: str, real: Tensor, past: int) -> Tensor:
    """(B, past) uint8: what the tokens before this forward did in this part of the block; what an error has stopped
    after its decision does not count."""
    known = layer.account.get(part, real.new_zeros((len(real), 0), dtype=torch.uint8))[:, :past]
    missing = past - known.shape[1]
    return torch.cat([known, known.new_zeros((len(real), missing))], 1) if missing else known


def enter(layer: RoutedLayer, part: str, account: Tensor, skips: Tensor, real: Tensor) -> None:
    """Add this forward's tokens to the account, where it lives with the cache."""
    entry = torch.where(skips, SKIPPED, COMPUTED) * real
    layer.account[part] = torch.cat([account, entry.to(torch.uint8)], 1)
