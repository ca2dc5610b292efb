"""lm-eval models on shared weights, whose pruners are taken off again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ftp_lightning.evaluation.harness.model import FtpLM


@contextmanager
def ftp_models(model, tokenizer) -> Iterator[Callable[..., FtpLM]]:
    """What makes them; batch_size 3 unless told otherwise."""
    made: list[FtpLM] = []

    def make(**options) -> FtpLM:
        made.append(FtpLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 3, **options}))
        return made[-1]

    try:
        yield make
    finally:
        for lm in made:
            lm.close()
