"""A pruner in force on one model: who runs a block how, and what is remembered on the way.

Shapes: B rows, T new tokens of this forward (padding included), K kept tokens of the fullest row.
"""

from __future__ import annotations

import functools
import inspect
from typing import cast

import torch
from torch import Tensor, nn

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.attention import Sight, attend, interface, tap_attention
from ftp_lightning.pruning.cache import RoutedLayer
from ftp_lightning.pruning.calls import Call, WrappedMethod
from ftp_lightning.pruning.deciding import choose
from ftp_lightning.pruning.dense import run_dense
from ftp_lightning.pruning.devices import brought, home
from ftp_lightning.pruning.family import find_decoder
from ftp_lightning.pruning.gathered import run_gathered
from ftp_lightning.pruning.generation import Generation, join_outputs, split_arguments
from ftp_lightning.pruning.kept import Rows, Tokens
from ftp_lightning.pruning.masked import recomputed, run_masked
from ftp_lightning.pruning.parts import PartPlan, run_attention_part, run_mlp_entry, run_mlp_exit, run_parts
from ftp_lightning.pruning.scores import Tapped, received_attention, received_by_query, scaling_of
from ftp_lightning.pruning.state import Decision, Pass, Site
from ftp_lightning.pruning.table import ContinuationTable, PromptTable, remember_prompt
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.routing.choice import RoutedPart
from ftp_lightning.routing.fixed import FixedRouter
from ftp_lightning.training.compensation import Compensation
from ftp_lightning.training.key_gates import gated_keys

__all__ = ["Decision", "Engine"]


class _Looked(Exception):
    """Ends a scout's look once it has seen what it wants."""


