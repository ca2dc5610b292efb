"""Flags about the attention score that a router reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from ftp_lightning.attention_score import DEFAULT_WINDOW, AttentionScore
from ftp_lightning.cli.option import option
from ftp_lightning.cli.settings import ModelSettings
from ftp_lightning.errors import UserError

_FLAG_OF = {"heads": "attention_heads", "blocks": "attention_blocks", "pooling": "attention_pooling"}


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(ModelSettings):
    """A stage that makes a pruner whose router may read attention; see `AttentionScore`."""

    window: int = option(DEFAULT_WINDOW, "queries that the attention score averages over", least=1)
    attention: Literal["window", "exact"] = option(
        "window", "exact: the attention score averages over all computed queries"
    )
    window_end: int = option(0, "tokens at a prompt's end whose queries are left out: a chat template's", least=0)
    attention_heads: Literal["mean", "max"] = option("mean", "score of a token over the heads: mean, or the greatest")
    attention_blocks: str = option(
        "latest", "score of a token over the blocks so far: latest, max, or the greatest of some, such as 13-15"
    )
    attention_pooling: Literal["none", "max", "average"] = option(
        "none", "pool the scores of neighbouring tokens, as SnapKV does"
    )
    kernel_size: int = option(AttentionScore.kernel_size, "tokens that are pooled, an odd number", least=3)

    def check(self) -> None:
        super().check()
        self.attention_score()

    def attention_score(self) -> AttentionScore:
        """UserError where the flags do not go together."""
        about: dict[str, Any] = {name: getattr(self, flag) for name, flag in _FLAG_OF.items()}
        about["blocks"] = _blocks(self.attention_blocks)
        window: int | Literal["exact"] = "exact" if self.attention == "exact" else self.window
        return AttentionScore(window, self.window_end, kernel_size=self.kernel_size, **about)

    @staticmethod
    def attention_flags() -> tuple[str, ...]:
        """Names of the flags that stand here."""
        inherited = {item.name for item in fields(ModelSettings)}
        return tuple(item.name for item in fields(AttentionSettings) if item.name not in inherited)


def _blocks(said: str) -> Any:
    """ "latest" or "max" as they are; "13-15" as (13, 16)."""
    first, dash, last = said.partition("-")
    if not dash:
        return said
    if not (first.isdigit() and last.isdigit()):
        raise UserError(f"attention_blocks is {said!r}, must be latest, max, or two blocks such as 13-15")
    return int(first), int(last) + 1
