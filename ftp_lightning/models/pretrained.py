"""What transformers' `from_pretrained` says and raises, made quiet and told in a sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ftp_lightning.errors import UserError


def cause(error: BaseException) -> str:
    """The first line of an error's message, cut at 160 characters; its kind where the message is not a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0][:160] if lines else ""
    return first if " " in first else f"{type(error).__name__}: {first}".removesuffix(": ")


_OLD_BUFFERS = re.compile(r"(attention|attn)\.(masked_)?bias$|rotary_emb\.inv_freq$|position_ids$")
"""Causal masks and positions, which older versions of transformers stored beside the weights."""


def check_complete(info: dict[str, Any], name: str) -> None:
    """UserError where a model's file lacks weights, has others or other shapes; transformers would draw them.

    Args:
        info: the loading info of `from_pretrained`.
    """
    found = {kind: sorted(map(str, info.get(f"{kind}_keys", ()))) for kind in ("missing", "unexpected", "mismatched")}
    found["unexpected"] = [key for key in found["unexpected"] if not _OLD_BUFFERS.search(key)]
    for kind, keys in found.items():
        if keys:
            more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
            raise UserError(
                f"the weights of {name} do not fit its config.json: {kind} {', '.join(keys[:2])[:200]}{more}\n"
                "Give the complete files of one model."
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' progress bars off, and as before afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
