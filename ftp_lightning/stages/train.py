"""Stage `train`: teach the router which tokens a block needs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.cli.attention import AttentionSettings
from ftp_lightning.cli.kv import AUTO, kv_option
from ftp_lightning.cli.option import check_reachable, option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import RowsSettings, StageSettings, picked
from ftp_lightning.device_map import NONE
from ftp_lightning.errors import UserError
from ftp_lightning.schedule_family import holds_family

if TYPE_CHECKING:
    import torch

    from ftp_lightning.data.rows import Rows
    from ftp_lightning.processes import Processes
    from ftp_lightning.pruning import TokenPruner
    from ftp_lightning.routing import Router
    from ftp_lightning.schedule import Schedule
    from ftp_lightning.schedule_family import ScheduleFamily

RouterName = Literal[
    "dynamic", "local", "recurrent", "hidden", "hidden+factors", "one_pass", "projected", "projected_once",
    "static", "untrained",
]  # fmt: skip
UNTRAINED = ("static", "untrained")


@dataclass(frozen=True, kw_only=True)
class TrainStage(AttentionSettings, RowsSettings, StageSettings):
    """Train the router under a schedule, and what skipped tokens get (--skip, --distil_epochs), the model frozen.
    Writes pruned/ (router, schedule, settings, compensation).

    Stopped by SIGTERM or SIGUSR1 it saves and leaves; after any interruption the same command goes on.
    """

    stage: ClassVar[str] = "train"
    default_split: ClassVar[str] = "training"

    pruned: str | None = option(None, "folder of a pruner to continue from: router, schedule, settings", is_file=True)
    schedule: str | None = option(None, "schedule.json to train under", is_file=True)
    budget: float | None = option(
        None, "budget of the default schedule, where no --schedule is given", least=0.0, below=1.0
    )
    dense: int | None = option(None, "train under a uniform schedule behind so many dense blocks", least=0)
    budgets: tuple[float, ...] = option(
        (), "LOW,HIGH: every forward draws a budget between them; needs a schedules.json by --schedule"
    )
    kv: str = kv_option(
        AUTO, "keys and values of skipped tokens; auto is the mode that the schedule was found for, or keep", AUTO
    )
    router: RouterName = option(
        "dynamic", "which router; `dynamic` is the global one of 450 parameters; static and untrained are not trained"
    )
    width: int | None = option(
        None, "units of the router's hidden layer; default: the router's own", least=1, most=4096
    )
    factors: tuple[str, ...] = option((), "factors that the router sees; default: all it knows")
    choice: Literal["topk", "threshold"] = option("topk", "exactly the scheduled tokens, or those with p above 0.5")
    steps: int = option(200, "optimiser steps", least=1, most=10**8)
    batch_size: int = option(4, "rows per forward", least=1, most=10**6)
    accumulate: int = option(1, "forwards per step", least=1, most=10**6)
    learning_rate: float = option(1e-2, "learning rate of Adam, which decays linearly", above=0.0, most=10.0)
    lambda_d: float = option(20.0, "weight of the distillation loss", least=0.0)
    lambda_s: float = option(1.0, "weight of the sparsity loss", least=0.0)
    lambda_g: float = option(1.0, "first weight of the guide loss", least=0.0)
    distillation: Literal["mse", "kl", "both"] = option(
        "mse", "distil the last hidden state, the logits, or both added"
    )
    sparsity_loss: Literal["one-sided", "symmetric"] = option("one-sided", "symmetric penalises over-pruning, too")
    guide: Literal["static", "future"] = option(
        "static", "what the guide loss teaches: the static router's decisions, or what the continuation attends to"
    )
    guide_share: float = option(0.25, "share of the steps over which the guide loss decays to 0", least=0.0, most=1.0)
    guide_decay: Literal["linear", "cosine", "constant"] = option("linear", "how the guide loss decays")
    guide_balanced: bool = option(False, "give tokens to compute and tokens to skip equal weight in the guide loss")
    gates: Literal["straight-through", "gumbel", "soft"] = option("straight-through", "how decisions get a gradient")
    key_gates: bool = option(
        False, "under evict, gradients also tell what other tokens lose without a token's key and value"
    )
    temperature: tuple[float, ...] = option((1.0, 0.3), "temperature of gumbel gates: at the first step, at the last")
    scope: Literal["prompt", "sequence"] = option("prompt", "what is routed: the prompt, or the whole text (paper)")
    random_prompt: bool = option(False, "every forward draws its prompt's length, from a quarter to three quarters")
    recompute: bool = option(False, "activation checkpointing: less memory, more time", passive=True)
    recall_share: float = option(0.5, "share of the windows that hold facts to recall", least=0.0, most=1.0)
    skip: Literal["identity", "mean", "low-rank"] = option(
        "identity", "what a skipped token gets: nothing, the block's mean update, or a fitted linear map of its state"
    )
    skip_rank: int = option(8, "rank of that map, with --skip low-rank", least=1, most=65_536)
    skip_windows: int = option(
        64, "rows of training text that the mean update or the map is fitted on", least=1, most=10**7
    )
    distil_epochs: int = option(
        0,
        "epochs in which the mean update or the map is then trained on the KL of the continuation; 0: none",
        least=0,
    )
    distil_windows: int = option(240, "rows of training text for these epochs", least=1)
    distil_learning_rate: float = option(0.004, "learning rate of these epochs, in units of a typical entry", above=0.0)
    validations: int = option(5, "validations during the training at most, the last step included", least=1, most=10**6)
    validation_windows: int = option(16, "rows that the router is validated on, at most", least=1, most=10**7)
    patience: int | None = option(None, "validations without a lower KL after which to stop", least=1)
    processes: int = option(1, "processes that each take a share of the batches, on this machine", least=1, most=1024)
    shard: bool = option(False, "every process holds a share of the model's blocks (FSDP)", passive=True)

    def check(self) -> None:
        super().check()
        if self.shard and self.device_map != NONE:
            raise UserError("--shard cannot be combined with --device_map: both place the blocks\nRemove one of them.")
        if self.pruned:
            self._check_pruned()
        if self.schedule and self.budget is not None and not holds_family(self.schedule):
            raise UserError(
                "--budget cannot be combined with --schedule: the schedule has its own budget\nRemove one of them."
            )
        if self.dense is not None and (self.schedule or self.pruned):
            raise UserError("--dense makes a uniform schedule, and --schedule gives another one\nRemove one of them.")
        check_reachable(self.budget or 0.0, self.prompt_tokens)
        if self.budgets:
            self._check_budgets()
        if self.distil_epochs and self.skip == "identity" and not self.pruned:
            raise UserError(
                "--distil_epochs trains what skipped tokens get, and here they get nothing\nAdd --skip low-rank."
            )
        if self.distil_epochs and (self.processes > 1 or self.budgets):
            raise UserError("--distil_epochs needs one process and one schedule\nLeave --processes and --budgets out.")
        self.check_trains()
        if self.rows != "windows" and self.random_prompt:
            raise UserError(f"rows are {self.rows}, which have lengths of their own\nLeave --random_prompt out.")

    def check_trains(self) -> None:
        """UserError where there is nothing to train."""
        if self.router in UNTRAINED and not (self.distil_epochs or self.skip != "identity" or self.pruned):
            raise UserError(f"a {self.router} router has nothing to train\nGive another --router, or --skip low-rank.")

    def _check_pruned(self) -> None:
        """UserError where something is asked of the router or pruner that the folder says already."""
        names = ("budget", "kv", "router", "width", "factors", "choice", *self.attention_flags(), "skip", "skip_rank")
        given = [name for name in names if getattr(self, name) != getattr(TrainStage, name)]
        if given:
            name = given[0]
            raise UserError(f"--{name} cannot be combined with --pruned: the pruner has its own\nRemove one of them.")

    @staticmethod
    def _check_weights(pruned: str) -> None:
        """UserError where the router of a stored pruner has none."""
        from ftp_lightning.disk.ready import load_pruner

        router = load_pruner(pruned).router
        if not router.parameter_count:
            raise UserError(
                f"a {type(router).__name__} has nothing to train\nGive a --pruned whose router has weights."
            )

    def _check_budgets(self) -> None:
        if len(self.budgets) != 2 or not 0 < self.budgets[0] < self.budgets[1] < 1:
            raise UserError(f"budgets are {list(self.budgets)}, must be the lowest and the highest, in (0, 1)")
        if not (self.schedule and holds_family(self.schedule)):
            raise UserError("budgets are drawn from a family of schedules\nGive its schedules.json by --schedule.")
        check_reachable(self.budgets[1], self.prompt_tokens)

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.models import resolve_device
        from ftp_lightning.processes import run_in

        if self.pruned and not self.distil_epochs:
            self._check_weights(self.pruned)
        device = resolve_device(self.device)
        folder.adopt(run_in(self.processes, device, carry_out, self, folder, progress.place()))


def carry_out(
    processes: Processes, device: torch.device, settings: TrainStage, folder: StageFolder, timing: dict[str, Any]
) -> list[str]:
    """Train, the same in every process; the first logs and writes. Returns the names of the files written.

    timing: `Progress.place`.
    """
    from ftp_lightning.stages.inputs import load_model
    from ftp_lightning.stages.routed_story import pruner_images
    from ftp_lightning.tracking import log_outcome, logging_to

    model, tokenizer = _sharded(settings, processes, device) if settings.shard else load_model(settings, device)
    family, (rows, held_out) = _family(settings), _rows(settings, model, tokenizer)
    pruner = new_pruner(settings, model, tokenizer, family)
    place, first, progress = folder.place("checkpoints").parent, processes.rank == 0, Progress(**timing)

    def tell(step: int, steps: int) -> None:
        if first:
            progress.step(step, steps, f"step {step} of {steps}")

    logging = logging_to(settings.tracking, folder.place("logs").parent, settings.config(), "train") if first else None
    with logging or nullcontext() as logger:
        if pruner.router.parameter_count:
            found = _trained(
                settings, (model, pruner, family), (rows, held_out), place, logger, tell, folder, processes
            )
        else:
            found = {"parameters": 0, "steps": [], "validation_kl": [], "best_validation_kl": None}
            found |= {"realised_sparsity": list(pruner.scheduled.sparsity)}
        if settings.distil_epochs:
            pruner, found["distillation"] = _distilled(settings, model, tokenizer, pruner, held_out, folder, progress)
        if first:
            pruner.save(folder.place("pruned"), base=settings.model, model=model)
            images = {}  # a sharded model's forward needs all processes
            if not settings.shard:
                images = pruner_images(settings, model, tokenizer, pruner, found["realised_sparsity"])
            log_outcome(logger, images=images, pruned=folder.path / "pruned")
    if first:
        folder.write_json("metrics.json", found | {"rows_hash": rows.hash()} | rows.counts())
        last = found["distillation"]["validation_kl"] if settings.distil_epochs else found["best_validation_kl"]
        kl = "" if last is None else f", validation KL {last:.3g}"
        progress.done(f"{found['parameters']} parameters{kl}")
    return folder.files


def _trained(settings, about, text, place, logger, tell, folder, processes) -> dict[str, Any]:
    """Train the router in place; the stage's metrics. about: model, pruner, family. text: rows, and those held out."""
    from ftp_lightning.data.module import RowsData
    from ftp_lightning.lit.fitting import fit
    from ftp_lightning.lit.router_training import RouterTraining
    from ftp_lightning.lit.training_settings import TrainingSettings

    (model, pruner, family), (rows, held_out) = about, text
    lowest, highest = settings.budgets or (0.0, 0.0)
    system = RouterTraining(model, pruner, picked(TrainingSettings, settings), family, (lowest, highest))
    data = RowsData(rows, held_out, settings.batch_size, settings.seed, _random_prompt(settings))
    return fit(system, data, place, logger, tell, folder.fingerprint, processes)


