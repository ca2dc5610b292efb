"""The schedule: which share of the tokens skips each block. Also the integer level step."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

from ftp_lightning.errors import UserError
from ftp_lightning.json_file import finite_numbers, read_json
from ftp_lightning.whole_files import write_text

KV = ("evict", "keep")
"""What skipped tokens leave in a block: no keys and values, or their own (`TokenPruner`)."""
FORMAT = "ftp-lightning/schedule"
VERSION = 1
_DENSE, _LATE, _MOST = 1 / 6, 0.25, 0.9
"""Of `Schedule.default`: share of blocks that stay dense, share of late blocks, and the level that is filled first."""
_LARGEST = 1_000_000
"""Bytes a schedule may have [ours]: 1000 blocks take 25 kB."""


@dataclass(frozen=True)
class Schedule:
    """The sparsity of every block: `sparsity[l]` is the share of tokens, in [0, 1], that skip block l.

    A schedule is found for a kv mode and is poor under another one [ours], so it may carry the mode it was found for.
    It is a value: equal and hashed by its numbers and modes.

    Where tasks were searched on, `seen` says how far: those documents are not evaluated (`evaluation.harness.seen`).

    >>> Schedule([0.0, 0.6], kv="keep").kv
    ('keep', 'keep')

    Args:
        sparsity: one number per block.
        kv: "evict", "keep", or one of them per block; None does not say.
        seen: task -> the last place that a search has looked at, in [0, 1].

    Raises:
        ValueError: no list of numbers, no block, a number outside [0, 1], an unknown mode, or modes for another number
            of blocks.
    """

    sparsity: tuple[float, ...]
    kv: tuple[str, ...] | None = None
    seen: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)

    def __init__(
        self, sparsity: Sequence[float], kv: str | Sequence[str] | None = None, seen: Mapping[str, float] | None = None
    ):
        values = _numbers(sparsity)
        if not values:
            raise ValueError("a schedule needs at least one block, got none")
        for block, s in enumerate(values):
            if not 0.0 <= s <= 1.0:  # also catches NaN
                raise ValueError(f"sparsity of block {block} is {s}, must be in [0, 1]")
        object.__setattr__(self, "sparsity", values)
        object.__setattr__(self, "kv", None if kv is None else kv_modes(kv, len(values)))
        object.__setattr__(self, "seen", _seen(seen or {}))

    @classmethod
    def uniform(cls, num_blocks: int, budget: float) -> Schedule:
        """The schedule with the same sparsity `budget` in each of `num_blocks` blocks."""
        return cls([budget] * _blocks(num_blocks))

    @classmethod
    def stages(
        cls, num_blocks: int, stages: Sequence[tuple[int, float]], kv: str | Sequence[str] | None = None
    ) -> Schedule:
        """A schedule of few cut points: each (first block, sparsity) holds up to the next one, and before the first one
        all blocks are dense. [ours]

        >>> Schedule.stages(6, [(2, 0.5), (4, 0.9)], kv="keep").sparsity
        (0.0, 0.0, 0.5, 0.5, 0.9, 0.9)

        Args:
            num_blocks: blocks of the model.
            stages: pairs in rising order of their first blocks, which are in [0, num_blocks).
            kv: as for `Schedule`.

        Raises:
            ValueError: no stage, first blocks that do not rise or lie outside of the model, or what `Schedule` refuses.
        """
        try:
            starts = [operator.index(first) for first, _ in stages]
        except (TypeError, ValueError):
            raise ValueError(f"stages are {stages!r}, must be pairs (first block, sparsity)") from None
        num_blocks = _blocks(num_blocks)
        if not starts or starts != sorted({*starts}) or not 0 <= starts[0] <= starts[-1] < num_blocks:
            raise ValueError(f"stages begin at blocks {starts}; these must rise and lie in 0 to {num_blocks - 1}")
        sparsity = [0.0] * num_blocks
        for first, level in stages:
            sparsity[first:] = [level] * (num_blocks - first)
        return cls(sparsity, kv)

    @classmethod
    def default(cls, num_blocks: int, budget: float, kv: str | Sequence[str] | None = None) -> Schedule:
        """The schedule for someone who has trained and searched nothing; it holds on real models, unlike `uniform`.

        The first sixth of the blocks is dense. The budget goes to the last quarter first, last block first, up to 0.9
        (the last block up to 1, which costs the continuation nothing under `keep`). The rest goes evenly to the blocks
        between. Late blocks `keep` the keys and values of skipped tokens, the others `evict` them. Only what these
        cannot hold goes further: later blocks up to 1, and above a budget of about 0.8 the first ones. [ours]

        Why: a token that skips the first blocks under `keep` leaves keys and values of a raw embedding in all later
        ones. Late blocks have read what they need from the prompt. Measured with the static router, float32, on
        validation books: KL to dense per token of 24 after 144 tokens of prose (5 windows), and "The special magic
        number for CITY is 7 DIGITS." asked at the end of 220 to 300 tokens, answers kept of those dense gets right:

        | KL on prose; answers kept | 30 %          | 50 %          |
        |---------------------------|---------------|---------------|
        | SmolLM2-135M-Instruct     | 0.11; 7 / 10  | 0.26; 3 / 10  |
        | Gemma 3 270M              | 0.05; 6 / 7   | 0.26; 3 / 7   |
        | embedded (own questions)  | 0.04; 36 / 40 | 0.21; 26 / 40 |

        `uniform` under `keep` costs SmolLM2 a KL of 8.1 on this prose at 10 %. Three other ways were worse on its ten
        answers. The middle under `keep` from the first third on keeps 0 of them at 50 %. At 30 % a ramp under `keep`
        keeps 6, and tokens by attention rank 4. The sets are small: the order of near neighbours is not certain.

        Args:
            num_blocks: blocks of the model.
            budget: mean sparsity.
            kv: the mode of all blocks, or one per block, in place of the default's. The budget goes to blocks that
                `keep` first, from the last on, then evenly to blocks that `evict`. So "keep" spends it in late blocks
                alone, "evict" evenly behind the dense ones.

        Raises:
            ValueError: a budget outside [0, 1], no whole number of blocks, or what `Schedule` refuses.
        """
        num_blocks = _blocks(num_blocks)
        if not isinstance(budget, SupportsFloat) or not 0.0 <= float(budget) <= 1.0:
            raise ValueError(f"budget is {budget!r}, must be in [0, 1]")
        late = max(1, round(_LATE * num_blocks))
        dense = min(max(1, round(_DENSE * num_blocks)), num_blocks - late)
        modes = kv_modes(["evict"] * (num_blocks - late) + ["keep"] * late if kv is None else kv, num_blocks)
        routed, last = range(dense, num_blocks), num_blocks - 1
        steps: list[tuple[Sequence[int], float]] = [
            ([block], 1.0 if block == last else _MOST) for block in reversed(routed) if modes[block] == "keep"
        ]
        evicting = [block for block in routed if modes[block] == "evict"]
        if steps and evicting:
            steps.append((evicting, _MOST))
        return cls(_filled(num_blocks, budget, [*steps, (routed, 1.0), (range(dense), 1.0)]), modes)

    @property
    def num_blocks(self) -> int:
        return len(self.sparsity)

    @property
    def budget(self) -> float:
        """Mean token sparsity over the blocks (method.md, section 2)."""
        return math.fsum(self.sparsity) / self.num_blocks

    def under(self, kv: str | Sequence[str] | None) -> Schedule:
        """The same numbers, labelled as found for another kv mode; None takes the label off."""
        return Schedule(self.sparsity, kv, self.seen)

    def after(self, *seen: Mapping[str, float]) -> Schedule:
        """The same schedule, also selected on the documents that other searches have looked at."""
        tasks = {task for one in (self.seen, *seen) for task in one}
        last = {task: max(one.get(task, 0.0) for one in (self.seen, *seen)) for task in sorted(tasks)}
        return Schedule(self.sparsity, self.kv, last)

    def key(self) -> str:
        """16 hex digits of the sha256 of the value: the same value gives the same key on every machine."""
        value = self.sparsity if self.kv is None else [self.sparsity, self.kv]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

    def record(self) -> dict:
        """The value, JSON-able: `sparsity` and, where they are known, `kv` (one mode, or one per block) and `seen`."""
        record: dict = {"sparsity": list(self.sparsity)}
        if self.kv is not None:
            record["kv"] = self.kv[0] if len(set(self.kv)) == 1 else list(self.kv)
        return record | ({"seen": dict(self.seen)} if self.seen else {})

    @classmethod
    def from_record(cls, record: dict) -> Schedule:
        """The schedule that `record` describes. KeyError or ValueError where it describes none."""
        return cls(finite_numbers(record["sparsity"], "sparsity"), record.get("kv"), record.get("seen"))

    def save(self, path: str | os.PathLike) -> None:
        """Write the schedule as JSON, whole or not at all."""
        write_record(Path(path), {"format": FORMAT, "version": VERSION} | self.record() | {"key": self.key()})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Schedule:
        """Read what `save` wrote. UserError where the file is missing, broken or something else."""
        try:
            record = read_json(path, _LARGEST)
            if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
                raise ValueError(f'it is not "format": "{FORMAT}", "version": {VERSION}')
            found = cls.from_record(record)
            if record.get("key") not in (None, found.key()):
                raise ValueError('its numbers are not those it was written with; if you changed them, take "key" out')
            return found
        except OSError as error:
            raise UserError(
                f"cannot read the schedule {path}: {error.strerror}\nGive the path of a schedule.json."
            ) from None
        except KeyError as error:
            reason = f"it has no {error}"
        except (ValueError, TypeError) as error:
            reason = str(error)
        raise UserError(f"{path} is not a schedule: {reason}\nMake one with `ftp-lightning search` or Schedule.save.")


def _numbers(sparsity: Any) -> tuple[float, ...]:
    """One number per block; ValueError where it is none. + 0.0: no negative zero."""
    try:
        if isinstance(sparsity, str | bytes | Mapping):
            raise TypeError("no list")
        return tuple(float(s) + 0.0 for s in sparsity)
    except (TypeError, ValueError):
        told = repr(sparsity)
        short = told if len(told) < 60 else f"{told[:57]}..."
        raise ValueError(f"sparsity is {short}, must be one number per block, as [0.0, 0.4]") from None


def _blocks(number: Any) -> int:
    """A number of blocks; ValueError where it is none."""
    try:
        blocks = operator.index(number)
    except TypeError:
        blocks = 0
    if blocks < 1:
        raise ValueError(f"num_blocks is {number!r}, must be a whole number: a schedule needs at least one block")
    return blocks


def _seen(seen: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(seen, Mapping) or not all(isinstance(s, int | float) and 0 <= s <= 1 for s in seen.values()):
        raise ValueError("seen must give a number in [0, 1] for each task")
    return {str(task): float(last) for task, last in seen.items()}


def kv_modes(kv: str | Sequence[str], blocks: int) -> tuple[str, ...]:
    """One kv mode per block. ValueError for an unknown mode, or a list for another number of blocks."""
    modes = (kv,) * blocks if isinstance(kv, str) or not isinstance(kv, Iterable) else tuple(kv)
    for mode in modes:
        if mode not in KV:
            raise ValueError(f"kv is {mode!r}, must be one of {', '.join(KV)}.")
    if len(modes) != blocks:
        raise ValueError(f"kv lists {len(modes)} blocks, the schedule {blocks}.")
    return modes


def kv_name(kv: str | Sequence[str]) -> str:
    """The kv mode of all blocks, or "mixed"."""
    modes = (kv,) if isinstance(kv, str) else kv
    return modes[0] if len(set(modes)) == 1 else "mixed"


def kv_text(modes: Sequence[str]) -> str:
    """The kv mode of all blocks, or the mode of every block: "evict, keep, keep"."""
    return modes[0] if len(set(modes)) == 1 else ", ".join(modes)


def first_routed(sparsity: Iterable[float]) -> int | None:
    """The lowest block that tokens skip; None where every block is dense."""
    return next((block for block, share in enumerate(sparsity) if share > 0.0), None)


def write_record(path: Path, record: dict) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def _filled(num_blocks: int, budget: float, steps: Iterable[tuple[Sequence[int], float]]) -> list[float]:
    """Spend the budget step by step: all blocks of a step rise together up to its level, or as far as the budget goes.

    The last step has to be wide enough for what is left.
    """
    sparsity, left = [0.0] * num_blocks, num_blocks * budget
    for blocks, level in steps:
        for number, block in enumerate(blocks):
            more = max(0.0, min(level - sparsity[block], left / (len(blocks) - number)))
            sparsity[block] += more
            left = max(0.0, left - more)
    return [min(1.0, s) for s in sparsity]


def level_step(num_blocks: int, budget: float, step: float = 0.05) -> float:
    """The step nearest the requested one that divides num_blocks * budget, so that integer levels meet the budget.

    N * B / step is then an integer k >= 1, the sum of all levels. [ours] A budget of 0 has no levels: `step` comes
    back.
    """
    if not 0.0 <= budget < 1.0:
        raise UserError(f"budget is {budget}, must be in [0, 1)\nIt is the mean share of tokens that skip a block.")
    if not 0.0 < step <= 1.0:
        raise UserError(f"step is {step}, must be in (0, 1]\nIt is the difference of two neighbouring sparsity levels.")
    total = num_blocks * budget
    if total == 0.0:
        return step
    fewest = max(1, math.floor(total / step))
    return min(
        (total / k for k in (fewest, fewest + 1) if total / k <= 1.0), key=lambda candidate: abs(candidate - step)
    )
