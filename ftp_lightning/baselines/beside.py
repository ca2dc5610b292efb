"""Methods to compare a pruner with, each at its tokens or at its FLOPs, and with its own settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ftp_lightning.baselines.allocated import Allocated
from ftp_lightning.baselines.names import EQUAL_TOKENS
from ftp_lightning.baselines.registry import METHODS
from ftp_lightning.baselines.setting import Profile, Setting
from ftp_lightning.costs.least_tokens import routed_from
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.pruning import TokenPruner


def beside(name: str, chosen: TokenPruner, setting: Setting, prompt_tokens: int) -> TokenPruner:
    """The method `name`, made comparable with `chosen`.

    Methods of `EQUAL_TOKENS` get the budget and all other settings of `chosen`; the others get the FLOPs that `chosen`
    needs for a prompt of `prompt_tokens`. Compensation goes to every method whose decisions address the same parts, and
    the decode policy to every method whose scores are probabilities. Prompts that are too short for `chosen` are too
    short for every method: all compute them densely, but for methods that remove parts of the model.
    """
    method = METHODS[name]
    shared: dict[str, Any] = {"least_tokens": routed_from(setting.model, chosen)}
    if name in EQUAL_TOKENS and isinstance(method, Allocated):
        return method.equal_tokens(setting, chosen).changed(**shared)
    setting = replace(setting, given=chosen.maps, given_parts=chosen.parts)
    cut = planned_cut(setting.model, chosen.changed(least_tokens=0), prompt_tokens)
    pruner = method.place(setting, cut, Profile(prompt_tokens))
    if not pruner.router.ranks_only:
        shared |= {"decode": chosen.decode, "threshold": chosen.threshold}
    return pruner.changed(**shared)