def _distilled(
    settings: TrainStage,
    model: Any,
    tokenizer: Any,
    pruner: TokenPruner,
    held_out: Rows,
    folder: StageFolder,
    progress: Progress,
) -> tuple[TokenPruner, dict[str, Any]]:
    """The pruner with its compensation distilled, and how that went."""
    from ftp_lightning.lit.distillation import Distillation, DistillationSettings, fit_distillation
    from ftp_lightning.lit.lessons import lessons
    from ftp_lightning.stages.inputs import measured_rows

    rows = measured_rows(settings, model, tokenizer, settings.distil_windows, settings.recall_share)
    about = DistillationSettings(settings.distil_epochs, settings.distil_learning_rate, seed=settings.seed)
    system = Distillation(model, pruner, lessons(model, pruner, rows), lessons(model, pruner, held_out), about)
    found = fit_distillation(
        system, folder.place("checkpoints"),
        lambda epoch, epochs: progress.step(epoch, epochs, f"distillation, epoch {epoch} of {epochs}"),
        folder.fingerprint,
    )  # fmt: skip
    told = {"rows": len(rows), "epochs": system.history, "validation_kl": system.best[0]}
    whole = pruner.compensation
    assert whole is not None
    return pruner.changed(compensation=whole.with_maps(pruner.scheduled, found)), told


