"""What transformers' `from_pretrained` says and raises, made quiet and told in a sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, LogRecord
from typing import Any

from ftp_lightning.errors import UserError


def cause(error: BaseException) -> str:
    """The first line of an error's message, cut at 160 characters; its kind where the message is not a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0][:160] if lines else ""
    return first if " " in first else f"{type(error).__name__}: {first}".removesuffix(": ")


_OLD_BUFFERS = re.compile(r"(attention|attn)\.(masked_)?bias$|rotary_emb\.inv_freq$|position_ids$")
"""Causal masks and positions, which older versions of transformers stored beside the weights."""


COMPLETE = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""What makes `from_pretrained` tell all that does not fit, for `check_complete`."""


def check_complete(info: dict[str, Any], name: str) -> None:
    """UserError where a model's file lacks weights, has others or other shapes; transformers would draw them.

    Args:
        info: the loading info of `from_pretrained`, asked with COMPLETE.
    """
    found = {kind: sorted(map(_key, info.get(f"{kind}_keys", ()))) for kind in ("missing", "unexpected", "mismatched")}
    found["unexpected"] = [key for key in found["unexpected"] if not _OLD_BUFFERS.search(key)]
    for kind, keys in found.items():
        if keys:
            more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
            raise UserError(
                f"the weights of {name} do not fit its config.json: {kind} {', '.join(keys[:2])[:200]}{more}\n"
                "Give the complete files of one model."
            )


def _key(found: str | tuple) -> str:
    """The name of a weight; with both its shapes where these are given."""
    return found if isinstance(found, str) else f"{found[0]} ({tuple(found[1])} instead of {tuple(found[2])})"


@contextmanager
def generation_told(model: Any) -> Iterator[None]:
    """Inside, what a model's stored generation_config.json makes `generate` raise is a UserError with its cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        own = {"transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id"}
        asked = sorted(model.generation_config.to_diff_dict().keys() - own)
        if not asked:
            raise
        raise UserError(
            f"the model's generation_config.json asks for {', '.join(asked[:4])}, which fails: {cause(error)}\n"
            "Take it out of that file."
        ) from error


def _is_error(record: LogRecord) -> bool:
    return record.levelno >= ERROR


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' progress bars and its report on missing weights off, and as before afterwards."""
    from transformers.utils import logging

    shown, report = logging.is_progress_bar_enabled(), logging.get_logger("transformers.modeling_utils")
    logging.disable_progress_bar()
    report.addFilter(_is_error)  # not by its level, which makes transformers report on tensor parallelism instead
    try:
        yield
    finally:
        report.removeFilter(_is_error)
        if shown:
            logging.enable_progress_bar()
