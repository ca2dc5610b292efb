"""What an evaluation compares: baselines, the router before fine-tuning, and last the pruner asked about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftp_lightning.baselines.beside import beside
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import ROUTERS, Router
from ftp_lightning.stages.inputs import chosen_pruner, load_pruner, load_schedule, load_sensitivity

if TYPE_CHECKING:
    from ftp_lightning.stages.evaluate import EvaluateStage

Methods = list[tuple[str, TokenPruner]]
"""Name and pruner of each method."""

BEFORE = "dynamic (before fine-tuning)"


def choose_methods(settings: EvaluateStage, model: Any) -> Methods:
    """The methods that the settings ask for; all share the settings of the pruner asked about."""
    chosen = chosen_pruner(settings, model)
    if settings.threshold is not None:
        chosen = chosen.changed(threshold=settings.threshold)
    setting = _setting(settings, chosen, model)
    methods = [(name, beside(name, chosen, setting, settings.prompt_tokens)) for name in settings.compare]
    if settings.before:
        methods.append((BEFORE, load_pruner(settings.before, model)))
    name = _name(settings, chosen.router)
    return [(other, pruner) for other, pruner in methods if other != name] + [(name, chosen)]


def _setting(settings: EvaluateStage, chosen: TokenPruner, model: Any) -> Setting:
    """What baselines may look at."""
    blocks, searched, influence = chosen.scheduled.num_blocks, None, ()
    if settings.sensitivity:
        influence = tuple(load_sensitivity(settings.sensitivity, blocks)["block_influence"])
    if file := settings.static_schedule or settings.schedule:
        searched = load_schedule(file, model, chosen.scheduled.budget)
    return Setting(model, settings.seed, influence=influence, searched=searched)


def _name(settings: EvaluateStage, router: Router) -> str:
    """A pruner is called by its router; the static router under the default schedule is `default`."""
    kind = next((name for name, kind in ROUTERS.items() if type(router) is kind), "pruned")
    return kind if settings.pruned or settings.schedule else "default"