def _sharded(settings: TrainStage, processes: Processes, device: torch.device) -> tuple[Any, Any]:
    """The model of which this process holds its share, and the tokenizer."""
    import torch

    from ftp_lightning.sharding import shard
    from ftp_lightning.stages.inputs import load_model

    if processes.count == 1:
        raise UserError("--shard needs more than one process\nGive --processes, or a launcher.")
    model, tokenizer = load_model(settings, torch.device("cpu"))
    return shard(model, processes, device), tokenizer


def new_pruner(settings: TrainStage, model: Any, tokenizer: Any, family: ScheduleFamily | None = None) -> TokenPruner:
    """The untrained router under the schedule, and what a skipped token gets; mean or map are fitted here, before the
    router is trained with them. With --pruned the one that is there."""
    from ftp_lightning.stages import inputs
    from ftp_lightning.stages.inputs import load_pruner, load_schedule, measured_rows
    from ftp_lightning.training.compensation import fit_compensation

    if settings.pruned:
        loaded = load_pruner(settings.pruned, model)
        if family is not None:
            return loaded.with_schedule(family.at(sum(settings.budgets) / 2))
        return loaded.with_schedule(load_schedule(settings.schedule, model)) if settings.schedule else loaded
    budget = sum(settings.budgets) / 2 if family is not None and settings.budget is None else settings.budget
    about: dict[str, Any] = {"choice": settings.choice, "skip": settings.skip}
    score = settings.attention_score()
    if isinstance(plain := score.said(), str):
        about |= {"attention": plain, "window": settings.window}
    else:
        about["attention"] = score
    if settings.skip != "identity":
        rows = measured_rows(settings, model, tokenizer, settings.skip_windows, settings.recall_share)
        rank = settings.skip_rank if settings.skip == "low-rank" else 0
        about["compensation"] = fit_compensation(model, rows, rank, batch_size=settings.batch_size)
    schedule = _first_schedule(settings, budget, model)
    return inputs.new_pruner(new_router(settings, model), schedule, settings.kv, **about)


