"""From a wanted FLOPs cut to the schedule that makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from torch import nn

from ftp_lightning.costs.flops import (
    Parts,
    continuation_flops,
    flops_reduction,
    head_flops,
    prompt_flops,
    stored_tokens,
)
from ftp_lightning.costs.per_block import block_costs
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.errors import UserError
from ftp_lightning.schedule import Schedule


class OutOfReach(UserError):
    """More is to be saved than can be."""


def solve_budget(
    model: nn.Module,
    reduction: float,
    length: int,
    kv: str | Sequence[str],
    schedule: Schedule | None = None,
    parts: Parts = "block",
    rank: int = 0,
    new_tokens: int = 0,
    extra: float = 0.0,
) -> Schedule:
    """The schedule whose `flops_reduction` of a prompt of `length` tokens is nearest the one asked for [ours].

    It is uniform, or `schedule` scaled by one factor c: s_l -> min(1, c * s_l), so that a zero stays zero. Rounding to
    tokens makes the reduction a staircase in c: the nearer of the two steps is taken, at its middle, and the result is
    off by less than one token in every block. `rank`: see `block_costs`. With `new_tokens` it is the reduction of the
    whole request, prompt and so many forwards of one token after it; `extra` FLOPs are charged beside the schedule's.

    Raises:
        UserError: the reduction is outside [0, 1), or (`OutOfReach`) more than can be saved.
    """
    if not 0.0 <= reduction < 1.0:
        raise UserError(f"the FLOPs reduction is {reduction}, must be in [0, 1)\nGive another --budget.")
    costs, head = block_costs(model, rank), head_flops(model)
    shape = schedule or Schedule.uniform(len(costs), 1.0)

    def request(of: Schedule) -> float:
        after = continuation_flops(costs, length, new_tokens, stored_tokens(of, length, kv, parts), head)
        return prompt_flops(costs, of, length, kv, head, parts) + after

    dense = request(Schedule.uniform(len(costs), 0.0))

    def saved(factor: float) -> float:
        return 1.0 - (request(_scaled(shape, factor)) + extra) / dense

    top = 1.0 / min((s for s in shape.sparsity if s > 0.0), default=1.0)
    if reduction > saved(top):
        raise _out_of_reach(reduction, length, saved(top))
    return _scaled(shape, _nearest(saved, reduction, top))


def stages_with_cut(model: nn.Module, reduction: float, length: int, level: float = 0.8) -> Schedule:
    """Two stages under `keep`: the first blocks are dense, the last ones skip about `level` of the tokens [ours].

    The second stage begins as late as the cut allows, and skips a little less than `level` to meet it.

    Raises:
        UserError: as `solve_budget`; all blocks together save less than `reduction` at that level (`OutOfReach`).
    """
    blocks, most = len(block_costs(model)), 0.0
    for first in range(blocks - 1, -1, -1):
        stages = Schedule.stages(blocks, [(first, level)])
        most = flops_reduction(model, stages, length, "keep")
        if most >= reduction:
            return solve_budget(model, reduction, length, "keep", stages).under("keep")
    raise _out_of_reach(reduction, length, most)


def default_with_cut(model: nn.Module, reduction: float, length: int, kv: str | Sequence[str] | None) -> Schedule:
    """The `Schedule.default` whose FLOPs cut of a prompt of `length` tokens is nearest `reduction`.

    Args:
        kv: as for `Schedule.default`.

    Raises:
        UserError: as `solve_budget`.
    """
    blocks = len(block_costs(model))
    return _with_cut(model, reduction, length, lambda budget: Schedule.default(blocks, budget, kv), 1.0)


def late_blocks(num_blocks: int, skipped: float) -> list[float]:
    """Sparsity where `skipped` blocks' worth of tokens skip: whole blocks from the last one down, then part of one."""
    return [min(1.0, max(0.0, skipped - (num_blocks - 1 - block))) for block in range(num_blocks)]


