"""Small tools: wrapping a method on the instance, and changing the arguments of a call."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable

from torch import Tensor, nn

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.kept import take_tokens


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, where `model` is what it returned; else the model itself.

    Both share everything, so that a pruner attached to the one is in force through the other.
    """
    while isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        model = original
    return model


class WrappedMethod:
    """Stands in `module.__dict__[name]` and calls `run(inner, args, kwargs)`; `undo` leaves no trace.

    An object and not a closure, so that `copy.deepcopy(model)` gives a copy whose wrapper calls the copy's weights.
    """

    def __init__(self, module: nn.Module, name: str, run: Callable):
        self.module, self.name, self.run = module, name, run
        self.previous = module.__dict__.get(name)
        # not its __dict__: a wrapped wrapper keeps its own state
        functools.update_wrapper(self, self.inner, updated=())
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


class Signature:
    """How blocks or attentions of one class take their arguments."""

    def __init__(self, kind: type[nn.Module], cache_name: str | None):
        signature = inspect.signature(kind.forward)
        own, *parameters = signature.parameters.values()
        self.bind = signature.replace(parameters=parameters).bind
        self.extra_name = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        self.cache_name = cache_name


class Call:
    """The arguments of one call of a block or an attention, by name, whichever way they came."""

    def __init__(self, signature: Signature, args: tuple, kwargs: dict):
        self.signature = signature
        self.named: dict = dict(signature.bind(*args, **kwargs).arguments)
        self.extra = self.named.pop(signature.extra_name, {})

    def get(self, name: str):
        return self.named.get(name, self.extra.get(name))

    @property
    def hidden(self) -> Tensor:
        return self.get("hidden_states")

    @property
    def cache(self):
        return self.get(self.signature.cache_name)

    def run(self, inner: Callable, **changes):
        """Call `inner` with some arguments changed; `cache` stands for whatever the block calls its cache."""
        if "cache" in changes:
            changes[str(self.signature.cache_name)] = changes.pop("cache")
        named, extra = dict(self.named), dict(self.extra)
        for name, value in changes.items():
            (extra if name in extra else named)[name] = value
        return inner(**named, **extra)

    def at(self, index: Tensor) -> dict:
        """The arguments that go by token, for the tokens `index` (B, K) alone."""
        changes = {"hidden_states": take_tokens(self.hidden, index)}
        embeddings = self.get("position_embeddings")
        if isinstance(embeddings, Tensor):
            changes["position_embeddings"] = take_tokens(embeddings, index)
        elif embeddings is not None:
            changes["position_embeddings"] = tuple(take_tokens(e, index) for e in embeddings)
        positions = self.get("position_ids")
        if positions is not None:
            if positions.dim() != 2:
                raise UserError("position_ids of shape (batch, tokens) are understood; this model has others.")
            changes["position_ids"] = take_tokens(positions, index)
        return changes


def tensor_of(output) -> Tensor:
    """A block's output; UserError where it is none that is understood."""
    if not isinstance(output, Tensor):
        raise UserError(f"a block returned {type(output).__name__}, not a tensor: this model cannot be pruned.")
    return output