def _first_schedule(settings: TrainStage, budget: float | None, model: Any) -> Schedule:
    """The one that is given, else the default. With --dense it is uniform behind the dense blocks.

    UserError where these leave no room for the budget.
    """
    from ftp_lightning.search.allocations import step
    from ftp_lightning.stages.inputs import num_blocks, schedule_or_default

    schedule, blocks = schedule_or_default(settings.schedule, budget, model, settings.kv), num_blocks(model)
    if settings.dense is None:
        return schedule
    if settings.dense >= blocks or schedule.budget * blocks > blocks - settings.dense:
        raise UserError(
            f"{settings.dense} dense blocks of {blocks} leave no room for a budget of {schedule.budget:g}\n"
            "Give a lower --dense or --budget."
        )
    return step(blocks, schedule.budget, settings.dense)


def new_router(settings: TrainStage, model: Any) -> Router:
    """The router with weights drawn from the seed; the global random state is left as it was."""
    import torch

    from ftp_lightning.routing import make_router
    from ftp_lightning.stages.inputs import num_blocks

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
    from ftp_lightning.schedule_family import ScheduleFamily

    if not settings.budgets:
        return None
    family = ScheduleFamily.load(str(settings.schedule))
    family.at(settings.budgets[1])
    return family


def _rows(settings: TrainStage, model: Any, tokenizer: Any) -> tuple[Rows, Rows]:
    """What the router is trained on, and what it is measured on."""
    from ftp_lightning.stages.inputs import measured_rows

    total = settings.steps * settings.accumulate * settings.batch_size * settings.processes
    about = (settings, model, tokenizer)
    train = measured_rows(*about, total, settings.recall_share)
    return train, measured_rows(*about, settings.validation_windows, settings.recall_share, "validation")


def _random_prompt(settings: TrainStage) -> tuple[int, int] | None:
    whole = settings.prompt_tokens + settings.continuation_tokens
    return (max(4, whole // 4), 3 * whole // 4) if settings.random_prompt else None
