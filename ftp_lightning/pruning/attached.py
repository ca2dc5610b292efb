"""A pruner in force on one model: the wrappers that stand in for forwards, and what a wrapper finds running.

    model(...) -> run_model -> run_decoder: opens a `Forward`
                  -> run_block, block by block: a `BlockRun` asks the router (`decide`) and runs the kept tokens
                     -> run_projection, attend: ask the `BlockRun` what is wanted of them

All that belongs to one call is in its `Forward`, which the thread's `ambient` holds.

Shapes: B rows, T new tokens of this forward (padding included), D hidden size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ftp_lightning.attention_score import check_ends, spans_of_rows
from ftp_lightning.errors import UserError
from ftp_lightning.pruning.ambient import Gate
from ftp_lightning.pruning.attention import attend, interface, tap_attention
from ftp_lightning.pruning.block_run import BlockRun
from ftp_lightning.pruning.cache import RoutedLayer
from ftp_lightning.pruning.calls import WrappedMethod
from ftp_lightning.pruning.devices import brought, home
from ftp_lightning.pruning.family import heeds_logits_to_keep
from ftp_lightning.pruning.forward import Forward
from ftp_lightning.pruning.generation import Generation, join_outputs, split_arguments
from ftp_lightning.pruning.parts import run_attention, run_mlp_entry, run_mlp_exit
from ftp_lightning.pruning.refusals import check_cache, check_forward, check_router_logits, spoil
from ftp_lightning.pruning.scores import Tapped, scaling_of
from ftp_lightning.pruning.scouting import scouted
from ftp_lightning.pruning.site import sites_of
from ftp_lightning.pruning.table import ContinuationTable, PromptTable
from ftp_lightning.routing.fixed import FixedRouter
from ftp_lightning.training.compensation import Compensation
from ftp_lightning.training.key_gates import gated_keys

if TYPE_CHECKING:
    from ftp_lightning.pruning.pruner import TokenPruner


class Attached:
    """Made by `TokenPruner.attach`, gone after `undo`.

    Attributes:
        sites: what is known of each block.
        home: of a dispatched model the device where routers decide; None: where the tokens are.
        ambient: what this thread is doing.
        routed: whether the router is asked, block by block.
        scored: blocks whose attention scores a later router reads.
        decides_parts: whether attention and MLP are decided apart, block by block.
        enters_parts: they are entered by different tokens in some block.
        full_queries: blocks whose keys and values cannot be made with the queries of one head.
    """

    def __init__(self, pruner: TokenPruner, model: nn.Module, decoder: nn.Module, blocks: nn.ModuleList):
        self.pruner, self.model, self.ambient = pruner, model, pruner.ambient
        self.decoder, self.blocks, self.sites = decoder, blocks, sites_of(model, blocks)
        self.home = home(model) if any(site.place for site in self.sites) else None
        self.gate = Gate()
        self.full_queries: set[int] = set()
        self._compensations: dict[tuple[torch.device, torch.dtype], Compensation] = {}
        self._configs: dict = {}
        self._slices = heeds_logits_to_keep(model)
        self._undo: list[Callable[[], None]] = []
        self._plan()
        self.least_tokens = self._least_tokens()
        try:
            self._install(model)
        except BaseException:
            self._remove()
            raise

    def _plan(self) -> None:
        """Where the router is asked, and which attention it reads."""
        pruner, router, blocks = self.pruner, self.pruner.router, range(len(self.sites))
        named = [part != "block" for part in pruner.parts_by_block]
        self.decides_parts = [router.by_parts] * len(blocks) if isinstance(router, FixedRouter) else named
        halves = any(len(pruner.removed_parts(index)) == 1 for index in blocks)
        self.enters_parts = any(self.decides_parts) or halves
        for index, site in enumerate(self.sites):
            if site.mlp is None and self.enters_parts:
                raise UserError(
                    f"block {index} has no feed-forward part that is understood (one module with its matrices, or two "
                    "linear maps): decisions can only address whole blocks of this model.\nUse parts='block'."
                )
        if isinstance(router, FixedRouter):
            self.routed = [not router.is_all_kept(index) for index in blocks]
        else:
            self.routed = [sparsity > 0.0 for sparsity in pruner.scheduled.sparsity]
        self.routes = any(self.routed)
        self.changes = self.routes or bool(pruner.removed)
        self.scored = frozenset(index for index in blocks if self._is_read(index))

    def _least_tokens(self) -> int:
        """Tokens from which on a prompt is routed."""
        from ftp_lightning.costs.least_tokens import least_tokens

        pruner = self.pruner
        if pruner.least_tokens != "auto":
            return pruner.least_tokens
        return 0 if pruner.schedule is None else least_tokens(self.model, pruner.schedule, pruner.kv)

    def _is_read(self, index: int) -> bool:
        """Whether a later router reads what this block writes: not if a block in between writes every token anew."""
        pruner, needs = self.pruner, self.pruner.router.needs

        def asks(block: int) -> bool:
            return self.routed[block] and len(pruner.removed_parts(block)) < 2

        if not needs.attention or (needs.once == "from block 0" and index) or not pruner.attention_score.reads(index):
            return False
        if needs.once == "at first" and any(asks(block) for block in range(index + 1)):
            return False
        for later in range(index + 1, len(self.sites)):
            if asks(later):
                return True
            writes_all = self.sites[later].window is None and not pruner.removed_parts(later)
            if writes_all and needs.once != "from block 0" and pruner.reads_from is None:
                return False
        return False

    # ---------------------------------------------------------------- in and out

    def _install(self, model: nn.Module) -> None:
        self._signature = inspect.signature(type(self.decoder).forward)
        self._wrap(self.decoder, "forward", self.run_decoder)
        if model is not self.decoder:
            self._wrap(model, "forward", self.run_model)
        for index, (block, site) in enumerate(zip(self.blocks, self.sites)):
            self._wrap(block, "forward", self.run_block, index)
            for kind, projections in (("query", (site.query,)), ("key_value", site.key_value)):
                for projection in projections:
                    if projection is not None:
                        self._wrap(projection, "forward", self.run_projection, index, kind, projection.out_features)
            if self.enters_parts and site.mlp is not None:
                entry, leave = site.mlp
                self._wrap(site.attention, "forward", self.run_part, run_attention)
                self._wrap(entry, "forward", self.run_part, run_mlp_entry)
                if leave is not entry:
                    self._wrap(leave, "forward", self.run_part, run_mlp_exit)
            self._undo.append(self.tap(index))
        if hasattr(model, "generate"):
            self._wrap(model, "generate", self.run_generate)
        own = {"pruner": model.__dict__["pruner"]} if "pruner" in model.__dict__ else {}
        model.__dict__["pruner"] = self.pruner
        self._undo.append(functools.partial(_put_back, model, own))

    def _wrap(self, module: nn.Module, name: str, run, *first) -> None:
        self._undo.append(WrappedMethod(module, name, functools.partial(run, *first)).undo)

    def tap(self, index: int) -> Callable[[], None]:
        """Let the block's attention function be `attend`; the function that undoes it."""
        return tap_attention(self.sites[index].attention, functools.partial(self.attend, index), self._configs)

    def undo(self) -> None:
        """Leave the model as it was, once no call is running in any thread."""
        if self.gate.close():
            self._remove()

    def _remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    # ---------------------------------------------------------------- the model's forward

    def run_generate(self, inner, args: tuple, kwargs: dict):
        """`generate`, refused where it would route a prompt more than once."""
        if not self.gate.enter():
            return inner(*args, **kwargs)
        try:
            check_cache(kwargs.get("past_key_values"))
            generation = Generation.of(self.model, args, kwargs, self.ambient.routes_chunks)
            with self.ambient.having(generation=generation):
                return inner(*args, **kwargs)
        finally:
            self.gate.leave()

    def run_model(self, inner, args: tuple, kwargs: dict):
        """The model with its output head: how many last positions it reads."""
        last = kwargs.get("logits_to_keep")
        reads_all = kwargs.get("output_hidden_states") or self.model.config.output_hidden_states or not self._slices
        with self.ambient.having(last_tokens=None if reads_all else _last_tokens(last)):
            return inner(*args, **kwargs)

    def run_decoder(self, inner, args: tuple, kwargs: dict):
        if self.ambient.stock or not self.gate.enter():  # a scout runs the model as it is
            return inner(*args, **kwargs)
        try:
            arguments = self._signature.bind(self.decoder, *args, **kwargs).arguments
            arguments.pop("self", None)
            arguments |= arguments.pop("kwargs", {})
            return self._in_one_phase(inner, arguments)
        finally:
            self.gate.leave()

    def _in_one_phase(self, inner, arguments: dict):
        """The decoder's output; a call that brings the end of a prompt and guesses behind it is run as two."""
        cache = arguments.get("past_key_values")
        check_cache(cache)
        generation = self._generation(cache)
        past = cache.get_seq_length() if cache is not None else 0
        if generation is not None and generation.guesses_in(past, _tokens(arguments).shape[1]):
            prompt, guesses = split_arguments(arguments, generation.prompt_end - past, past)
            first = self._run_once(inner, prompt, past, generation)
            return join_outputs(first, self._in_one_phase(inner, guesses))
        return self._run_once(inner, arguments, past, generation)

    def _run_once(self, inner, arguments: dict, past: int, generation: Generation | None):
        forward = self._open(arguments, past, generation)
        if forward.training is not None:
            arguments |= {"use_cache": False, "past_key_values": None}
        with self.ambient.having(forward=forward):
            try:
                if forward.routed is not None and self.pruner.router.needs.scout is not None and forward.active:
                    forward.scouted = scouted(self, inner, arguments, forward)
                output = inner(**arguments)
            except BaseException:
                spoil(arguments.get("past_key_values"), len(self.sites))
                raise
        self._close(forward)
        return output

    def _generation(self, cache) -> Generation | None:
        """The call of `generate` whose text a forward with this cache is about; None where it is about another."""
        generation = self.ambient.generation
        return generation if generation is not None and generation.is_about(cache) else None

    def _open(self, arguments: dict, past: int, generation: Generation | None) -> Forward:
        """Which phase this forward is. generation: the call of `generate` whose text it is about."""
        ambient = self.ambient
        mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
        check_forward(self, arguments, past)
        routes_chunks = ambient.generation is None and ambient.routes_chunks
        whole = generation is not None and past >= generation.prompt_end and generation.whole
        forward = Forward.of(_tokens(arguments), mask, past, self.home, whole, ambient.training)
        if generation is not None and past < generation.prompt_end:
            generation.whole = not forward.padded
        if past == 0 or (routes_chunks if generation is None else generation.is_prompt(past)):
            self._open_prompt(forward)
        else:
            self._open_continuation(forward, cache)
        check_router_logits(self, arguments, forward)
        return forward

    def _open_prompt(self, forward: Forward) -> None:
        pruner, training = self.pruner, forward.training
        forward.active, forward.last_tokens = self.changes, self.ambient.last_tokens
        width = forward.real.shape[1] if training is None else training.prompt_tokens
        forward.route(width, None if pruner.schedule is None else pruner.schedule.sparsity)
        if forward.routed is not None and self._is_too_short(forward, forward.routed.lengths):
            forward.active, forward.trace.too_short = False, True
        if forward.active and pruner.router.needs.attention and forward.routed is not None:
            forward.table = self.prompt_table(forward, pruner.router.needs.adds_up)

    def _is_too_short(self, forward: Forward, lengths: Sequence[int]) -> bool:
        """Whether skipping would cost this prompt more than it saves; what follows a routed prompt is routed."""
        fresh = not forward.past and forward.training is None and not self.pruner.removed
        return self.changes and fresh and max(lengths) < self.least_tokens

    def prompt_table(self, forward: Forward, adds_up: bool = False) -> PromptTable:
        """An empty table of scores that knows whose queries count. UserError where a question's span is wanted and not
        given, or ends behind its prompt."""
        score, generation, routed = self.pruner.attention_score, self.ambient.generation, forward.routed
        assert routed is not None  # a continuation has another table
        (rows, tokens), spans = routed.real.shape, self.ambient.spans
        table = PromptTable(rows, tokens, forward.real.device, adds_up, score.greatest)
        asks = score.window == "question"
        if asks and (self.pruner.router.needs.reads is not None or not forward.active):
            return table
        if asks:
            spans = spans_of_rows(spans, rows)
            if not forward.past and (generation is None or generation.prompt_end == tokens):
                check_ends(spans, routed.lengths)
        table.ask(score, routed.real, forward.position[:, :tokens], spans)
        return table

    def _open_continuation(self, forward: Forward, cache) -> None:
        forward.follows = self.pruner.decode != "dense" and self.routes
        has_routed = any(isinstance(layer, RoutedLayer) for layer in cache.layers)
        forward.active = forward.follows or has_routed or bool(self.pruner.removed)
        if forward.follows and self.pruner.router.needs.attention:
            greatest = self.pruner.attention_score.greatest
            forward.table = ContinuationTable(forward.real, forward.past_real, forward.past, greatest)

    def _close(self, done: Forward) -> None:
        done.trace.prompt = done.trace if done.routed is not None else self.pruner.trace.prompt
        self.pruner.remember(done.trace, done.routings)

    # ---------------------------------------------------------------- a block's forward, and what is in it

    def run_block(self, index: int, inner, args: tuple, kwargs: dict):
        forward, site = self.ambient.forward, self.sites[index]
        if forward is None:
            return inner(*args, **kwargs)
        if not forward.active:
            forward.trace.add(forward.real, forward.real)
            return inner(*args, **kwargs)
        if site.place is not None:
            args, kwargs = brought(args, kwargs, site.place)
            forward.go_to(site.place)
        forward.run = BlockRun(self, index, site, forward, inner, args, kwargs)
        try:
            return forward.run.compute()
        finally:
            forward.run = None

    def run_part(self, run_it, inner, args: tuple, kwargs: dict):
        """The forward of an attention or of an MLP that other tokens enter than the rest of the block."""
        run = self._running
        return inner(*args, **kwargs) if run is None or run.apart is None else run_it(run, inner, args, kwargs)

    def run_projection(self, index: int, kind: str, width: int, inner, args: tuple, kwargs: dict) -> Tensor:
        """A projection that nobody reads is silent: zeros without a multiplication, which may be written to (OLMo).

        Queries of one head do where a block views them by head; what follows then costs next to nothing.
        """
        run = self._running
        if run is None or run.silent != kind:
            return inner(*args, **kwargs)
        if kind == "query" and index not in self.full_queries:
            width = getattr(run.site.attention, "head_dim", None) or width
        return args[0].new_zeros(*args[0].shape[:-1], width)

    @property
    def _running(self) -> BlockRun | None:
        forward = self.ambient.forward
        return None if forward is None else forward.run

    def attend(self, index: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, kwargs: dict):
        """The attention function of a block: over the keys that its tokens may see."""
        site, run, scaling = self.sites[index], self._running, scaling_of(query, kwargs)
        if run is not None and run.wants_scores:
            run.tapped = Tapped(query, key, scaling, kwargs.get("softcap"), site.window)
        if run is None or run.sight is None:
            return interface(site.backend.name, module)(module, query, key, value, mask, **kwargs)
        kwargs.pop("position_ids", None)  # gaps in them would pass for packed texts; rotations are done
        output, weights = attend(site.backend, run.sight, module, query, key, value, kwargs)
        if run.sight.key_gates is not None:
            if kwargs.get("softcap") is not None:
                raise UserError("key gates do not know soft-capped attention logits.\nTrain without --key_gates.")
            output = gated_keys(output, run.sight.key_gates, query, key, value, run.sight, scaling)
        return output, weights

    def is_watched(self) -> bool:
        """Whether a hook may look at what the last block or the decoder returns."""
        watched = (self.blocks[-1], self.decoder, *self.decoder.children())
        return any(module._forward_hooks or module._forward_pre_hooks for module in watched)

    def skipped(self, hidden: Tensor, index: int, part: str) -> Tensor:
        """What tokens hidden (B, n, D) become where they skip: of a block the residual stream behind it, of a part its
        update. The compensation is taken where the tokens are, in their dtype."""
        compensation = self.pruner.compensation
        if compensation is None or part not in compensation.parts:  # of a part that was not fitted padding alone skips
            return hidden if part == "block" else torch.zeros_like(hidden)
        place = hidden.device, hidden.dtype
        if place not in self._compensations:
            self._compensations[place] = compensation.to(*place)
        update = self._compensations[place].update(hidden, index, part)
        return hidden + update if part == "block" else update


def _last_tokens(asked) -> int | None:
    """How many last positions a `logits_to_keep` reads; None: perhaps all, or only the device knows."""
    if isinstance(asked, Tensor):
        on_host = asked.device.type == "cpu" and not torch.compiler.is_compiling()
        return -int(asked.min()) if on_host and asked.numel() and int(asked.max()) < 0 else None
    return asked if isinstance(asked, int) and asked > 0 else None


def _put_back(model: nn.Module, own: dict) -> None:
    """Give the model its own attribute named `pruner` back, where it had one."""
    model.__dict__.pop("pruner", None)
    model.__dict__.update(own)


def _tokens(arguments: dict) -> Tensor:
    """Ids (B, T) or embeddings (B, T, D)."""
    tokens = arguments.get("input_ids")
    return arguments["inputs_embeds"] if tokens is None else tokens
