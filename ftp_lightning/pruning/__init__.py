"""Putting a router and a schedule in force on a stock Hugging Face causal LM."""

from ftp_lightning.pruning.pruner import TokenPruner

__all__ = ["TokenPruner"]
