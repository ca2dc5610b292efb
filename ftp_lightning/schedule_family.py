"""Schedules of one model for a list of budgets, and by interpolation for every budget between them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ftp_lightning.errors import UserError
from ftp_lightning.json_file import read_json
from ftp_lightning.schedule import Schedule, write_record

FORMAT = "ftp-lightning/schedules"
VERSION = 1
LARGEST = 64_000_000
"""Bytes a family may have [ours]: thousands of schedules."""


@dataclass(frozen=True)
class ScheduleFamily:
    """One schedule per budget, ascending; each may have kv modes of its own.

    ValueError for none, schedules of different numbers of blocks, or modes that only some of them say.

    >>> family = ScheduleFamily([Schedule([0.0, 0.4]), Schedule([0.2, 0.8])])
    >>> family.at(0.35).sparsity
    (0.1, 0.6)
    """

    schedules: tuple[Schedule, ...]

    def __init__(self, schedules: Mapping[float, Schedule] | list[Schedule] | tuple[Schedule, ...]):
        given = schedules.values() if isinstance(schedules, Mapping) else schedules
        given = [*given] if isinstance(given, Iterable) else [given]
        if not all(isinstance(schedule, Schedule) for schedule in given):
            raise ValueError(f"a family is made of schedules, and not of {schedules!r}")
        found = tuple(sorted(given, key=lambda schedule: schedule.budget))
        if not found:
            raise ValueError("a family needs at least one schedule, got none")
        if len({schedule.num_blocks for schedule in found}) > 1:
            raise ValueError(f"schedules of a family have {sorted({s.num_blocks for s in found})} blocks, must agree")
        if len({schedule.kv is None for schedule in found}) > 1:
            raise ValueError("schedules of a family must all say their kv modes, or none of them")
        object.__setattr__(self, "schedules", found)

    @property
    def budgets(self) -> tuple[float, ...]:
        return tuple(schedule.budget for schedule in self.schedules)

    @property
    def num_blocks(self) -> int:
        return self.schedules[0].num_blocks

    def at(self, budget: float) -> Schedule:
        """The schedule of mean `budget`, exactly: linear between the two neighbours, below the lowest towards dense.

        s = (1 - t) a + t b with t = (budget - B_a) / (B_b - B_a) has mean `budget` because a and b have theirs, and
        lies in [0, 1] as they do [ours]. Where the neighbours differ in the kv mode of a block, the nearer one says
        it, or the one that prunes the block. UserError beyond the highest budget: nothing is known there.
        """
        if not 0.0 <= budget <= self.budgets[-1] + 1e-9:
            raise UserError(
                f"budget is {budget}; the family was searched for {', '.join(f'{b:.4g}' for b in self.budgets)}\n"
                f"Give a budget of at most {self.budgets[-1]:.4g}, or search a higher one."
            )
        known = (Schedule([0.0] * self.num_blocks, self.schedules[0].kv), *self.schedules)
        above = next((place for place, one in enumerate(known) if one.budget >= budget - 1e-12), len(known) - 1)
        low, high = known[max(above - 1, 0)], known[above]
        if abs(high.budget - budget) <= 1e-12 or high.budget == low.budget:
            return high
        t = (budget - low.budget) / (high.budget - low.budget)
        between = [round((1 - t) * a + t * b, 15) for a, b in zip(low.sparsity, high.sparsity)]
        return Schedule(between, _modes_between(low, high, t)).after(low.seen, high.seen)

    def save(self, path: str | os.PathLike) -> None:
        """Write the schedules as JSON, whole or not at all."""
        write_record(Path(path), {"format": FORMAT, "version": VERSION, "schedules": self.records()})

    def records(self) -> list[dict]:
        """The schedules, JSON-able, each with its budget."""
        return [{"budget": one.budget} | one.record() for one in self.schedules]

    @classmethod
    def from_records(cls, records: list[dict]) -> ScheduleFamily:
        """What `records` describes. KeyError, TypeError or ValueError where it describes none."""
        return cls([Schedule.from_record(row) for row in records])

    @classmethod
    def load(cls, path: str | os.PathLike) -> ScheduleFamily:
        """Read what `save` wrote. UserError where the file is missing, broken or something else."""
        try:
            record = read_json(path, LARGEST)
            if not is_family(record) or record.get("version") != VERSION:
                raise ValueError(f'it is not "format": "{FORMAT}", "version": {VERSION}')
            return cls.from_records(record["schedules"])
        except OSError as error:
            reason = f"{error.strerror}"
        except KeyError as error:
            reason = f"it has no {error}"
        except (ValueError, TypeError) as error:
            reason = str(error)
        raise UserError(
            f"{path} is not a family of schedules: {reason}\nMake one with `ftp-lightning search --budgets`."
        )


def _modes_between(low: Schedule, high: Schedule, t: float) -> list[str] | None:
    """The kv modes at a share t of the way from one schedule to another; a dense block says nothing of its mode."""
    if low.kv is None or high.kv is None:
        return None
    near, far = (low, high) if t < 0.5 else (high, low)
    blocks = zip(near.sparsity, near.kv or (), far.kv or (), strict=True)
    return [own if sparsity > 0 else other for sparsity, own, other in blocks]


def is_family(record: object) -> bool:
    """Whether a JSON value is what `ScheduleFamily.save` writes."""
    return isinstance(record, dict) and record.get("format") == FORMAT


def holds_family(path: str) -> bool:
    """Whether a file is a schedules.json, which needs a budget to say which; False where it cannot be read."""
    try:
        return is_family(read_json(Path(path).expanduser(), LARGEST))
    except (OSError, ValueError):
        return False
