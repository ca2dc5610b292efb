"""Decisions about parts of a block: its attention and its MLP are entered by different tokens.

The block runs on all rows (norms and residuals cost next to nothing); its attention module and its feed-forward part
are wrapped, gather the rows that enter them and return for the others the update that `skip` says: zero, or what a
compensation makes of the rows that would have entered.

Shapes: B rows, T new tokens, K kept tokens of the fullest row, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ftp_lightning.pruning.calls import Call
from ftp_lightning.pruning.dense import run_dense
from ftp_lightning.pruning.gathered import run_rows, scattered
from ftp_lightning.pruning.kept import Rows
from ftp_lightning.pruning.masked import run_all_rows
from ftp_lightning.pruning.state import Chosen

if TYPE_CHECKING:
    from ftp_lightning.pruning.engine import Engine


@dataclass
class PartPlan:
    """The rows of the block that is running; `mlp_hidden` (B, T, D): what came to its MLP."""

    attention: Rows | None
    mlp: Rows | None
    gates: tuple[Tensor | None, Tensor | None]
    mlp_hidden: Tensor | None = None


def run_parts(engine: Engine, index: int, inner, call: Call, chosen: Chosen) -> Tensor:
    """The block with `chosen` in force for its two parts. (B, T, D)."""
    real = engine.running.real
    attention, mlp = (real if rows is None else rows.keep for rows in (chosen.attention, chosen.mlp))
    engine.running.trace.add(attention, mlp)
    engine.part_plan = PartPlan(chosen.attention, chosen.mlp, chosen.gates)
    try:
        return run_dense(engine, index, inner, call) if chosen.attention is None else call.run(inner)
    finally:
        engine.part_plan = None


def run_attention_part(engine: Engine, index: int, inner, args: tuple, kwargs: dict):
    """An attention module's forward: (update (B, T, D), None)."""
    plan = engine.part_plan
    if plan is None or plan.attention is None:
        return inner(*args, **kwargs)
    call = Call(engine.sites[index].part, args, kwargs)
    if engine.running.masked:
        output = run_all_rows(engine, index, inner, call, plan.attention.keep, plan.gates[0])
        base = engine.skipped(call.hidden, index, "attention")
        return engine.pruner.gates.blend(output[0], base, plan.attention.keep, plan.gates[0]), None
    output = run_rows(engine, index, inner, call, plan.attention)
    computed = None if output is None else output[0]
    return scattered(engine, index, "attention", call.hidden, plan.attention, computed), None


def run_mlp_entry(engine: Engine, index: int, inner, args: tuple, kwargs: dict) -> Tensor:
    """The forward of the module through which tokens enter the feed-forward part: the kept rows alone go in."""
    plan = engine.part_plan
    if plan is None or plan.mlp is None:
        return inner(*args, **kwargs)
    entry, leave = engine.sites[index].mlp
    hidden, *rest = args
    by_row = hidden.reshape(*engine.running.real.shape, -1)
    plan.mlp_hidden = by_row
    rows = by_row if engine.running.masked else plan.mlp.take(by_row)
    output = inner(rows.flatten(0, 1) if hidden.dim() == 2 else rows, *rest, **kwargs)
    return _leave(engine, index, output) if leave is entry else output


def run_mlp_exit(engine: Engine, index: int, inner, args: tuple, kwargs: dict) -> Tensor:
    """The forward of the module through which tokens leave it, where that is another one: (B T, D) or (B, T, D)."""
    output = inner(*args, **kwargs)
    plan = engine.part_plan
    return output if plan is None or plan.mlp is None else _leave(engine, index, output)


def _leave(engine: Engine, index: int, output: Tensor) -> Tensor:
    """The update of every token, what `skip` says (zero: the identity) for those that did not enter."""
    plan, hidden = engine.part_plan, engine.part_plan.mlp_hidden
    rows = output.reshape(len(hidden), -1, hidden.shape[-1])
    if engine.running.masked:
        whole = engine.pruner.gates.blend(rows, engine.skipped(hidden, index, "mlp"), plan.mlp.keep, plan.gates[1])
    else:
        whole = scattered(engine, index, "mlp", hidden, plan.mlp, rows)
    return whole.flatten(0, 1) if output.dim() == 2 else whole
