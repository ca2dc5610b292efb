"""Windows as a LightningDataModule."""

from collections.abc import Iterator

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, RandomSampler

from ftp_lightning.data.windows import Windows


class EpochSampler(RandomSampler):
    """A permutation that depends on (seed, epoch) alone, so a resumed run goes on as the uninterrupted one would have.

    Lightning calls `set_epoch` before every epoch. Being a RandomSampler it may be replaced by Lightning's
    DistributedSampler (also seeded and told the epoch) when there are several processes.
    """

    def __init__(self, rows: int, seed: int) -> None:
        super().__init__(range(rows))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(len(self), generator=generator).tolist())


class WindowsData(LightningDataModule):
    """Batches `{"input_ids": (B, P + C) int64, "prompt_tokens": P}` of windows.

    Shuffled per epoch to train, in order to validate (`validation_windows`) and to predict (`windows`).
    """

    def __init__(
        self, windows: Windows, validation_windows: Windows | None = None, batch_size: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        if batch_size < 1 or not len(windows):
            raise ValueError(f"batch_size {batch_size} and the number of windows {len(windows)} must be at least 1")
        self.windows, self.validation_windows = windows, validation_windows
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.windows, EpochSampler(len(self.windows), self.seed))

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.validation_windows is None else self._loader(self.validation_windows)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.windows)

    def _loader(self, windows: Windows, sampler: RandomSampler | None = None) -> DataLoader:
        def collate(rows: list[int]) -> dict[str, torch.Tensor | int]:
            return {"input_ids": windows.input_ids[rows], "prompt_tokens": windows.prompt_tokens}

        return DataLoader(range(len(windows)), batch_size=self.batch_size, sampler=sampler, collate_fn=collate)
