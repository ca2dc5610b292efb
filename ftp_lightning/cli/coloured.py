"""A prompt on the terminal, each token coloured by the share of blocks that computed it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ftp_lightning.stages.generate import Continued

SCALE = ((0.65, "grey50"), (0.8, "black on #fde0a6"), (0.9, "black on #f7a35c"), (1.01, "white on #b5367a"))
"""Share of the blocks that computed a token, below which it has this style; light to dark."""


READY = "ready-made for this model"


def style_of(share: float) -> str:
    return next(style for below, style in SCALE if share < below)


def coloured(found: Continued) -> Text:
    """The prompt's tokens, each in the colour of its share of computed blocks."""
    from rich.text import Text

    text, blocks = Text(), len(found.skipped)
    for token, computed in zip(found.tokens, found.computed, strict=True):
        text.append(token, style_of(computed / blocks))
    return text


def legend(found: Continued) -> Text:
    """One line: each colour that some token has, the blocks that it stands for, and how many tokens have it."""
    from rich.text import Text

    text, low, blocks = Text(f"computed by so many of the {len(found.skipped)} blocks: "), 0.0, len(found.skipped)
    for below, style in SCALE:
        count = sum(low <= computed / blocks < below for computed in found.computed)
        least, most = -int(-low * blocks // 1), min(blocks, -int(-below * blocks // 1) - 1)
        low = below
        if count:
            text.append(f" {least}-{most} " if least < most else f" {most} ", style)
            text.append(f" {count} token{'s' if count > 1 else ''}  ")
    return text


def print_continued(found: Continued, model: str, pruner: str, console: Console | None = None) -> None:
    """Print prompt, answers, tokens skipped, and times."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    say: Any = console.print
    say(coloured(found))
    say()
    say(legend(found))
    say()
    table = Table.grid(padding=(0, 2))
    dense, pruned = found.first_token_ms["dense"], found.first_token_ms["pruned"]
    for left, right in (
        ("dense answer", found.texts["dense"].strip()),
        ("pruned answer", found.texts["pruned"].strip()),
        ("tokens skipped", f"{found.share_skipped:.0%} of the {len(found.tokens)} tokens, averaged over the blocks"),
        ("first token", f"dense {dense:,.0f} ms, pruned {pruned:,.0f} ms: {dense / pruned:.2f} times as fast"),
        ("limit by FLOPs", f"{found.flops_limit:.2f} times as fast"),
        ("model", model),
        ("pruner", pruner),
    ):
        table.add_row(Text(left, "bold"), Text(right))
    say(table)
    if found.too_short:
        say("The prompt is too short to gain anything, so all its tokens were computed. --least_tokens 0 prunes it.")
    elif dense <= pruned:
        say(f"Skipping gained no time here: a prompt of {len(found.tokens)} tokens is short, or the machine was busy.")
    elif pruner == READY:
        say("A larger --budget skips more tokens and keeps fewer answers.")
    if model == "embedded":
        say("This model writes children's stories. It cannot answer questions, and it is too small to gain time.")
        say("`make models` installs SmolLM2, a real model, which `ftp-lightning try` takes from then on.")
