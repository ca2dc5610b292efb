"""What pruners keep of the dense model's own answers, item by item, and stored as it is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftp_lightning.data.rows import Rows
from ftp_lightning.evaluation.bench import OWN_ANSWERS, TEACHER_BYTES
from ftp_lightning.evaluation.continuation import evaluate_rows, teacher_logprobs
from ftp_lightning.evaluation.harness.accounts import Answer
from ftp_lightning.evaluation.harness.answers import AnswerBook, asked_identity, request_key
from ftp_lightning.evaluation.record import record
from ftp_lightning.evaluation.speed.prefill import Speed, prefill_speed
from ftp_lightning.evaluation.speed.prompts import Prompts
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.devices import home

if TYPE_CHECKING:
    from pandas import DataFrame

PAIRS = 5
"""Timed pairs of a dense and a pruned prefill [ours]."""


class Measured:
    """Records of pruners on rows that hold the dense model's own answers.

    Items are written to `folder` batch by batch, under a hash of model, pruner and code. So a second call with the same
    pruner goes on where a kill has ended the first, in whatever part of the prompts.
    """

    def __init__(self, model: Any, folder: str | Path, batch_size: int = 4):
        self.model, self.folder, self.batch_size = model, Path(folder), batch_size
        self._teacher: dict[str, Tensor] = {}
        self._teacher_bytes = 0

    def items(
        self, name: str, pruner: TokenPruner, rows: Rows, tell: Callable[[int, int], None] = lambda done, of: None
    ) -> DataFrame:
        """The record of a pruner on these rows; `tell` is told how many are done."""
        book = AnswerBook(self.folder, asked_identity(self.model, pruner, measured="own answers"))
        keys = [request_key(row.prompt, row.continuation) for row in rows.rows]
        known = {key: answer.value for key in keys if (answer := book.get(key)) is not None}
        missing = [place for place, key in enumerate(keys) if key not in known]
        lacking = rows.subset(missing)
        for done, (numbers, _) in enumerate(lacking.batches(self.batch_size)):
            tell(len(rows) - len(missing) + done * self.batch_size, len(rows))
            chunk, asked = lacking.subset(numbers), [keys[missing[number]] for number in numbers]
            scores = evaluate_rows(self.model, chunk, pruner, "prompt", len(chunk), self._dense(chunk, asked))
            found = dict(zip(asked, scores.items(), strict=True))
            book.add({key: Answer(item) for key, item in found.items()})
            known |= found
        found_items = [{**known[key], "document": row.document} for key, row in zip(keys, rows.rows, strict=True)]
        return record(found_items, name, OWN_ANSWERS).assign(needed=True)

    def _dense(self, chunk: Rows, keys: list[str]) -> list[Tensor]:
        """The dense model's log-probabilities of these answers, remembered as far as memory goes."""
        if not all(key in self._teacher for key in keys):
            found = teacher_logprobs(self.model, chunk, len(chunk))
            size = sum(one.numel() * one.element_size() for one in found)
            if self._teacher_bytes + size > TEACHER_BYTES:
                return found
            self._teacher_bytes += size
            self._teacher |= dict(zip(keys, found, strict=True))
        return [self._teacher[key] for key in keys]

    def speed(self, pruner: TokenPruner, prompt: list[int], seed: int = 0) -> Speed:
        """Time to first token of one real prompt, dense and pruned in turn."""
        prompts, generator = Prompts(torch.tensor([prompt], device=home(self.model))), torch.Generator()
        return prefill_speed(self.model, pruner, prompts, PAIRS, 1, generator=generator.manual_seed(seed))
