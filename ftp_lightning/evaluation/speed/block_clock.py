"""What one stock block takes on a prompt of n tokens.

Shapes: B rows, T tokens of the prompt, K of them kept, H heads, d their size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ftp_lightning.evaluation.speed.prompts import Prompts
from ftp_lightning.evaluation.speed.timing import Clock, interleaved, seconds
from ftp_lightning.pruning.family import cache_name, find_attention, find_blocks

WARMUP = 2
"""Pairs of block calls that are not counted."""


class _Caught(Exception):
    """Carries the arguments of a block out of the model's forward."""


class BlockClock:
    """Median seconds of one block in the middle of the model on the last n tokens of `prompts`, each n measured once.

    The block is called just as the stock model calls it on a prompt of n tokens, without a cache: positions, mask and
    whatever else its family hands it are caught on the way. Every n is timed in turn with the whole prompt, `repeats`
    times. `clock` should be the one that the prefills are timed with.
    """

    def __init__(self, model, prompts: Prompts, repeats: int = 7, clock: Clock = time.perf_counter):
        self.model, self.prompts, self.repeats, self.clock = model, prompts, repeats, clock
        blocks = find_blocks(model)
        self.block = blocks[len(blocks) // 2]
        self.whole = prompts.shape[1]
        self._measured: dict[tuple[int, str], float] = {}

    def seconds(self, tokens: int, kv: str = "evict") -> float:
        """Seconds on `tokens` tokens; under `keep` with keys and values, and attention to them, of the whole prompt."""
        key = (tokens, "evict" if tokens == self.whole else kv)
        if key not in self._measured:
            self._measured[key] = self._keep(tokens) if key[1] == "keep" else self._evict(tokens)
        return self._measured[key]

    @torch.no_grad()
    def _evict(self, tokens: int) -> float:
        """t(n) = t(T) * median of the pairs' t(n) / t(T): drifts of the clock rate cancel."""
        if tokens == 0:
            return 0.0
        whole = self._timer(self._call(self.whole))
        if tokens == self.whole:
            return _median(interleaved(whole, whole, self.repeats, WARMUP).flatten())
        small, large = interleaved(self._timer(self._call(tokens)), whole, self.repeats, WARMUP).T
        return self.seconds(self.whole) * _median(small / large)

    @torch.no_grad()
    def _keep(self, kept: int) -> float:
        """t(K) - attention of K to K + attention of K to T + projections of the keys and values of T - K."""
        attention = self._attention(kept, self.whole) - self._attention(kept, kept) if kept else 0.0
        return max(self.seconds(kept) + attention, 0.0) + self._projections(self.whole - kept)

    def _call(self, tokens: int) -> Callable[[], Any]:
        """The block on the last `tokens` tokens, as the model itself calls it."""

        def catch(module, args, kwargs):
            raise _Caught(args, kwargs)

        handle = self.block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model(**self.prompts.last(tokens).arguments, use_cache=False)
        except _Caught as caught:
            args, kwargs = caught.args
        finally:
            handle.remove()
        kwargs = {name: value for name, value in kwargs.items() if name != cache_name(self.block)}
        return lambda: self.block(*args, **kwargs)

    def _timer(self, run: Callable[[], Any]) -> Callable[[], float]:
        return lambda: seconds(run, self.model.device, self.clock)

    def _alone(self, run: Callable[[], Any]) -> float:
        timer = self._timer(run)
        return _median(torch.tensor([timer() for _ in range(WARMUP + self.repeats)][WARMUP:]))

    def _attention(self, queries: int, keys: int) -> float:
        """Seconds of attention alone: by the kernel's causal rule where the stock block has it, else under a mask."""
        heads, _, size = self._heads()
        q, k, v = (self._random(heads, n, size) for n in (queries, keys, keys))
        mask = None
        if queries != keys or self.prompts.mask is not None:
            places = torch.linspace(0, keys - 1, queries, device=q.device).round()
            mask = (torch.arange(keys, device=q.device) <= places[:, None])[None, None]
        return self._alone(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None))

    def _projections(self, tokens: int) -> float:
        """Seconds of the key and value projections, as one product."""
        if tokens == 0:
            return 0.0
        _, key_heads, size = self._heads()
        width = self.model.config.get_text_config().hidden_size
        hidden, weight = self._random(tokens, width), self._random(2 * key_heads * size, width)[0]
        return self._alone(lambda: F.linear(hidden, weight))

    def _heads(self) -> tuple[int, int, int]:
        """Query heads, key heads, size of a head."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(find_attention(self.block), "head_dim", None) or config.hidden_size // heads
        return heads, getattr(config, "num_key_value_heads", None) or heads, size

    def _random(self, *shape: int) -> torch.Tensor:
        """(B, *shape) of small numbers that follow a fixed pattern; no generator is touched."""
        count = self.prompts.shape[0] * torch.Size(shape).numel()
        values = torch.arange(count, device=self.model.device).remainder_(251).to(self.model.dtype) / 251 - 0.5
        return values.view(self.prompts.shape[0], *shape)


def _median(values: torch.Tensor) -> float:
    return values.median().item()