def late_with_cut(model: nn.Module, reduction: float, length: int) -> Schedule:
    """The schedule under `keep` whose last blocks are skipped by all tokens but the first and the last of a prompt.

    As many blocks from the last one down as the FLOPs cut asks for, then a part of the tokens of one more; the first
    block stays dense (POP, arXiv 2602.03295, with that part [ours]).

    Raises:
        UserError: as `solve_budget`.
    """
    blocks = len(block_costs(model))

    def late(skipped: float) -> Schedule:
        return Schedule(late_blocks(blocks, skipped), "keep")

    return _with_cut(model, reduction, length, late, blocks - 1.0)


def _with_cut(
    model: nn.Module, reduction: float, length: int, rule: Callable[[float], Schedule], top: float
) -> Schedule:
    """The schedule of a rule whose FLOPs cut is nearest; the more skips, the greater the rule's argument, in [0, top].
    Its schedules say their kv modes."""
    if not 0.0 <= reduction < 1.0:
        raise UserError(f"the FLOPs reduction is {reduction}, must be in [0, 1)\nGive another --budget.")
    costs, head = block_costs(model), head_flops(model)

    def spent(amount: float) -> float:
        schedule = rule(amount)
        return prompt_flops(costs, schedule, length, schedule.kv or (), head)

    dense = spent(0.0)

    def saved(amount: float) -> float:
        return 1.0 - spent(amount) / dense

    if reduction > saved(top):
        raise _out_of_reach(reduction, length, saved(top))
    return rule(_nearest(saved, reduction, top))


def budget_with_cut(model: nn.Module, pruner, reduction: float, length: int) -> float:
    """The budget at which a pruner's family has the FLOPs cut of a prompt of `length` tokens nearest `reduction`.

    That of a prompt which is routed: where the pruner computes prompts of this length densely, none is cut.

    Args:
        pruner: a `TokenPruner` that carries a family.

    Raises:
        UserError: the cut is outside [0, 1), or more than the largest schedule of the family saves (`OutOfReach`).
    """
    if not 0.0 <= reduction < 1.0:
        raise UserError(f"the FLOPs reduction is {reduction}, must be in [0, 1)\nGive another --budget.")
    routed, top = pruner.changed(least_tokens=0), pruner.family.budgets[-1]
    costs_of = cache(partial(block_costs, model))  # by the rank of what skipped tokens get

    def saved(budget: float) -> float:
        under = routed.at(budget)
        return planned_cut(model, under, length, costs=costs_of(under.skip_rank))

    if reduction > saved(top):
        raise _out_of_reach(reduction, length, saved(top))
    return min(_edge(saved, reduction, top), key=lambda budget: abs(saved(budget) - reduction)) if reduction else 0.0


def _out_of_reach(reduction: float, length: int, most: float) -> OutOfReach:
    return OutOfReach(
        f"a FLOPs reduction of {reduction} cannot be reached with prompts of {length} tokens: at most "
        f"{most:.3g} can be saved\nGive a smaller --budget, or another --kv or schedule."
    )


def _scaled(schedule: Schedule, factor: float) -> Schedule:
    return Schedule([min(1.0, factor * s) for s in schedule.sparsity], schedule.kv, schedule.seen)


def _nearest(saved: Callable[[float], float], wanted: float, top: float) -> float:
    """The middle of the step of `saved`, a rising staircase over [0, top], nearest `wanted`; 0 where that is the
    lowest."""
    if wanted <= 0.0:
        return 0.0
    value = min((saved(factor) for factor in _edge(saved, wanted, top)), key=lambda found: abs(found - wanted))
    if value <= saved(0.0):
        return 0.0
    left = _edge(saved, value, top)[1]
    right = _edge(lambda factor: float(saved(factor) > value), 1.0, top)[0] if saved(top) > value else top
    return (left + right) / 2.0


def _edge(rising: Callable[[float], float], value: float, top: float) -> tuple[float, float]:
    """Neighbouring numbers of [0, top], by bisection, between which `rising` reaches `value`; it does so at `top`."""
    low, high = 0.0, top
    while low < (middle := (low + high) / 2.0) < high:
        low, high = (low, middle) if rising(middle) >= value else (middle, high)
    return low, high
