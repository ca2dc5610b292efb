"""A pruner in force on one model: the wrappers that stand in for forwards, and what a wrapper finds running.

    model(...) -> run_model -> run_decoder: opens a `Forward`
                  -> run_block, block by block: a `BlockRun` asks the router (`decide`) and runs the kept tokens
                     -> run_projection, attend: ask the `BlockRun` what is wanted of them

All that belongs to one call is in its `Forward`, which the thread's `ambient` holds. `torch.compile` does not trace the
wrappers of model, decoder and blocks: dynamo loses what they write into thread-local state, and the model would run
dense.

Shapes: B rows, T new tokens of this forward (padding included), D hidden size.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.attention import attend, tap_attention
from ftp_lightning.pruning.block_run import BlockRun
from ftp_lightning.pruning.calls import wrap
from ftp_lightning.pruning.devices import brought, home
from ftp_lightning.pruning.family import CACHE, cache_argument, given_cache, heeds_logits_to_keep
from ftp_lightning.pruning.forward import open_forward
from ftp_lightning.pruning.generation import Generation, join_outputs, split_arguments
from ftp_lightning.pruning.parts import run_attention, run_mlp_entry, run_mlp_exit
from ftp_lightning.pruning.plan import Plan
from ftp_lightning.pruning.refusals import check_cache, spoil
from ftp_lightning.pruning.scores import Tapped
from ftp_lightning.pruning.scouting import scouted
from ftp_lightning.pruning.site import sites_of
from ftp_lightning.training.key_gates import gated_keys

if TYPE_CHECKING:
    from ftp_lightning.pruning.pruner import TokenPruner
    from ftp_lightning.training.compensation import Compensation


class Attached:
    """Made by `TokenPruner.attach`, gone after `undo`.

    Attributes:
        plan: what is done with the model and each of its blocks.
        home: of a dispatched model the device where routers decide; None: where the tokens are.
        ambient: what this thread is doing.
        gate: what `undo` waits at.
        full_queries: blocks whose keys and values cannot be made with the queries of one head.
        maps: what skipped tokens get under the pruner's schedule; compensations: the same, where tokens are and in
            their dtype.
        taps: of each block, what attends in place of its attention function.
        gives_router_logits: the model may be asked for those of a mixture of experts.
    """

    def __init__(self, pruner: TokenPruner, model: nn.Module, decoder: nn.Module, blocks: nn.ModuleList):
        self.pruner, self.model, self.ambient = pruner, model, pruner.ambient
        self.decoder, self.blocks, sites = decoder, blocks, sites_of(model, blocks)
        self.plan = Plan.of(pruner, model, sites)
        self.home = home(model) if any(site.place for site in sites) else None
        self.gate = Gate()
        self.full_queries: set[int] = set()
        self.maps = pruner.maps
        self.compensations: dict[tuple[torch.device, torch.dtype], Compensation] = {}
        self.taps = [functools.partial(self.attend, index) for index in range(len(blocks))]
        self.gives_router_logits = hasattr(decoder.config, "output_router_logits")
        self._slices, self._cache = heeds_logits_to_keep(model), cache_argument(decoder)
        self._undo: list[Callable[[], None]] = []
        try:
            self._install(model)
        except BaseException:
            self._remove()
            raise

    def __reduce_ex__(self, protocol):
        raise UserError(
            "a pruner that is attached cannot be pickled, nor can its model.\n"
            "Detach it first, or store it with `pruner.save(folder)` and read both with `load_pruned(folder)`."
        )

    def __deepcopy__(self, memo: dict) -> Attached:
        """Of a model that is copied: its pruner's copy is attached to it."""
        memo[id(self)] = other = Attached.__new__(Attached)
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        other.pruner.is_attached(other)
        return other

    # ---------------------------------------------------------------- in and out

    def _install(self, model: nn.Module) -> None:
        self._signature = inspect.signature(type(self.decoder).forward)
        self._wrap(self.decoder, "forward", self.run_decoder)
        if model is not self.decoder:
            self._wrap(model, "forward", self.run_model)
        configs: dict = {}
        for block, plan in zip(self.blocks, self.plan.blocks):
            site = plan.site
            self._wrap(block, "forward", self.run_block, plan.index)
            for kind, projections in (("query", (site.query,)), ("key_value", site.key_value)):
                for projection in projections if plan.splits_keys else ():
                    if projection is not None:
                        width = projection.out_features
                        self._wrap(projection, "forward", self.run_projection, plan.index, kind, width)
            if self.plan.enters_parts and site.mlp is not None:
                entry, leave = site.mlp
                self._wrap(site.attention, "forward", self.run_part, run_attention)
                self._wrap(entry, "forward", self.run_part, run_mlp_entry)
                if leave is not entry:
                    self._wrap(leave, "forward", self.run_part, run_mlp_exit)
            self._undo.append(tap_attention(site.attention, self.taps[plan.index], configs))
        if hasattr(model, "generate"):
            self._wrap(model, "generate", self.run_generate)
        own = {"pruner": model.__dict__["pruner"]} if "pruner" in model.__dict__ else {}
        model.__dict__["pruner"] = self.pruner
        self._undo.append(functools.partial(_put_back, model, own))

    def _wrap(self, module: nn.Module, name: str, run: Callable, *first) -> None:
        self._undo.append(wrap(module, name, run, *first))

    def undo(self) -> None:
        """Leave the model as it was, once no call is running in any thread."""
        if self.gate.close():
            self._remove()

    def _remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    # ---------------------------------------------------------------- the model's forward

    def run_generate(self, inner, *args, **kwargs):
        """`generate`, refused where it would route a prompt more than once."""
        with self.gate.call() as pruned:
            if not pruned:
                return inner(*args, **kwargs)
            check_cache(given_cache(kwargs))
            if self.ambient.training is not None:
                raise UserError("generate makes no training forward.\nCall it outside of `pruner.masked(...)`.")
            generation = Generation.of(self.model, args, kwargs, self.ambient.routes_chunks)
            with self.ambient.having(generation=generation):
                return inner(*args, **kwargs)

    @torch.compiler.disable
    def run_model(self, inner, *args, **kwargs):
        """The model with its output head: how many last positions it reads."""
        asked = kwargs.get("logits_to_keep")
        reads_all = kwargs.get("output_hidden_states") or self.model.config.output_hidden_states or not self._slices
        last = None if asked is None or reads_all else _last_tokens(asked)
        if last == self.ambient.last_tokens:  # mostly both are None
            return inner(*args, **kwargs)
        with self.ambient.having(last_tokens=last):
            return inner(*args, **kwargs)

    @torch.compiler.disable
    def run_decoder(self, inner, *args, **kwargs):
        """The decoder: one forward, or two where guesses come with the end of a prompt (assisted decoding)."""
        with self.gate.call() as pruned:
            if self.ambient.stock or not pruned:  # a scout runs the model as it is
                return inner(*args, **kwargs)
            arguments = dict(kwargs)
            if args:
                arguments = self._signature.bind(self.decoder, *args, **kwargs).arguments
                arguments.pop("self", None)
                arguments |= arguments.pop("kwargs", {})
            if self._cache in arguments:
                arguments[CACHE] = arguments.pop(self._cache)
            cache, generation, past = arguments.get(CACHE), self.ambient.generation, 0
            if cache is not None:
                check_cache(cache)
                past = cache.get_seq_length()
            if generation is not None and not generation.is_about(cache):
                generation = None  # it is about another text
            if generation is not None and generation.guesses_in(past, arguments):
                prompt, guesses = split_arguments(arguments, generation.prompt_end - past, past)
                first = self._run_once(inner, prompt, past, generation)
                return join_outputs(first, self._run_once(inner, guesses, generation.prompt_end, generation))
            return self._run_once(inner, arguments, past, generation)

    def _run_once(self, inner, arguments: dict, past: int, generation: Generation | None):
        ambient, pruner = self.ambient, self.pruner
        forward = open_forward(self, arguments, past, generation)
        if forward.training is not None:
            arguments |= {"use_cache": False, CACHE: None}
        # of a forward that changes nothing the wrappers know nothing, so that they cost next to nothing
        outer, ambient.forward = ambient.forward, forward if forward.active else None
        try:
            if self.plan.needs.scout is not None and forward.routed is not None and forward.active:
                forward.scouted = scouted(self, inner, arguments, forward)
            if CACHE in arguments:
                arguments[self._cache] = arguments.pop(CACHE)
            output = inner(**arguments)
        except BaseException:
            spoil(given_cache(arguments), len(self.blocks))
            raise
        finally:
            ambient.forward = outer
        if not forward.active:
            forward.note_dense(len(self.blocks))
        other_text = ambient.generation is not None and generation is None
        own_prompt = forward.is_prompt and not other_text
        forward.trace.prompt = forward.trace if own_prompt else pruner.trace.prompt
        ambient.last = forward.trace, forward.routings
        pruner.latest.told = threading.get_ident(), forward.trace, forward.routings
        return output

    # ---------------------------------------------------------------- a block's forward, and what is in it

    def run_block(self, index: int, inner, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():  # `disable` alone costs more than this look
            return self.run_block_untraced(index, inner, *args, **kwargs)
        forward = self.ambient.forward
        if forward is None:
            return inner(*args, **kwargs)
        plan = self.plan.blocks[index]
        if plan.site.place is not None:
            args, kwargs = brought(args, kwargs, plan.site.place)
            forward.go_to(plan.site.place)
        forward.run = BlockRun(self, plan, forward, inner, args, kwargs, index in forward.scored)
        try:
            return forward.run.compute()
        finally:
            forward.run = None

    run_block_untraced = torch.compiler.disable(run_block)

    def run_part(self, run_it, inner, *args, **kwargs):
        """The forward of an attention or of an MLP that other tokens enter than the rest of the block."""
        forward = self.ambient.forward
        run = None if forward is None else forward.run
        return inner(*args, **kwargs) if run is None or run.apart is None else run_it(run, inner, args, kwargs)

    def run_projection(self, index: int, kind: str, width: int, inner, *args, **kwargs) -> Tensor:
        """A projection that nobody reads is silent: zeros without a multiplication, which may be written to (OLMo).

        Queries of one head do where a block views them by head; what follows then costs next to nothing.
        """
        forward = self.ambient.forward
        if forward is None or forward.run is None or forward.run.silent != kind:
            return inner(*args, **kwargs)
        if kind == "query" and index not in self.full_queries:
            width = getattr(self.plan.blocks[index].site.attention, "head_dim", None) or width
        return args[0].new_zeros(*args[0].shape[:-1], width)

    def attend(self, index: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, kwargs: dict):
        """The attention function of a block: over the keys that its tokens may see."""
        forward, plan = self.ambient.forward, self.plan.blocks[index]
        run = None if forward is None else forward.run
        if run is None:
            return plan.stock(module, query, key, value, mask, **kwargs)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        if run.wants_scores:
            run.tapped = Tapped(query, key, scaling, kwargs.get("softcap"), plan.site.window)
        if run.sight is None:
            return plan.stock(module, query, key, value, mask, **kwargs)
        kwargs.pop("position_ids", None)  # gaps in them would pass for packed texts; rotations are done
        output, weights = attend(plan, run.sight, module, query, key, value, kwargs)
        if run.sight.key_gates is not None:
            if kwargs.get("softcap") is not None:
                raise UserError("key gates do not know soft-capped attention logits.\nTrain without --key_gates.")
            output = gated_keys(output, run.sight.key_gates, query, key, value, run.sight, scaling)
        return output, weights


class Gate:
    """Lets calls run side by side. Closing waits for those that run; a call that comes later runs the stock model, and
    waits for nothing: one that runs may be waiting for it."""

    def __init__(self):
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}  # thread -> how deep it is in calls
        self._state = "open"
        _GATES.add(self)

    def __reduce__(self):
        return Gate, ()

    def forked(self) -> None:
        """In a process that was forked: of its parent's threads only this one is there."""
        own = threading.get_ident()
        self._changed, self._inside = threading.Condition(), {t: n for t, n in self._inside.items() if t == own}

    @contextmanager
    def call(self) -> Iterator[bool]:
        """Inside, a call runs; whether it may run pruned."""
        own = threading.get_ident()
        with self._changed:
            pruned = self._state == "open" or own in self._inside
            if pruned:
                self._inside[own] = self._inside.get(own, 0) + 1
        try:
            yield pruned
        finally:
            with self._changed:
                if pruned and self._inside[own] > 1:
                    self._inside[own] -= 1
                elif pruned:
                    del self._inside[own]
                    self._changed.notify_all()

    def close(self) -> bool:
        """Wait until no call is running, and let no more in; False where another thread has closed it.

        Where the wait is interrupted (Ctrl-C) it stays open. UserError inside a call of the same thread.
        """
        with self._changed:
            if threading.get_ident() in self._inside:
                raise UserError("a pruner cannot be detached while its model is running.\nDetach it after the call.")
            if self._state == "closed":
                return False
            self._state = "closing"
            try:
                self._changed.wait_for(lambda: not self._inside)
            except BaseException:
                self._state = "open" if self._state == "closing" else self._state
                raise
            before, self._state = self._state, "closed"
            return before != "closed"


_GATES: weakref.WeakSet[Gate] = weakref.WeakSet()


def _forked() -> None:
    for gate in _GATES:
        gate.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _last_tokens(asked) -> int | None:
    """How many last positions a `logits_to_keep` reads; None: perhaps all, or only the device knows."""
    if isinstance(asked, Tensor):
        return -int(asked.min()) if asked.device.type == "cpu" and asked.numel() and int(asked.max()) < 0 else None
    return asked if isinstance(asked, int) and asked > 0 else None


def _put_back(model: nn.Module, own: dict) -> None:
    """Give the model its own attribute named `pruner` back, where it had one."""
    model.__dict__.pop("pruner", None)
    model.__dict__.update(own)
