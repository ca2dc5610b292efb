"""What one process of a training does: read the inputs, train, and, if it is the first, write what was learnt."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from ftp_lightning.artifact import StageFolder
from ftp_lightning.data.examples import load_examples
from ftp_lightning.data.module import WindowsData
from ftp_lightning.errors import UserError
from ftp_lightning.lit.fitting import fit
from ftp_lightning.lit.router_training import RouterTraining
from ftp_lightning.lit.training_settings import TrainingSettings
from ftp_lightning.processes import Processes
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.compensation import fit_compensation
from ftp_lightning.routing import Router, make_router
from ftp_lightning.schedule import Schedule
from ftp_lightning.schedule_family import ScheduleFamily
from ftp_lightning.search.allocations import step
from ftp_lightning.stages.base import picked
from ftp_lightning.stages.inputs import (
    load_model,
    load_pruner,
    load_schedule,
    mixed_windows,
    num_blocks,
    schedule_or_uniform,
)
from ftp_lightning.stages.progress import Progress
from ftp_lightning.stages.showcase import pruner_images
from ftp_lightning.stages.train import TrainStage
from ftp_lightning.tracking import log_outcome, logging_to


def carry_out(
    processes: Processes, device: torch.device, settings: TrainStage, folder: StageFolder, timing: dict[str, Any]
) -> list[str]:
    """Train, the same in every process; the first logs and writes. Returns the names of the files written.

    timing: `Progress.place`.
    """
    model, tokenizer = _sharded(settings, processes, device) if settings.shard else load_model(settings, device)
    family, rows, held_out = _family(settings), *_rows(settings, tokenizer)
    pruner = new_pruner(settings, model, tokenizer, family)
    lowest, highest = settings.budgets or (0.0, 0.0)
    system = RouterTraining(model, pruner, picked(TrainingSettings, settings), family, (lowest, highest))
    data = WindowsData(rows, held_out, settings.batch_size, settings.seed, _random_prompt(settings))
    place, first, progress = folder.place("checkpoints").parent, processes.rank == 0, Progress(**timing)

    def tell(step: int, steps: int) -> None:
        if first:
            progress.step(step, steps, f"step {step} of {steps}")

    logging = logging_to(settings.tracking, folder.place("logs").parent, settings.config(), "train") if first else None
    with logging or nullcontext() as logger:
        found = fit(system, data, place, logger, tell, folder.fingerprint, processes)
        if first:
            pruner.save(folder.place("pruned"), base=settings.model, model=model)
            images = {}  # a sharded model's forward needs all processes
            if not settings.shard:
                images = pruner_images(settings, model, tokenizer, pruner, found["realised_sparsity"])
            log_outcome(logger, images=images, pruned=folder.path / "pruned")
    if first:
        counts = rows.counts() if settings.rows == "examples" else {}
        folder.write_json("metrics.json", found | {"windows": rows.hash(), **counts})
        progress.done(f"{found['parameters']} parameters, validation KL {found['best_validation_kl']:.3g}")
    return folder.files


def _sharded(settings: TrainStage, processes: Processes, device: torch.device) -> tuple[Any, Any]:
    """The model of which this process holds its share, and the tokenizer."""
    from ftp_lightning.sharding import shard

    if processes.count == 1:
        raise UserError("shard is given to one process, which would hold all\nGive --processes, or a launcher.")
    model, tokenizer = load_model(settings, torch.device("cpu"))
    return shard(model, processes, device), tokenizer


def new_pruner(settings: TrainStage, model: Any, tokenizer: Any, family: ScheduleFamily | None = None) -> TokenPruner:
    """The untrained router under the schedule, and what a skipped token gets; mean or map are fitted here, before the
    router is trained with them. With --pruned the one that is there."""
    if settings.pruned:
        loaded = load_pruner(settings.pruned, model)
        if family is not None:
            return loaded.with_schedule(family.at(sum(settings.budgets) / 2))
        return loaded.with_schedule(load_schedule(settings.schedule, model)) if settings.schedule else loaded
    budget = sum(settings.budgets) / 2 if family is not None and settings.budget is None else settings.budget
    about = {name: getattr(settings, name) for name in ("kv", "choice", "attention", "window", "skip")}
    if settings.skip != "identity":
        windows = mixed_windows(settings, tokenizer, settings.skip_windows, settings.recall_share)
        rank = settings.skip_rank if settings.skip == "low-rank" else 0
        about["compensation"] = fit_compensation(model, windows, rank, batch_size=settings.batch_size)
    return TokenPruner(new_router(settings, model), _first_schedule(settings, budget, model), **about)


def _first_schedule(settings: TrainStage, budget: float | None, model: Any) -> Schedule:
    """The one that is given, or uniform behind the blocks that are to be dense; UserError where these leave none."""
    schedule, blocks = schedule_or_uniform(settings.schedule, budget, model), num_blocks(model)
    if not settings.dense:
        return schedule
    if settings.dense >= blocks or schedule.budget * blocks > blocks - settings.dense:
        raise UserError(
            f"{settings.dense} dense blocks of {blocks} leave no room for a budget of {schedule.budget:g}\n"
            "Give a lower --dense or --budget."
        )
    return step(blocks, schedule.budget, settings.dense)


def new_router(settings: TrainStage, model: Any) -> Router:
    """The router with weights drawn from the seed; the global random state is left as it was."""
    options = {"width": settings.width, "names": settings.factors or None}
    width = model.config.get_text_config().hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            return make_router(settings.router, num_blocks(model), width, **options)
        except ValueError as error:
            raise UserError(f"factors: {error}") from None


def _family(settings: TrainStage) -> ScheduleFamily | None:
    """The schedules that budgets are drawn from; UserError where it does not reach so far."""
    if not settings.budgets:
        return None
    family = ScheduleFamily.load(str(settings.schedule))
    family.at(settings.budgets[1])
    return family


def _rows(settings: TrainStage, tokenizer: Any) -> tuple[Any, Any]:
    """What the router is trained on, and what it is measured on."""
    total = settings.steps * settings.accumulate * settings.batch_size * settings.processes
    sizes = ((settings.chosen_split, total), ("validation", settings.validation_windows))
    if settings.rows == "windows":
        share = settings.recall_share
        train, held_out = (mixed_windows(settings, tokenizer, count, share, split) for split, count in sizes)
        return train, held_out
    limits = (tokenizer, settings.prompt_tokens, settings.continuation_tokens)
    first, other = (load_examples(settings.data, split, *limits).sample(n, settings.seed) for split, n in sizes)
    return first, other


def _random_prompt(settings: TrainStage) -> tuple[int, int] | None:
    whole = settings.prompt_tokens + settings.continuation_tokens
    return (max(4, whole // 4), 3 * whole // 4) if settings.random_prompt else None
