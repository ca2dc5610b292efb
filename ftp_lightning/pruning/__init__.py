"""Putting a router and a schedule in force on a stock Hugging Face causal LM."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftp_lightning.pruning.pruner import TokenPruner

__all__ = ["TokenPruner"]


def __getattr__(name: str) -> Any:
    """The pruner, imported when it is asked for: what it is made of can be imported without it, in any order."""
    if name != "TokenPruner":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ftp_lightning.pruning.pruner import TokenPruner

    return TokenPruner
