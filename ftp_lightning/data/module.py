"""Rows of text as a LightningDataModule."""

import random
from collections.abc import Callable, Iterator

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from ftp_lightning.data.rows import Rows
from ftp_lightning.errors import UserError


def random_split(tokens: int, rng: random.Random, least: int, most: int) -> int:
    """How many of a row's `tokens` are its prompt, each number in [least, most] equally likely [ours]; one token at
    least is left to follow. ValueError unless 1 <= least <= most and least < tokens."""
    if not 1 <= least <= most or least >= tokens:
        raise ValueError(f"no prompt of {least} to {most} tokens in a row of {tokens}")
    return rng.randint(least, min(most, tokens - 1))


class TrainingBatches:
    """Batches of rows without end: pass after pass over all rows, each in an order that (seed, pass) alone decides.

    Batch n of the whole training holds rows n B ... (n + 1) B - 1 of that order and says its number, whoever asks for
    it and when: a resumed training starts at `done`, and of W processes process r gets the batches done + r,
    done + r + W, ..., so that together they see what one process sees that accumulates W batches per step.

    Args:
        collate: row numbers -> a batch (dict).
        random_prompt: (least, most) prompt tokens to draw for each batch, in place of the windows' own split.
    """

    def __init__(
        self, rows: int, batch_size: int, collate: Callable, seed: int = 0, random_prompt: tuple[int, int] | None = None
    ):
        self.rows, self.batch_size, self.collate, self.seed = rows, batch_size, collate, seed
        self.random_prompt, self.done, self.rank, self.world = random_prompt, 0, 0, 1
        self._pass = -1
        self._order: list[int] = []

    def __iter__(self) -> Iterator[dict]:
        number = self.done + self.rank
        while True:
            yield self.batch(number)
            number += self.world

    def batch(self, number: int) -> dict:
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        batch = self.collate([self._row(place) for place in places]) | {"number": number}
        if self.random_prompt is not None:
            rng = random.Random(f"{self.seed}/prompt/{number}")
            batch["prompt_tokens"] = random_split(batch["input_ids"].shape[1], rng, *self.random_prompt)
        return batch

    def _row(self, place: int) -> int:
        of_pass, place = divmod(place, self.rows)
        if of_pass != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + of_pass)
            self._pass, self._order = of_pass, torch.randperm(self.rows, generator=generator).tolist()
        return self._order[place]


class RowsData(LightningDataModule):
    """Batches of rows, as `Rows.batch` makes them: `{"input_ids": (B, P + C) int64, "prompt_tokens": P}`, and
    `"attention_mask"` (B, P + C) where rows are padded.

    To train: shuffled, without end, see `TrainingBatches`. In order of length to validate (`validation_rows`) and to
    predict (`rows`). A random prompt length is for rows of one length, with room for it (UserError).

    Attributes:
        batches_done: of the whole training, by all processes, before this one goes on.
        shares_validation: whether each of W processes gets every W-th batch of `validation_rows`, where there are
            that many.
    """

    shares_validation = False

    def __init__(
        self,
        rows: Rows,
        validation_rows: Rows | None = None,
        batch_size: int = 1,
        seed: int = 0,
        random_prompt: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or not len(rows):
            raise ValueError(f"batch_size {batch_size} and the number of rows {len(rows)} must be at least 1")
        if random_prompt is not None:
            _check_random_prompt(rows, *random_prompt)
        self.rows, self.validation_rows = rows, validation_rows
        self.batch_size, self.seed, self.random_prompt, self.batches_done = batch_size, seed, random_prompt, 0

    def train_dataloader(self) -> TrainingBatches:
        batches = TrainingBatches(len(self.rows), self.batch_size, self.rows.batch, self.seed, self.random_prompt)
        batches.done = self.batches_done
        if self.trainer is not None:
            batches.rank, batches.world = self.trainer.global_rank, self.trainer.world_size
        return batches

    def val_dataloader(self) -> DataLoader | list:
        if self.validation_rows is None:
            return []
        whole = self._loader(self.validation_rows)
        if not self.shares_validation or self.trainer is None or len(whole) < self.trainer.world_size:
            return whole
        places = list(whole.batch_sampler)[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(self.validation_rows.order, batch_sampler=places, collate_fn=self.validation_rows.batch)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.rows)

    def _loader(self, rows: Rows) -> DataLoader:
        return DataLoader(rows.order, batch_size=self.batch_size, collate_fn=rows.batch)


def _check_random_prompt(rows: Rows, least: int, most: int) -> None:
    """UserError where rows leave no room for such prompts."""
    if not rows.one_shape:
        raise UserError("a random prompt length is for windows; other rows have prompts of their own.")
    tokens = sum(rows.shapes[0])
    if not 1 <= least <= most < tokens:
        raise UserError(
            f"random prompt lengths are {least} to {most}, must be at least 1 and below the windows' {tokens} tokens\n"
            "Give other lengths, or longer windows."
        )
