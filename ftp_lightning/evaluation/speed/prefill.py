"""Measured time of prefill, decoding and routing, stock model and pruned one side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ftp_lightning.evaluation.speed.prompts import Prompts
from ftp_lightning.evaluation.speed.timing import Clock, Interval, in_turn, interleaved, median_interval, seconds
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.family import cache_argument
from ftp_lightning.routing import FixedRouter

WARMUP = 3
"""Pairs of prefills that are not counted."""

DECODE_WARMUP = 2
"""Pairs of decoding steps that are not counted."""


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of the stock and of the pruned run, and `ratio` = dense / pruned over the pairs."""

    dense_ms: float
    pruned_ms: float
    ratio: Interval
    pairs: int


def prefill_speed(
    model,
    pruner: TokenPruner,
    prompts: Prompts,
    pairs: int = 15,
    warmup: int = WARMUP,
    *,
    generator: torch.Generator,
    clock: Clock = time.perf_counter,
    settled: bool = False,
) -> Speed:
    """Time to first token: `pairs` dense and pruned prefills in turn, cache filled and last logit computed [ours].

    Attaching is outside the clock, the router inside. The tokens are random: where the router reads hidden states or
    attention, look at the realised sparsity. generator: on the CPU, draws the bootstrap. settled: before each timed
    prefill comes one that is not, in the same attachment; the first one after attaching is slower by a millisecond or
    two, which short prompts show.
    """
    about = {"generator": generator, "clock": clock, "settled": settled}
    return prefill_speeds(model, [pruner], prompts, pairs, warmup, **about)[0]


@torch.no_grad()
def prefill_speeds(
    model,
    pruners: Sequence[TokenPruner],
    prompts: Prompts,
    rounds: int = 15,
    warmup: int = WARMUP,
    *,
    generator: torch.Generator,
    clock: Clock = time.perf_counter,
    settled: bool = False,
) -> list[Speed]:
    """`prefill_speed` of several pruners: a round is one dense prefill and one under each pruner."""

    def timed(pruner: TokenPruner | None) -> float:
        with nullcontext() if pruner is None else pruner(model):
            if settled:
                prefill(model, prompts)
            return prefill_seconds(model, prompts, clock)

    times = in_turn([partial(timed, one) for one in (None, *pruners)], rounds, warmup)
    return [_speed(times[:, [0, place]], generator) for place in range(1, 1 + len(pruners))]


def prefill_seconds(model, prompts: Prompts, clock: Clock = time.perf_counter) -> float:
    """Seconds of one prefill of the model as it is, pruner or not."""
    return seconds(lambda: prefill(model, prompts), prompts.ids.device, clock)


def prefill(model, prompts: Prompts) -> Any:
    """The model's output: cache of the prompt, logits (B, 1, vocabulary) of its last token."""
    return model(**prompts.arguments, use_cache=True, logits_to_keep=prompts.last_place)


@torch.no_grad()
def decode_speed(
    model,
    pruner: TokenPruner,
    prompts: Prompts,
    steps: int,
    *,
    generator: torch.Generator,
    clock: Clock = time.perf_counter,
) -> Speed:
    """Time of a greedy decoding step: `steps` of them on the dense and on the pruned cache in turn [ours].

    The prefills are outside the clock, and so is attaching: every timed step follows one that is not, in the same
    attachment, as in a text that is generated. DECODE_WARMUP steps come before, so that the model needs
    T + `decode_positions(steps)` positions. Both caches are held at the same time.
    """
    dense, pruned = (Decoding(model, prompts, within, clock) for within in (nullcontext, lambda: pruner(model)))
    return _speed(interleaved(dense.step, pruned.step, steps, DECODE_WARMUP), generator)


def decode_positions(steps: int) -> int:
    """Positions beyond the prompt that `decode_speed` of `steps` steps needs."""
    return 2 * (steps + DECODE_WARMUP)


class Decoding:
    """A prompt with its cache, and one more token at every `step`. `within`: what the model is called in."""

    def __init__(
        self,
        model,
        prompts: Prompts,
        within: Callable[[], AbstractContextManager],
        clock: Clock = time.perf_counter,
    ):
        self.model, self.within, self.clock = model, within, clock
        with within():
            output = prefill(model, prompts)
        self.cache, self.token, self.mask = output.past_key_values, _greedy(output), prompts.mask

    def step(self) -> float:
        """Seconds of one greedy step on the whole batch, after one that is not timed."""
        with self.within():
            self._run()
            return seconds(self._run, self.token.device, self.clock)

    def _run(self) -> None:
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        more = {} if self.mask is None else {"attention_mask": self.mask}
        more[cache_argument(self.model)] = self.cache
        output = self.model(input_ids=self.token, use_cache=True, logits_to_keep=1, **more)
        self.token = _greedy(output)


@torch.no_grad()
def router_overhead(
    model, pruner: TokenPruner, prompts: Prompts, pairs: int = 15, warmup: int = WARMUP, *, generator: torch.Generator
) -> Interval:
    """Share of the pruned prefill that goes to scores and router: median of 1 - t_replay / t_router over pairs [ours].

    t_replay: a FixedRouter obeys the very decisions that the router took on these prompts, with the same kv modes. It
    counts its tokens on the device; the share is a few synchronisations too small on an accelerator.
    """
    with pruner(model):
        prefill(model, prompts)
    trace, padding = pruner.trace.routed, ~pruner.trace.routed.real
    parts = ["attention", "mlp"] if len(pruner.addressed) > 1 else pruner.addressed
    names = ["keep" if part == "block" else f"keep_{part}" for part in parts]
    decided = {name: [keep | padding for keep in getattr(trace, name)] for name in names}
    fixed = pruner.changed(router=FixedRouter(**decided), schedule=None, compensation=pruner.maps)

    def timed(which: TokenPruner) -> float:
        with which(model):
            return prefill_seconds(model, prompts)

    with_router, replayed = interleaved(lambda: timed(pruner), lambda: timed(fixed), pairs, warmup).T
    return median_interval(1.0 - replayed / with_router, generator)


@torch.no_grad()
def one_token_ms(model, prompts: Prompts, repeats: int = 5) -> float:
    """Median milliseconds of a stock prefill of one token per row: what launching the kernels alone costs."""
    one = Prompts(prompts.ids[:, -1:])
    prefill_seconds(model, one)
    return 1e3 * torch.tensor([prefill_seconds(model, one) for _ in range(repeats)]).median().item()


def _speed(times: Tensor, generator: torch.Generator) -> Speed:
    """times (pairs, 2) in seconds: dense, pruned."""
    dense, pruned = times.T
    ratio = median_interval(dense / pruned, generator)
    return Speed(1e3 * dense.median().item(), 1e3 * pruned.median().item(), ratio, len(times))


def _greedy(output: Any) -> Tensor:
    """(B, 1): the likeliest next token."""
    return output.logits[:, -1:].argmax(-1)
