"""Attention and MLP of a block entered by different tokens: each part runs on its own, or on all.

The block's own forward runs, on all tokens; the wrapped parts take their kept tokens out and put the updates back.

Shapes: B rows, T new tokens, K kept tokens of the fullest row, D hidden size.
"""

from __future__ import annotations

from torch import Tensor

from ftp_lightning.pruning.block_run import BlockRun
from ftp_lightning.pruning.kept import Call
from ftp_lightning.pruning.training_run import run_with_gates


def run_attention(run: BlockRun, inner, args: tuple, kwargs: dict):
    """An attention module's forward: (update (B, T, D), None)."""
    decision = run.decision
    if decision is None or decision.attention is None:
        return inner(*args, **kwargs)
    call = Call.of(run.plan.site.attends, args, kwargs)
    if run.forward.training is not None:
        return run_with_gates(run, inner, call, "attention")
    output = run.run_kept(inner, call, decision.attention)
    return run.spread("attention", call.hidden, decision.attention, None if output is None else output[0]), None


def run_mlp_entry(run: BlockRun, inner, args: tuple, kwargs: dict) -> Tensor:
    """The forward of the module through which tokens enter the feed-forward part: the kept ones alone go in."""
    decision = run.decision
    if decision is None or decision.mlp is None:
        return inner(*args, **kwargs)
    entry, leave = run.plan.site.mlp or (None, None)
    hidden, *more = args
    run.mlp_hidden = by_row = hidden.reshape(*run.forward.real.shape, -1)
    kept = by_row if run.forward.training is not None else decision.mlp.take(by_row)
    output = inner(kept.flatten(0, 1) if hidden.dim() == 2 else kept, *more, **kwargs)
    return _leave(run, output) if leave is entry else output


def run_mlp_exit(run: BlockRun, inner, args: tuple, kwargs: dict) -> Tensor:
    """The forward of the module through which tokens leave it, where that is another one: (B T, D) or (B, T, D)."""
    output = inner(*args, **kwargs)
    return output if run.decision is None or run.decision.mlp is None else _leave(run, output)


def _leave(run: BlockRun, output: Tensor) -> Tensor:
    """The update of every token, what `skip` says (zero: the identity) for those that did not enter."""
    hidden = run.mlp_hidden
    assert hidden is not None and run.decision is not None and run.decision.mlp is not None  # they entered
    kept, gate = run.decision.mlp, run.decision.gates[1]
    computed = output.reshape(len(hidden), -1, hidden.shape[-1])
    if (training := run.forward.training) is not None:
        whole = training.gates.blend(computed, run.skipped(hidden, "mlp"), kept.keep, gate)
    else:
        whole = run.spread("mlp", hidden, kept, computed)
    return whole.flatten(0, 1) if output.dim() == 2 else whole
