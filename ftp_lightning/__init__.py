"""FTP, a fine-grained token-wise pruner for large language models: a router decides which tokens enter each block.

The public nouns are imported when they are first asked for, so that `import ftp_lightning` and `--help` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftp_lightning.attention_score import AttentionScore
    from ftp_lightning.disk.pruned_model import load_pruned
    from ftp_lightning.errors import UserError
    from ftp_lightning.hub import from_pretrained, push_to_hub
    from ftp_lightning.lit.distillation import distil_compensation
    from ftp_lightning.pruning import TokenPruner
    from ftp_lightning.routing import (
        DynamicRouter,
        FixedRouter,
        HiddenFactorsRouter,
        HiddenRouter,
        LocalRouter,
        OnePassRouter,
        ProjectedOnceRouter,
        ProjectedRouter,
        RandomRouter,
        RecurrentRouter,
        StaticRouter,
        UntrainedRouter,
        make_router,
    )
    from ftp_lightning.schedule import Schedule
    from ftp_lightning.schedule_family import ScheduleFamily
    from ftp_lightning.training.compensation import fit_compensation

__version__ = "0.1.0"

_HOMES = {
    "AttentionScore": "ftp_lightning.attention_score",
    "Schedule": "ftp_lightning.schedule",
    "ScheduleFamily": "ftp_lightning.schedule_family",
    "TokenPruner": "ftp_lightning.pruning",
    "FixedRouter": "ftp_lightning.routing",
    "StaticRouter": "ftp_lightning.routing",
    "RandomRouter": "ftp_lightning.routing",
    "DynamicRouter": "ftp_lightning.routing",
    "LocalRouter": "ftp_lightning.routing",
    "RecurrentRouter": "ftp_lightning.routing",
    "HiddenRouter": "ftp_lightning.routing",
    "HiddenFactorsRouter": "ftp_lightning.routing",
    "OnePassRouter": "ftp_lightning.routing",
    "ProjectedRouter": "ftp_lightning.routing",
    "ProjectedOnceRouter": "ftp_lightning.routing",
    "UntrainedRouter": "ftp_lightning.routing",
    "make_router": "ftp_lightning.routing",
    "distil_compensation": "ftp_lightning.lit.distillation",
    "fit_compensation": "ftp_lightning.training.compensation",
    "from_pretrained": "ftp_lightning.hub",
    "load_pruned": "ftp_lightning.disk.pruned_model",
    "push_to_hub": "ftp_lightning.hub",
    "UserError": "ftp_lightning.errors",
}

__all__ = [
    "AttentionScore",
    "DynamicRouter",
    "FixedRouter",
    "HiddenFactorsRouter",
    "HiddenRouter",
    "LocalRouter",
    "OnePassRouter",
    "ProjectedOnceRouter",
    "ProjectedRouter",
    "RandomRouter",
    "RecurrentRouter",
    "Schedule",
    "ScheduleFamily",
    "StaticRouter",
    "TokenPruner",
    "UntrainedRouter",
    "UserError",
    "distil_compensation",
    "fit_compensation",
    "from_pretrained",
    "load_pruned",
    "make_router",
    "push_to_hub",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
