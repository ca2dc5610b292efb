"""What stages read: model, windows, schedules, pruners. Everything a user can get wrong here is told in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning import models
from ftp_lightning.cli.kv import AUTO, check_kv_blocks, given_modes
from ftp_lightning.cli.option import check_reachable
from ftp_lightning.cli.settings import BudgetSettings, ModelSettings, PrunedSettings, RowsSettings
from ftp_lightning.costs.budget import budget_with_cut, default_with_cut, solve_budget
from ftp_lightning.data.prompts import sampled_prompts
from ftp_lightning.data.rows import Rows
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.text import prompt_ids
from ftp_lightning.data.windows import calibration_windows
from ftp_lightning.disk import ready
from ftp_lightning.disk.pruned_folder import check_base
from ftp_lightning.errors import UserError
from ftp_lightning.json_file import finite_numbers, read_json
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.family import find_blocks
from ftp_lightning.routing import Router, StaticRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.schedule_family import LARGEST, ScheduleFamily, holds_family

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_BUDGET = 0.3
DEFAULT_KV = "keep"
"""The kv mode under a schedule that says none, where no flag says one."""


def load_model(
    settings: ModelSettings, device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The stage's model and tokenizer; UserError also where a window does not fit the model.

    device: another than the settings'.
    """
    check_pruner(settings)
    where = settings.device if device is None else str(device)
    place = {"dtype": settings.dtype, "device": where, "revision": settings.revision}
    place |= {"device_map": settings.device_map}
    model, tokenizer = _load(settings.model, **place, seed=settings.seed)
    check_positions(model.config, settings.prompt_tokens + settings.continuation_tokens)
    check_kv(settings, model.config)
    return model, tokenizer


def check_pruner(settings: ModelSettings) -> None:
    """UserError where --pruned or --schedule cannot be read: before a model is loaded, which takes longer."""
    pruned, schedule = (getattr(settings, name, None) for name in ("pruned", "schedule"))
    if isinstance(pruned, str):
        ready.load_pruner(pruned)
    if isinstance(schedule, str) and not holds_family(schedule):
        read_schedule(schedule)


def check_kv(settings: ModelSettings, config: Any) -> None:
    """UserError where --kv lists another number of blocks than the model of this configuration has."""
    check_kv_blocks(getattr(settings, "kv", AUTO), config.get_text_config().num_hidden_layers)


_models: dict[tuple, Any] | None = None
"""Inside `keeping_models`: the model that was loaded last."""


@contextmanager
def keeping_models() -> Iterator[None]:
    """Inside it stages that ask for the same model get one and the same, loaded once; stages leave it as it was.

    Within another one it changes nothing.
    """
    global _models
    before = _models
    _models = {} if before is None else before
    try:
        yield
    finally:
        _models = before


