"""Small tools of the engine: wrapping a `forward` on the instance, changing a block's arguments, moving rows."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ftp_lightning.errors import UserError


class WrappedMethod:
    """Stands in `module.__dict__[name]` and calls `run(inner, args, kwargs)`; `undo` leaves no trace.

    An object and not a closure, so that `copy.deepcopy(model)` gives a copy whose wrapper calls the copy's weights.
    """

    def __init__(self, module: nn.Module, name: str, run: Callable):
        self.module, self.name, self.run = module, name, run
        self.previous = module.__dict__.get(name)
        functools.update_wrapper(
            self, self.inner, updated=()
        )  # not its __dict__: a wrapped wrapper keeps its own state
        module.__dict__[name] = self

    @property
    def inner(self) -> Callable:
        return self.previous or types.MethodType(getattr(type(self.module), self.name), self.module)

    def __call__(self, *args, **kwargs):
        return self.run(self.inner, args, kwargs)

    def undo(self) -> None:
        if self.previous is None:
            del self.module.__dict__[self.name]
        else:
            self.module.__dict__[self.name] = self.previous


class BlockCall:
    """The arguments of one call of a block, by name, whichever way they came."""

    def __init__(self, signature: inspect.Signature, cache_name: str, args: tuple, kwargs: dict):
        self.bound = signature.bind(*args, **kwargs)
        self.extra_name = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        self.cache_name = cache_name

    @property
    def _extra(self) -> dict:
        return self.bound.arguments.get(self.extra_name, {})

    def get(self, name: str):
        return self.bound.arguments.get(name, self._extra.get(name))

    @property
    def hidden(self) -> Tensor:
        return self.get("hidden_states")

    @property
    def cache(self):
        return self.get(self.cache_name)

    def run(self, inner: Callable, **changes) -> Tensor:
        """Call `inner` with some arguments changed; `cache` stands for whatever the block calls its cache."""
        if "cache" in changes:
            changes[self.cache_name] = changes.pop("cache")
        named, extra = dict(self.bound.arguments), dict(self._extra)
        for name, value in changes.items():
            (extra if name in extra else named)[name] = value
        if self.extra_name in named or extra:
            named.pop(self.extra_name, None)
        output = inner(**named, **extra)
        if not isinstance(output, Tensor):
            raise UserError(f"a block returned {type(output).__name__}, not a tensor: this model cannot be pruned.")
        return output

    def rows(self, index: Tensor) -> dict:
        """The arguments that go by token, for the tokens `index` (B, K) alone."""
        changes = {"hidden_states": take_rows(self.hidden, index)}
        embeddings = self.get("position_embeddings")
        if embeddings is not None:
            single = isinstance(embeddings, Tensor)
            changes["position_embeddings"] = (
                take_rows(embeddings, index) if single else tuple(take_rows(e, index) for e in embeddings)
            )
        if self.get("position_ids") is not None:
            changes["position_ids"] = take_rows(self.get("position_ids"), index)
        return changes


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B or 1, T, ...) at the tokens index (B, K) -> (B, K, ...)."""
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    tail = x.shape[2:]
    expanded = index.view(*index.shape, *[1] * len(tail)).expand(*index.shape, *tail)
    return x.expand(index.shape[0], *x.shape[1:]).gather(1, expanded)


def put_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """A copy of x (B, T, D) with the rows index (B, K) replaced."""
    if index.shape[0] == 1:
        return x.index_copy(1, index[0], rows)
    return x.scatter(1, index[..., None].expand_as(rows), rows)


def gather_index(keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Kept tokens of each row in ascending order: index (B, width), valid (B, width); the rest is filled with other
    tokens."""
    index = keep.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    return index, keep.gather(1, index)
