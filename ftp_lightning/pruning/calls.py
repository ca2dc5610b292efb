"""Small tools: wrapping a method on the instance, and how a module takes its arguments."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable

from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, where `model` is what it returned; else the model itself.

    Both share everything, so that a pruner attached to the one is in force through the other.
    """
    while isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        model = original
    return model


class WrappedMethod(functools.partial):
    """Stands in `module.__dict__[name]` for a method of a module; see `wrap`.

    No closure, so that `copy.deepcopy(model)` gives a copy whose wrapper calls the copy's weights.
    """


def wrap(module: nn.Module, name: str, run: Callable, *first) -> Callable[[], None]:
    """Let `run(*first, inner, *args, **kwargs)` stand for the method `inner` of this name; the function that undoes it
    leaves no trace."""
    previous = module.__dict__.get(name)
    inner = previous or types.MethodType(getattr(type(module), name), module)
    # not its __dict__: a wrapped wrapper keeps its own state
    module.__dict__[name] = functools.update_wrapper(WrappedMethod(run, *first, inner), inner, updated=())
    return functools.partial(_unwrap, module, name, previous)


def _unwrap(module: nn.Module, name: str, previous: Callable | None) -> None:
    if previous is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = previous


class Signature:
    """How blocks or attentions of one class take their arguments."""

    def __init__(self, kind: type[nn.Module], cache_name: str | None):
        signature = inspect.signature(kind.forward)
        own, *parameters = signature.parameters.values()
        self.bind = signature.replace(parameters=parameters).bind
        self.extra_name = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")
        self.cache_name = cache_name or ""