def _load(name: str, **about: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if _models is None:
        return models.load(name, **about)
    about["device"] = str(models.resolve_device(about["device"]))
    seed = about["seed"] if name.startswith("random:") else None
    key = (name, about["dtype"], about["device"], about["device_map"], about["revision"], seed)
    if key not in _models:
        _models.clear()
        _models[key] = models.load(name, **about)
    return _models[key]


def check_positions(
    config: Any,
    wanted: int,
    what: str = "windows",
    remedy: str = "Give fewer --prompt_tokens or --continuation_tokens.",
) -> None:
    """UserError where `wanted` tokens are more than the model of this configuration has positions for."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and wanted > limit:
        raise UserError(f"{what} of {wanted} tokens do not fit the model's {limit}\n{remedy}")


def check_questions(config: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]) -> None:
    """UserError where a passage with its question and an answer is longer than the model's positions."""
    longest = max(_question_tokens(tokenizer, row) for row in rows)
    check_positions(config, longest, "passages with their question", "Give fewer --prompt_tokens.")


def _question_tokens(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> int:
    if "tokens" in row:
        return row["tokens"] + row["new_tokens"]
    text = row["context"] + row["choices"][row["answer"]]
    return len(prompt_ids(tokenizer, text))


def check_chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where the tokenizer of model `name` has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {name} has no chat template\nLeave --apply_chat_template out.")


@contextmanager
def text_named(data: str, split: str) -> Iterator[None]:
    """UserErrors about a text, with its source and split where they do not say them."""
    try:
        yield
    except UserError as error:
        first, *rest = str(error).splitlines()
        known = data in first and repr(split) in first
        raise UserError("\n".join([first if known else f"{data}, split {split!r}: {first}", *rest])) from None


def measured_rows(
    settings: RowsSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    recall_share: float,
    split: str | None = None,
) -> Rows:
    """`count` rows of the stage's text as --rows says, all with a continuation; fewer where there are fewer prompts."""
    return answered(settings, model, unanswered_rows(settings, tokenizer, count, recall_share, split))


def unanswered_rows(
    settings: RowsSettings,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    recall_share: float = 0.0,
    split: str | None = None,
) -> Rows:
    """The same before the model has answered prompts that have no continuation. `recall_share` of windows have facts
    to recall."""
    split, shape = split or settings.chosen_split, (settings.prompt_tokens, settings.continuation_tokens)
    with text_named(settings.data, split):
        if settings.rows != "windows":
            return sampled_prompts(settings.data, split, tokenizer, *shape, count, settings.seed)
        documents = load_documents(settings.data, split)
        return calibration_windows(tokenizer, documents, *shape, count, settings.seed, recall_share)


def answered(settings: RowsSettings, model: PreTrainedModel, rows: Rows) -> Rows:
    """The rows with the dense model's own answers: of all under --rows own_answers, else of those without one."""
    from ftp_lightning.evaluation.own_answers import own_answers

    if settings.rows == "own_answers":
        rows = rows.prompts()
    if all(row.continuation for row in rows.rows):
        return rows
    folder = Path(settings.own_answers).expanduser()
    return own_answers(model, rows, settings.continuation_tokens, folder, only_missing=True)


def num_blocks(model: PreTrainedModel) -> int:
    """How many blocks the model has; UserError where they are not understood."""
    try:
        return len(find_blocks(model))
    except ValueError as error:
        raise UserError(f"{error}\nGive another --model.") from None


def load_schedule(path: str, model: PreTrainedModel, budget: float | None = None) -> Schedule:
    """The schedule in a file, of a family the one of `budget`; UserError where it is for another number of blocks."""
    schedule = read_schedule(path, budget)
    check_blocks(schedule, path, num_blocks(model))
    return schedule


def read_schedule(path: str, budget: float | None = None) -> Schedule:
    """The schedule in a file; of a family (schedules.json) the one of `budget`. UserError where that is not said."""
    file = Path(path).expanduser()
    if not holds_family(path):
        return Schedule.load(file)
    family = ScheduleFamily.load(file)
    if budget is None:
        held = ", ".join(f"{one:.4g}" for one in family.budgets)
        raise UserError(
            f"{path} holds schedules for the budgets {held}\nSay which by --budget; any between them will do."
        )
    return family.at(budget)


def schedule_or_default(path: str | None, budget: float | None, model: PreTrainedModel, kv: str = AUTO) -> Schedule:
    """The schedule in a file, else the default one of the budget for --kv."""
    if path:
        return load_schedule(path, model, budget)
    return Schedule.default(num_blocks(model), DEFAULT_BUDGET if budget is None else budget, given_modes(kv))


def default_of(settings: PrunedSettings, model: PreTrainedModel) -> Schedule:
    """`Schedule.default` of --budget for --kv; under --budget_kind flops the one whose FLOPs cut is nearest."""
    kv = given_modes(settings.kv)
    if settings.budget is None or settings.budget_kind == "tokens":
        budget = DEFAULT_BUDGET if settings.budget is None else settings.budget
        return Schedule.default(num_blocks(model), budget, kv)
    check_budget_length(settings, model.config)
    found = default_with_cut(model, settings.budget, settings.budget_length, kv)
    check_reachable(found.budget, settings.prompt_tokens)
    return found


def token_budget(
    settings: BudgetSettings,
    model: PreTrainedModel,
    kv: str | Sequence[str],
    budget: float | None = None,
    rank: int = 0,
) -> float | None:
    """The share of tokens that `budget`, by default --budget, asks for: itself, or under --budget_kind flops that of
    the uniform schedule with this FLOPs cut; UserError where --budget_length does not fit the model, or the cut is out
    of reach. rank: `TokenPruner.skip_rank`."""
    budget = settings.budget if budget is None else budget
    if settings.budget_kind == "tokens" or budget is None:
        return budget
    check_budget_length(settings, model.config)
    num_blocks(model)
    budget = solve_budget(model, budget, settings.budget_length, kv, rank=rank).sparsity[0]
    check_reachable(budget, settings.prompt_tokens)
    return budget


def check_budget_length(settings: BudgetSettings, config: Any) -> None:
    """UserError where the prompt that a FLOPs budget speaks of is longer than the model's positions."""
    if settings.budget_kind == "flops":
        check_positions(config, settings.budget_length, "prompts of the budget", "Give a smaller --budget_length.")


def load_pruner(folder: str, model: PreTrainedModel) -> TokenPruner:
    """The pruner in a folder, or a ready-made one by its name; UserError where it was made for another model."""
    pruner = ready.load_pruner(folder)
    check_blocks(pruner.scheduled, folder, num_blocks(model))
    check_base(pruner._base or {}, model)
    return pruner


def chosen_pruner(settings: PrunedSettings, model: PreTrainedModel) -> TokenPruner:
    """What --pruned, --schedule, --budget, --kv and --decode say: a stored pruner, else the static router.

    UserError where --kv is not the mode that the schedule was found for.
    """
    if settings.pruned:
        schedule = load_schedule(settings.schedule, model, settings.budget) if settings.schedule else None
        pruner = load_pruner(settings.pruned, model)
        if settings.budget is not None and schedule is None:
            pruner = pruner.at(_family_budget(settings, pruner, model))
        changes = {} if settings.decode == "auto" else {"decode": settings.decode}
        return in_mode(pruner.changed(schedule=schedule or pruner.schedule, **changes), settings.kv)
    schedule = load_schedule(settings.schedule, model, settings.budget) if settings.schedule else None
    decode = "dense" if settings.decode == "auto" else settings.decode
    return new_pruner(StaticRouter(), schedule or default_of(settings, model), settings.kv, decode=decode)


def _family_budget(settings: PrunedSettings, pruner: TokenPruner, model: PreTrainedModel) -> float:
    """--budget as a mean sparsity of the pruner's family, whatever it is a share of."""
    assert settings.budget is not None
    if settings.budget_kind == "tokens":
        return settings.budget
    check_budget_length(settings, model.config)
    return budget_with_cut(model, pruner, settings.budget, settings.budget_length)


def new_pruner(router: Router, schedule: Schedule, kv: str, **about: Any) -> TokenPruner:
    """A pruner in the mode of --kv, else of the schedule, else `DEFAULT_KV`; its schedule says which.

    UserError where --kv is not the mode that the schedule was found for.
    """
    modes = given_modes(kv)
    labelled = schedule if schedule.kv else schedule.under(modes or DEFAULT_KV)
    return TokenPruner(router, labelled, modes, **about)


def in_mode(pruner: TokenPruner, kv: str) -> TokenPruner:
    """The pruner in the mode of --kv; UserError where its schedule was found for another one."""
    modes = given_modes(kv)
    if modes is None:
        return pruner
    new_pruner(pruner.router, pruner.scheduled, kv)  # refuses another mode, which `changed` takes as meant
    return pruner.changed(kv=modes)


def load_sensitivity(path: str, blocks: int) -> dict[str, Any]:
    """What `sensitivity` found; UserError where the file is something else or of another number of blocks."""
    try:
        found = read_json(Path(path).expanduser(), LARGEST)
        measured = len(finite_numbers(found["block_influence"], "block_influence")), len(found["kl"])
        levels = finite_numbers(found["levels"], "levels")
        if any(len(finite_numbers(row, "kl")) != len(levels) for row in found["kl"]):
            raise ValueError("kl has other levels")
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a sensitivity.json\nMake one with `ftp-lightning sensitivity`.") from None
    if set(measured) != {blocks}:
        raise UserError(f"{path} was measured on {measured[0]} blocks, the model has {blocks}\nMeasure this model's.")
    return found


def check_blocks(schedule: Schedule, name: str, blocks: int) -> None:
    """UserError where a schedule is not one of `blocks` blocks."""
    if schedule.num_blocks != blocks:
        made_for = f"{name} is made for {schedule.num_blocks} blocks"
        raise UserError(f"{made_for}, the model has {blocks}\nGive one made for this model, or another --model.")
