"""What is compared: baselines of one budget and kv mode, the router before fine-tuning, and the pruner asked about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftp_lightning.baselines import PEERS, Profile, Setting
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.request import planned_cut
from ftp_lightning.routing import ROUTERS, RandomRouter, Router, StaticRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.search import allocations
from ftp_lightning.stages.evaluate import BASELINES
from ftp_lightning.stages.inputs import chosen_pruner, load_pruner, load_schedule, load_sensitivity

if TYPE_CHECKING:
    from ftp_lightning.stages.evaluate import EvaluateStage

Methods = list[tuple[str, TokenPruner]]
"""Name and pruner of each method, the one asked about last."""

BEFORE = "dynamic (before fine-tuning)"


def choose_methods(settings: EvaluateStage, model: Any) -> Methods:
    """The methods that the settings ask for; baselines take budget and kv of the pruner asked about."""
    chosen = chosen_pruner(settings, model)
    if settings.threshold is not None:
        chosen = chosen.changed(threshold=settings.threshold)
    methods = [(name, _baseline(name, settings, chosen, model)) for name in settings.compare]
    if settings.before:
        methods.append((BEFORE, load_pruner(settings.before, model)))
    name = _name(settings, chosen.router)
    return [(other, pruner) for other, pruner in methods if other != name] + [(name, chosen)]


def _peer(name: str, settings: EvaluateStage, chosen: TokenPruner, model: Any) -> TokenPruner:
    """A peer where the prompt costs as many FLOPs as under the pruner asked about."""
    blocks = chosen.scheduled.num_blocks
    influence = load_sensitivity(settings.sensitivity, blocks)["block_influence"] if settings.sensitivity else ()
    cut = planned_cut(model, chosen, settings.prompt_tokens)
    return PEERS[name].place(Setting(model, settings.seed, influence=influence), cut, Profile(settings.prompt_tokens))


def _baseline(name: str, settings: EvaluateStage, chosen: TokenPruner, model: Any) -> TokenPruner:
    if name not in BASELINES:
        return _peer(name, settings, chosen, model)
    schedule, blocks = chosen.scheduled, chosen.scheduled.num_blocks
    even = Schedule.uniform(blocks, schedule.budget)
    if name == "random":
        return TokenPruner(RandomRouter(settings.seed), even, kv=chosen.kv)
    if name == "uniform":
        return TokenPruner(StaticRouter(), even, kv=chosen.kv)
    if name == "block_influence":
        influence = load_sensitivity(str(settings.sensitivity), blocks)["block_influence"]
        return TokenPruner(StaticRouter(), allocations.from_importance(influence, schedule.budget), kv=chosen.kv)
    searched = load_schedule(str(settings.static_schedule or settings.schedule), model, schedule.budget)
    return TokenPruner(StaticRouter(), searched if searched.kv else searched.under(chosen.kv))


def _name(settings: EvaluateStage, router: Router) -> str:
    """A pruner is called by its router; the static router under the default schedule is `default`."""
    kind = next((name for name, kind in ROUTERS.items() if type(router) is kind), "pruned")
    return kind if settings.pruned or settings.schedule else "default"
