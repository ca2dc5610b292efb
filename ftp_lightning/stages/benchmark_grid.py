"""The grid that `benchmark` measures: which pruners, on which prompts, and a row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ftp_lightning.evaluation.block_clock import BlockClock
from ftp_lightning.evaluation.prompts import positions, random_prompts
from ftp_lightning.evaluation.speed import decode_positions
from ftp_lightning.evaluation.speed_cell import Bench
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import ROUTERS, Router
from ftp_lightning.schedule import Schedule
from ftp_lightning.stages.benchmark import LENGTHS, BenchmarkStage
from ftp_lightning.stages.inputs import check_positions, chosen_pruner, num_blocks, token_budget
from ftp_lightning.stages.option import check_reachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Size = tuple[int, int]
"""(length, batch)."""


def pruners(settings: BenchmarkStage, model: PreTrainedModel) -> list[TokenPruner]:
    """One pruner per budget and kv mode."""
    base = chosen_pruner(settings, model)
    router = base.router if settings.pruned else untrained_router(settings.router, settings.seed)
    changes = {} if settings.attention == "auto" else {"attention": settings.attention}
    kvs: list[Any] = list(dict.fromkeys(settings.modes)) or [base.kv]
    if not settings.budgets and settings.budget_kind == "tokens":
        return [base.changed(router=router, kv=kv, **changes) for kv in kvs]
    budgets = dict.fromkeys(settings.budgets or (settings.budget,))
    return [
        base.changed(router=router, schedule=_uniform(settings, model, budget, kv, base.skip_rank), kv=kv, **changes)
        for budget in budgets
        for kv in kvs
    ]


def _uniform(
    settings: BenchmarkStage, model: PreTrainedModel, budget: float | None, kv: str | Sequence[str], rank: int
) -> Schedule:
    return Schedule.uniform(num_blocks(model), token_budget(settings, model, kv, budget, rank) or 0.0)


def untrained_router(name: str, seed: int) -> Router:
    """A router that needs no training; the dynamic one, also called "auto", with seeded random weights."""
    kind = ROUTERS["dynamic" if name == "auto" else name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(seed=seed) if name == "random" else kind()


def sizes(settings: BenchmarkStage, model: PreTrainedModel) -> list[Size]:
    """The prompts of the grid, batch by batch."""
    lengths = dict.fromkeys(settings.lengths or usual_lengths(model, decoded(settings)))
    return [(length, batch) for batch in dict.fromkeys(settings.batches) for length in lengths]


def usual_lengths(model: PreTrainedModel, reserve: int) -> tuple[int, ...]:
    """The default lengths that fit the model's positions but `reserve`; where none does, all of these."""
    limit = (positions(model) or LENGTHS[-1] + reserve) - reserve
    return tuple(length for length in LENGTHS if length <= limit) or (limit,)


def decoded(settings: BenchmarkStage) -> int:
    """Positions that decoding takes behind the prompt."""
    return decode_positions(settings.decode_tokens) if settings.decode_tokens else 0


def check_model(settings: BenchmarkStage, model: PreTrainedModel, found: Sequence[TokenPruner], grid: Sequence[Size]):
    """UserError before anything is timed: lengths beyond the model, budgets that the shortest row cannot meet."""
    longest, shortest = max(grid)[0], settings.shortest(min(grid)[0])
    what = "prompts and decoding" if settings.decode_tokens else "prompts"
    check_positions(model.config, longest + decoded(settings), what, "Give shorter --lengths.")
    for pruner in found:
        check_reachable(pruner.scheduled.budget, shortest)


def measure(
    bench: Bench,
    grid_pruners: Sequence[TokenPruner],
    size: Size,
    mixed: bool,
    found: dict[str, list],
    step: Callable[[float], None],
) -> None:
    """All pruners on the same prompts: a row each into `found`; what does not fit the device's memory is left out.

    `step` is told the share that is done.
    """
    length, batch = size
    prompts = random_prompts(bench.model, length, batch, mixed, generator=bench.generator)
    clock = BlockClock(bench.model, prompts)
    for number, pruner in enumerate(grid_pruners):
        step(number / len(grid_pruners))
        about = {"length": length, "batch": batch, "kv": kv_name(pruner), "budget": pruner.scheduled.budget}
        try:
            row = bench.cell(pruner, prompts, clock)
        except torch.OutOfMemoryError:
            found["left_out"].append(about | {"reason": "out of memory"})
        else:
            found["rows"].append(about | row | how(pruner, prompts.mask is not None) | machine(bench.model))


def kv_name(pruner: TokenPruner) -> str:
    """The kv mode of all blocks, or "mixed"."""
    return pruner.kv[0] if len(set(pruner.kv)) == 1 else "mixed"


def how(pruner: TokenPruner, mixed: bool) -> dict[str, Any]:
    """What else was asked for; routers by their names on the command line."""
    router = next((name for name, kind in ROUTERS.items() if type(pruner.router) is kind), type(pruner.router).__name__)
    return {"mixed": mixed, "router": router, "attention": pruner.attention}


def machine(model: PreTrainedModel) -> dict[str, Any]:
    """What it was measured on."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