class Engine:
    """Made by `attach`, gone after `undo`.

    Attributes:
        current: the forward that is running; None between forwards.
        home: of a dispatched model the device where routers decide; None: where the tokens are.
        sight: what the attention about to run may see; None = the stock attention with the stock mask.
        part_plan: which rows enter attention and MLP of the block that is running, where these are decided apart.
    """

    def __init__(self, pruner, model: nn.Module):
        self.pruner = pruner
        decoder, blocks = find_decoder(model)
        self.model, self.looking = model, False
        self.sites = [Site.of(block) for block in blocks]
        self.home = home(model) if any(site.place for site in self.sites) else None
        self.current: Pass | None = None
        self.generation: Generation | None = None
        self.sight: Sight | None = None
        self.part_plan: PartPlan | None = None
        self.depositing = False
        self.needs_full_queries: set[int] = set()  # blocks whose deposit fails with the queries of one head
        self.tapped: Tapped | None = None
        self._compensations: dict[tuple[torch.device, torch.dtype], Compensation] = {}
        self._undo: list = []
        self._check_parts()
        try:
            self._install(model, decoder, blocks)
        except BaseException:
            self.undo()
            raise

    def _check_parts(self) -> None:
        for index, site in enumerate(self.sites):
            if site.mlp is None and self.enters_parts:
                raise UserError(
                    f"block {index} has no feed-forward part that is understood (one module with its matrices, or two "
                    "linear maps): decisions can only address whole blocks of this model.\nUse parts='block'."
                )

    def _install(self, model: nn.Module, decoder: nn.Module, blocks: nn.ModuleList) -> None:
        self._config = decoder.config
        self._decoder_signature = inspect.signature(type(decoder).forward)
        self._wrap(decoder, "forward", self.run_decoder, decoder)
        for index, (block, site) in enumerate(zip(blocks, self.sites)):
            self._wrap(block, "forward", self.run_block, index)
            if site.query is not None:
                self._wrap(site.query, "forward", self.run_query_projection, index)
            if self.enters_parts:
                entry, leave = site.mlp
                self._wrap(site.attention, "forward", run_attention_part, self, index)
                self._wrap(entry, "forward", run_mlp_entry, self, index)
                if leave is not entry:
                    self._wrap(leave, "forward", run_mlp_exit, self, index)
            self._undo.append(tap_attention(site.attention, functools.partial(self.attend, index)))
        if hasattr(model, "generate"):
            self._wrap(model, "generate", self.run_generate, model)

    def _wrap(self, module: nn.Module, name: str, run, *first) -> None:
        self._undo.append(WrappedMethod(module, name, functools.partial(run, *first)).undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()

    @property
    def running(self) -> Pass:
        """`current`, where one is known to run."""
        assert self.current is not None
        return self.current

    # ---------------------------------------------------------------- the schedule, seen from a block

    @property
    def decides_parts(self) -> bool:
        router = self.pruner.router
        return router.by_parts if isinstance(router, FixedRouter) else self.pruner.parts != "block"

    @property
    def enters_parts(self) -> bool:
        """Whether the two parts of some block are entered by different tokens."""
        return self.decides_parts or any(len(self.pruner.removed_parts(index)) == 1 for index in range(len(self.sites)))

    def sparsity(self, index: int) -> float:
        return self.pruner.schedule.sparsity[index]

    def is_routed(self, index: int) -> bool:
        router = self.pruner.router
        return not router.is_all_kept(index) if isinstance(router, FixedRouter) else self.sparsity(index) > 0.0

    @functools.cached_property
    def routes_anything(self) -> bool:
        return any(self.is_routed(index) for index in range(len(self.sites)))

    @functools.cached_property
    def changes_anything(self) -> bool:
        return self.routes_anything or bool(self.pruner.removed)

    def scores_matter(self, index: int) -> bool:
        """Whether a later router reads what this block writes: not if a block in between writes every token anew."""
        router, look = self.pruner.router, None if self.current is None else self.current.look
        if look is not None:
            return index == look.blocks - 1
        if not router.needs_attention or (router.one_pass and index):
            return False
        if router.once and any(self._asks(block) for block in range(index + 1)):
            return False
        for later in range(index + 1, len(self.sites)):
            if self._asks(later):
                return True
            writes_all = self.sites[later].window is None and not self.pruner.removed_parts(later)
            if writes_all and not router.one_pass and not router.adds_up:
                return False
        return False

    def _asks(self, index: int) -> bool:
        """Whether the router is asked at this block."""
        return self.is_routed(index) and len(self.pruner.removed_parts(index)) < 2

    # ---------------------------------------------------------------- what a skipped token gets

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

    # ---------------------------------------------------------------- the model's forward

    def run_generate(self, model: nn.Module, inner, args: tuple, kwargs: dict):
        """`generate`, refused where it would route a prompt more than once."""
        before = self.generation
        self.generation = Generation.of(model, args, kwargs, self.pruner.routing_chunk)
        try:
            return inner(*args, **kwargs)
        finally:
            self.generation = before

    def run_decoder(self, decoder: nn.Module, inner, args: tuple, kwargs: dict):
        if self.looking:  # a scout runs the model as it is
            return inner(*args, **kwargs)
        arguments = self._decoder_signature.bind(decoder, *args, **kwargs).arguments
        arguments.pop("self", None)
        arguments |= arguments.pop("kwargs", {})
        cache, tokens = arguments.get("past_key_values"), arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        past = cache.get_seq_length() if cache is not None else 0
        if self.generation is not None and self.generation.guesses_in(past, tokens.shape[1]):
            prompt, guesses = split_arguments(arguments, self.generation.prompt_end - past, past)
            return join_outputs(self._run_once(inner, prompt, past), self.run_decoder(decoder, inner, (), guesses))
        return self._run_once(inner, arguments, past)

    def _run_once(self, inner, arguments: dict, past: int):
        self.current = self._open(arguments, past)
        try:
            if self.current.part is not None and self.pruner.router.scout is not None and self.current.active:
                self.current.scouted = self._scout(inner, arguments, self.current)
            output = inner(**arguments)
            self._close(self.current)
            return output
        finally:
            self.current, self.sight, self.part_plan, self.tapped = None, None, None, None

    @torch.no_grad()
    def _scout(self, inner, arguments: dict, prompt: Pass) -> Tensor:
        """What the router's dense look at the prompt says of its tokens: (B, P) float32."""
        scout, width = self.pruner.router.scout, prompt.part.real.shape[1]
        if prompt.past:
            raise UserError("this router looks at whole prompts; chunks on a filled cache are refused.")
        first = split_arguments(arguments, width, 0)[0] if width < prompt.real.shape[1] else arguments
        seen = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        about = {name: first[name] for name in seen if first.get(name) is not None}
        about["use_cache"] = True  # without a cache transformers asks the device whether texts are packed
        if scout.kind == "surprisal":
            return self._surprisal(about, prompt)
        look = Pass(prompt.part.real, 0, None, prompt.padded, prompt.part, look=scout)
        rows, tokens = prompt.part.real.shape
        look.table = table = PromptTable(rows, tokens, prompt.real.device)
        self.current = look
        try:
            inner(**about)
        except _Looked:
            pass
        finally:
            self.current = prompt
        return table.own.to(look.home)

    def _surprisal(self, about: dict, prompt: Pass) -> Tensor:
        """-log p(x_j | x_<j) by the dense model; infinite for a row's first token. (B, P) float32."""
        ids = about.get("input_ids")
        if ids is None or self.model.get_output_embeddings() is None:
            raise UserError("surprisal needs token ids and a model with an output head.")
        self.looking, self.current = True, None
        try:
            logits = self.model(**about).logits.float()
        finally:
            self.looking, self.current = False, prompt
        said = logits[:, :-1].logsumexp(-1) - logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        said = torch.nn.functional.pad(said, (1, 0), value=torch.inf)
        return said.masked_fill(prompt.part.position == 0, torch.inf)

    def _open(self, arguments: dict, past: int) -> Pass:
        """Which phase this forward is, and which of its tokens are real."""
        pruner = self.pruner
        tokens = arguments.get("input_ids")
        tokens = arguments["inputs_embeds"] if tokens is None else tokens
        mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
        (batch, new), device = tokens.shape[:2], self.home or tokens.device
        mask = mask if not isinstance(mask, Tensor) else mask.to(device)
        self._refuse(cache, mask, arguments.get("position_ids"), past)
        real, past_real, padded = torch.ones(batch, new, dtype=torch.bool, device=device), None, False
        if mask is not None:
            whole = mask[:, -(past + new) :].to(torch.bool)
            padded = not bool(whole.all())
            real, past_real = whole[:, -new:], whole[:, :-new] if padded else None
        state = Pass(real, past, past_real, padded, None, masked=pruner.masked_prompt is not None)
        state.trace = Trace(real=real)
        chunk = pruner.routing_chunk if self.generation is None else self.generation.is_prompt(past)
        if past == 0 or chunk:
            self._open_prompt(state, new if pruner.masked_prompt is None else pruner.masked_prompt)
        else:
            self._open_continuation(state, cache)
        return state

    def _open_prompt(self, state: Pass, width: int) -> None:
        starts = state.past == 0
        if state.past and state.past_real is not None:  # a row whose padding filled the chunks before starts here
            starts = (~state.past_real.any(1)).tolist()
        state.part = RoutedPart.of(state.real[:, :width], state.padded, starts)
        state.active = self.changes_anything
        if state.active and self.pruner.schedule is not None:
            state.counts = [state.part.kept(s) for s in self.pruner.schedule.sparsity]
        if self.pruner.router.needs_attention:
            rows, tokens = state.part.real.shape
            state.table = PromptTable(rows, tokens, state.real.device, self.pruner.router.adds_up)

    def _open_continuation(self, state: Pass, cache) -> None:
        state.follows = self.pruner.decode != "dense" and self.routes_anything
        routed = any(isinstance(layer, RoutedLayer) for layer in cache.layers)
        state.active = state.follows or routed or bool(self.pruner.removed)
        if state.follows and self.pruner.router.needs_attention:
            state.table = ContinuationTable(state.real, state.past_real, state.past)

    def _refuse(self, cache, mask: Tensor | None, positions: Tensor | None, past: int) -> None:
        """UserError for what cannot be computed right."""
        if cache is not None and (getattr(cache, "is_compileable", False) or getattr(cache, "offloading", False)):
            kind = "offloaded" if getattr(cache, "offloading", False) else "static"
            raise UserError(
                f"token skipping needs a dynamic key-value cache; this one is {kind}.\n"
                "Leave `cache_implementation` unset."
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UserError(
                "a TokenPruner reads padding from a (batch, tokens) attention_mask; masks of other shapes are refused."
            )
        if mask is None and cache is None and positions is not None and bool((positions.diff(dim=-1) != 1).any()):
            raise UserError(
                "position_ids that start anew within a row mean packed texts, which cannot be pruned.\n"
                "Give one text a row, with an attention_mask."
            )
        if self.pruner.masked_prompt is not None and past:
            raise UserError("the training forward takes the whole text in one pass, without a filled cache.")
        if self._config._attn_implementation != self.sites[0].backend.name:
            raise UserError("the attention implementation was changed while a pruner is attached.\nDetach it first.")

    def _close(self, done: Pass) -> None:
        trace = done.trace
        trace.prompt = trace if done.part is not None else self.pruner.trace.prompt
        self.pruner.trace, self.pruner.decisions = trace, done.decisions

    # ---------------------------------------------------------------- a block's forward

    def run_block(self, index: int, inner, args: tuple, kwargs: dict):
        state = self.current
        if state is None:
            return inner(*args, **kwargs)
        if not state.active:
            state.trace.add(state.real, state.real)
            return inner(*args, **kwargs)
        if (place := self.sites[index].place) is not None:
            args, kwargs = brought(args, kwargs, place)
            state.go_to(place)
        if state.look is not None:
            return self._look(index, inner, args, kwargs)
        gone = self.pruner.removed_parts(index)
        if state.plain_step and not gone and (layer := self._plain_layer(index, kwargs)) is not None:
            state.trace.add(state.real, state.real)
            layer.expect(state.new, 1)
            self.sight = None if layer.complete else state.everything
            output = inner(*args, **kwargs)
            self.sight = None
            return output
        call = Call(self.sites[index].block, args, kwargs)
        if state.masked and self.pruner.recompute and not self.enters_parts:
            inner = functools.partial(recomputed, self, index, inner)
        chosen = choose(self, index, call)
        if chosen is None:
            state.trace.add(state.real, state.real)
            return run_dense(self, index, inner, call)
        if not chosen.by_block:
            return run_parts(self, index, inner, call, chosen)
        return (run_masked if state.masked else run_gathered)(self, index, inner, call, chosen)

    def _look(self, index: int, inner, args: tuple, kwargs: dict) -> Tensor:
        output = run_dense(self, index, inner, Call(self.sites[index].block, args, kwargs))
        if index == self.current.look.blocks - 1:
            raise _Looked
        return output

    def _plain_layer(self, index: int, kwargs: dict) -> RoutedLayer | None:
        """The cache's layer, where a single token that is computed sees all that it holds: no mask, no arguments to
        change. Generating is mostly this, and its time is short."""
        site = self.sites[index]
        layer = self.layer(kwargs.get(site.block.cache_name), index)
        return layer if layer is not None and layer.all_valid and site.window is None else None

    def run_query_projection(self, index: int, inner, args: tuple, kwargs: dict) -> Tensor:
        """A deposit wants no queries: zeros without a multiplication, which may be written to in place (OLMo).

        Those of one head do where a block views them by head; what follows then costs next to nothing.
        """
        if not self.depositing:
            return inner(*args, **kwargs)
        site, hidden = self.sites[index], args[0]
        one_head = getattr(site.attention, "head_dim", None)
        width = site.query.out_features if one_head is None or index in self.needs_full_queries else one_head
        return hidden.new_zeros(*hidden.shape[:-1], width)

    def needs_keys(self, index: int, layer: RoutedLayer) -> bool:
        """Whether a dense block has to know which tokens its cache holds; a plain decode step does not."""
        state = self.current
        scores = state.table is not None and self.scores_matter(index)
        return scores or state.padded or not layer.all_valid or state.real.shape[1] > 1 or layer.window is not None

    # ---------------------------------------------------------------- attention, and what it says of its keys

    def attend(self, index: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, kwargs: dict):
        site, state, scaling = self.sites[index], self.current, scaling_of(query, kwargs)
        if state is not None and state.table is not None and self.scores_matter(index):
            self.tapped = Tapped(query, key, scaling, kwargs.get("softcap"), site.window)
        if self.sight is None:
            return interface(site.backend.name, module)(module, query, key, value, mask, **kwargs)
        output, weights = attend(site.backend, self.sight, module, query, key, value, kwargs)
        if self.sight.key_gates is not None:
            if kwargs.get("softcap") is not None:
                raise UserError("key gates do not know soft-capped attention logits.\nTrain without --key_gates.")
            output = gated_keys(output, self.sight.key_gates, query, key, value, self.sight, scaling)
        return output, weights

    @torch.no_grad()
    def write_scores(self, rows: Rows | None, queries: Tokens, keys: Tokens, layer: RoutedLayer | None) -> None:
        """Write what the attention that just ran says of its keys into the table.

        rows: where the queries stand among the new tokens; None = they are all of them. Nothing was tapped where no
        later router reads the scores.
        """
        state, tapped = self.current, self.tapped
        self.tapped = None
        if tapped is None:
            return
        if state.part is None:
            self._write_continuation(tapped, rows, queries, keys, layer)
            return
        width = state.part.real.shape[1]
        if state.masked:  # tokens after the routed part have no say in how it is routed
            tapped.query, tapped.key = tapped.query[:, :, :width], tapped.key[:, :, :width]
            queries, keys = queries.first(width), keys.first(width)
        last = self.pruner.window if self.pruner.attention == "window" else None
        # a complete layer may hold fewer keys than were seen, too: a sliding window has dropped the rest
        evicted = rows is not None and (layer is None or not layer.complete)
        new = rows.width if evicted else width
        reads, before = self.pruner.router.reads, keys.slots.shape[1] - new
        if reads is not None:
            scores, seen = reads(tapped, queries, keys, state.span)
        else:
            scores, seen = received_attention(tapped, queries, keys, last, before)
        if layer is not None and self.pruner.decode != "dense":
            remember_prompt(layer, scores, seen, keys, state.span)
        cast(PromptTable, state.table).write(scores[:, -new:], seen[:, -new:], rows.index if evicted else None)

    def recall_scores(self, index: int, layer: RoutedLayer | None) -> None:
        """What `write_scores` does where no token was computed: a continuation reads what earlier queries said in this
        block."""
        state = self.current
        if state.part is None and state.table is not None and self.scores_matter(index):
            cast(ContinuationTable, state.table).recall(layer)

    def _write_continuation(
        self, tapped: Tapped, rows: Rows | None, queries: Tokens, keys: Tokens, layer: RoutedLayer
    ) -> None:
        scores, seen = received_by_query(tapped, queries, keys)
        seen = seen & queries.valid[..., None]
        if rows is not None and not rows.whole:
            tokens = rows.keep.shape[1]
            scores = rows.put(scores.new_zeros(len(scores), tokens, scores.shape[2]), scores)
            seen = rows.put(seen.new_zeros(len(seen), tokens, seen.shape[2]), seen)
        cast(ContinuationTable, self.running.table).write(layer, scores, seen, keys)

    # ---------------------------------------------------------------- the cache's layers

    def layer(self, cache, index: int) -> RoutedLayer | None:
        """The cache's layer of a block where it is a routed one."""
        layer = None if cache is None or len(cache.layers) <= index else cache.layers[index]
        return layer if isinstance(layer, RoutedLayer) else None

    def routed_layer(self, cache, index: int, complete: bool) -> RoutedLayer | None:
        """The cache's layer of a block in its routed form; None without a cache."""
        if cache is None:
            return None
        if len(cache.layers) <= index:  # a lazily growing cache
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(index + 1 - len(cache.layers)))
        layer = cache.layers[index]
        if not isinstance(layer, RoutedLayer):
            layer = RoutedLayer.adopt(layer, complete, self.sites[index].window, self.current.past_real)
            cache.layers[index] = layer
        return layer
