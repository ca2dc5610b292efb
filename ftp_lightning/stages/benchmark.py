"""Stage `benchmark`: time and memory of the pruned model against the same stock model, cell by cell of a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.cli.option import check_reachable, option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import PrunedSettings
from ftp_lightning.errors import UserError
from ftp_lightning.schedule import kv_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftp_lightning.evaluation.speed.cell import Bench
    from ftp_lightning.pruning import TokenPruner
    from ftp_lightning.routing import Router
    from ftp_lightning.schedule import Schedule

LENGTHS = (512, 1024, 2048)
"""Prompt lengths by default, of these the ones that the model takes: at a few hundred tokens a small model's time is
mostly overhead."""

KV = ("evict", "keep")


@dataclass(frozen=True, kw_only=True)
class BenchmarkStage(PrunedSettings):
    """Time prefill and decoding, weigh them, dense and pruned in turn, beside what FLOPs and shapes allow."""

    stage: ClassVar[str] = "benchmark"
    spreads: ClassVar[bool] = False

    lengths: tuple[int, ...] = option((), "prompt lengths; by default 512, 1024, 2048 as far as the model goes")
    batches: tuple[int, ...] = option((1,), "prompts per forward")
    budgets: tuple[float, ...] = option((), "uniform schedules of these budgets, in place of --budget")
    modes: tuple[str, ...] = option((), "kv modes to compare, evict and keep, in place of --kv")
    router: Literal["auto", "static", "random", "dynamic"] = option(
        "auto", "router; auto takes that of --pruned, else dynamic with random weights. Its time counts"
    )
    attention: Literal["auto", "window", "exact"] = option(
        "auto", "queries that scores are averaged over; auto takes those of --pruned, else window"
    )
    pairs: int = option(15, "pairs of a dense and a pruned prefill", least=2, most=10_000)
    decode_tokens: int = option(0, "greedy steps of decoding to time after the prefill; 0 is none", least=0)
    mixed: bool = option(False, "make batches of rows from a quarter of the length up to it, padded on the left")

    def check(self) -> None:
        super().check()
        self._check_grid()
        self._check_beside()
        for budget in (self.budgets or (self.budget or 0.0,)) if self.budget_kind == "tokens" else ():
            check_reachable(budget, self.shortest(min(self.lengths or LENGTHS)))

    def shortest(self, length: int) -> int:
        """Tokens of the shortest row of any batch."""
        return -(-length // 4) if self.mixed else length

    def _check_grid(self) -> None:
        least = 16 if self.mixed else 4
        if min(self.lengths or LENGTHS) < least or not self.batches or min(self.batches) < 1:
            raise UserError(
                f"lengths {self.lengths} must be >= {least}, batches {self.batches} >= 1\n"
                "Change --lengths or --batches."
            )
        if self.mixed and max(self.batches) == 1:
            raise UserError("mixed lengths need more than one prompt per forward\nGive larger --batches.")
        if self.decode_tokens == 1:
            raise UserError("decode_tokens is 1, one step has no interval\nGive 0 or at least 2.")
        if any(not 0.0 <= budget < 1.0 for budget in self.budgets):
            raise UserError(f"budgets are {self.budgets}, each must be in [0, 1)\nChange --budgets.")
        if unknown := [mode for mode in self.modes if mode not in KV]:
            raise UserError(f"modes: there is no {unknown[0]!r}\nChoose among {', '.join(KV)}.")

    def _check_beside(self) -> None:
        """UserError for two flags that say the same thing."""
        single = [name for name in ("budget", "schedule", "pruned") if getattr(self, name) is not None]
        if self.budgets and single:
            raise UserError(
                f"--budgets cannot be combined with --{single[0]}, which sets a budget\nRemove one of them."
            )
        if self.modes and self.kv != "auto":
            raise UserError("--modes cannot be combined with --kv\nRemove one of them.")
        if self.pruned and self.router != "auto":
            raise UserError(
                "--router cannot be combined with --pruned: the pruner has its own router\nRemove one of them."
            )

    def work(self, folder: StageFolder, progress: Progress) -> None:
        import torch

        from ftp_lightning.evaluation.speed.cell import Bench
        from ftp_lightning.stages.inputs import load_model

        model, _ = load_model(self)
        methods, grid = pruners(self, model), sizes(self, model)
        check_model(self, model, methods, grid)
        found = folder.load_state() or {"rows": [], "left_out": [], "notes": []}
        generator = torch.Generator().manual_seed(self.seed)
        bench = Bench(model, self.pairs, self.decode_tokens, generator, found["notes"])
        for done, size in enumerate(grid):
            if any((row["length"], row["batch"]) == size for row in found["rows"] + found["left_out"]):
                continue  # an interrupted run has measured it
            about = partial(_step, progress, done, len(grid), f"{size[1]} x {size[0]} tokens")
            measure(bench, methods, size, self.mixed, found, about)
            folder.save_state(found)
        self._write(folder, progress, found)

    def _write(self, folder: StageFolder, progress: Progress, found: dict[str, list]) -> None:
        from ftp_lightning.report.benchmark import write_benchmark

        for left in found["left_out"]:
            progress.say(f"left out {left['batch']} x {left['length']} tokens, kv {left['kv']}: {left['reason']}")
        for note in found["notes"]:
            progress.say(note)
        rows = found["rows"]
        if not rows:
            raise UserError("no prompt fits the device's memory\nGive shorter --lengths or smaller --batches.")
        folder.write_json("benchmark.json", found)
        write_benchmark(rows, folder.place)
        folder.write_json("metrics.json", {"speedup": {_name(row): row["speedup"] for row in rows}})
        self._track(folder, rows)
        last = rows[-1]
        progress.done(
            f"{last['speedup']:.2f}x as fast at {last['length']} tokens (FLOPs allow {last['flops_limit']:.2f}x)"
        )

    def _track(self, folder: StageFolder, rows: list[dict[str, Any]]) -> None:
        """The cells as a table, their speed-ups as numbers. The CSV of a logger would say nothing new."""
        from ftp_lightning.tracking import log_outcome, logging_to

        if self.tracking == "csv":
            return
        numbers = {f"speedup/{_name(row)}": row["speedup"] for row in rows}
        with logging_to(self.tracking, folder.place("logs").parent, self.config(), self.stage) as logger:
            log_outcome(logger, numbers=numbers, tables={"cells": rows})


def _step(progress: Progress, done: int, total: int, what: str, part: float) -> None:
    """`part` of the size after the first `done` of `total` is measured."""
    progress.step(done + part, total, what)


def _name(row: dict[str, Any]) -> str:
    """How metrics.json names a cell."""
    return f"{row['batch']}x{row['length']} {row['kv']} {row['budget']:.4g}"


Size = tuple[int, int]
"""(length, batch)."""


def pruners(settings: BenchmarkStage, model: PreTrainedModel) -> list[TokenPruner]:
    """One pruner per budget and kv mode."""
    from ftp_lightning.stages.inputs import chosen_pruner

    bases = [in_one_mode(settings, model, kv) for kv in dict.fromkeys(settings.modes)]
    bases = bases or [chosen_pruner(settings, model)]
    base = bases[0]
    router = base.router if settings.pruned else untrained_router(settings.router, settings.seed)
    changes = {} if settings.attention == "auto" else {"attention": settings.attention}
    if not settings.budgets:
        return [base.changed(router=router, **changes) for base in bases]
    return [
        base.changed(router=router, schedule=_uniform(settings, model, budget, base), **changes)
        for budget in dict.fromkeys(settings.budgets)
        for base in bases
    ]


def in_one_mode(settings: BenchmarkStage, model: PreTrainedModel, kv: str) -> TokenPruner:
    """The pruner asked for in one of --modes: a schedule found for another mode is timed in this one too."""
    from ftp_lightning.stages.inputs import chosen_pruner

    own = replace(settings, modes=())
    if settings.pruned or settings.schedule:
        return chosen_pruner(own, model).changed(kv=kv)
    return chosen_pruner(replace(own, kv=kv), model)


def _uniform(settings: BenchmarkStage, model: PreTrainedModel, budget: float, base: TokenPruner) -> Schedule:
    """The uniform schedule of one of --budgets, in the kv mode of `base`."""
    from ftp_lightning.schedule import Schedule
    from ftp_lightning.stages.inputs import num_blocks, token_budget

    rank = base.rank_under(Schedule.uniform(num_blocks(model), budget))
    tokens = token_budget(settings, model, base.kv, budget, rank) or 0.0
    return Schedule.uniform(num_blocks(model), tokens).under(base.kv)


def untrained_router(name: str, seed: int) -> Router:
    """A router that needs no training; the dynamic one, also called "auto", with seeded random weights."""
    import torch

    from ftp_lightning.routing import ROUTERS

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
    from ftp_lightning.evaluation.speed.prompts import positions

    limit = (positions(model) or LENGTHS[-1] + reserve) - reserve
    return tuple(length for length in LENGTHS if length <= limit) or (limit,)


def decoded(settings: BenchmarkStage) -> int:
    """Positions that decoding takes behind the prompt."""
    from ftp_lightning.evaluation.speed.prefill import decode_positions

    return decode_positions(settings.decode_tokens) if settings.decode_tokens else 0


def check_model(settings: BenchmarkStage, model: PreTrainedModel, found: Sequence[TokenPruner], grid: Sequence[Size]):
    """UserError before anything is timed: lengths beyond the model, budgets that the shortest row cannot meet."""
    from ftp_lightning.stages.inputs import check_positions

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
    import torch

    from ftp_lightning.evaluation.speed.block_clock import BlockClock
    from ftp_lightning.evaluation.speed.prompts import random_prompts

    length, batch = size
    prompts = random_prompts(bench.model, length, batch, mixed, generator=bench.generator)
    clock = BlockClock(bench.model, prompts)
    for number, pruner in enumerate(grid_pruners):
        step(number / len(grid_pruners))
        about = {"length": length, "batch": batch, "kv": kv_name(pruner.kv), "budget": pruner.scheduled.budget}
        try:
            row = bench.cell(pruner, prompts, clock)
        except torch.OutOfMemoryError:
            found["left_out"].append(about | {"reason": "out of memory"})
        else:
            found["rows"].append(about | row | how(pruner, prompts.mask is not None) | machine(bench.model))


def how(pruner: TokenPruner, mixed: bool) -> dict[str, Any]:
    """What else was asked for; routers by their names on the command line."""
    from ftp_lightning.routing import ROUTERS

    router = next((name for name, kind in ROUTERS.items() if type(pruner.router) is kind), type(pruner.router).__name__)
    return {"mixed": mixed, "router": router, "attention": str(pruner.attention)}


def machine(model: PreTrainedModel) -> dict[str, Any]:
    """What it was measured on."""
    import torch

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
