"""A pruner in force on one model: who runs a block how, and what is remembered on the way.

Shapes: B rows, T new tokens of this forward (padding included), K kept tokens of the fullest row.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace

import torch
from torch import Tensor, nn

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.attention import Tapped, Tokens, received_attention, tap_attention
from ftp_lightning.pruning.blocks import find_decoder, query_projection
from ftp_lightning.pruning.cache import RoutedLayer
from ftp_lightning.pruning.calls import BlockCall, WrappedMethod
from ftp_lightning.pruning.gathered import run_continuation, run_gathered
from ftp_lightning.pruning.masked import run_masked
from ftp_lightning.pruning.state import Decision, Pass, Site
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.choice import RoutedPart, choose_threshold, choose_topk
from ftp_lightning.routing.fixed import FixedRouter


class Engine:
    """Made by `attach`, gone after `undo`."""

    def __init__(self, pruner, model: nn.Module):
        self.pruner = pruner
        decoder, blocks = find_decoder(model)
        self.sites = [Site.of(block) for block in blocks]
        self.current: Pass | None = None
        self.depositing = False
        self._tapped: Tapped | None = None
        self._undo: list = []
        try:
            self._install(model, decoder, blocks)
        except BaseException:
            self.undo()
            raise

    def _install(self, model: nn.Module, decoder: nn.Module, blocks: nn.ModuleList) -> None:
        self._config = decoder.config
        self._decoder_signature = inspect.signature(type(decoder).forward)
        self._wrap(decoder, "forward", self.run_decoder, decoder)
        for index, (block, site) in enumerate(zip(blocks, self.sites)):
            self._wrap(block, "forward", self.run_block, index)
            projection = query_projection(site.attention)
            if projection is not None:
                self._wrap(projection, "forward", self.run_query_projection, projection)
            if self.pruner.router.needs_attention and self.scores_matter(index):
                self._undo.append(tap_attention(site.attention, self._listen))
        if hasattr(model, "generate"):
            self._wrap(model, "generate", self.run_generate, model)

    def _wrap(self, module: nn.Module, name: str, run, *first) -> None:
        self._undo.append(WrappedMethod(module, name, functools.partial(run, *first)).undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()

    def run_generate(self, model: nn.Module, inner, args: tuple, kwargs: dict):
        """`generate`, refused where it would route a prompt more than once, in pieces, or with guessed tokens behind
        it."""
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config

        def asked(name: str):
            return kwargs.get(name, getattr(config, name, None))

        if asked("use_cache") is False:
            raise UserError(
                "generate(use_cache=False) would route the prompt anew for every token.\nLeave use_cache on."
            )
        if asked("prefill_chunk_size"):
            raise UserError("prefill_chunk_size splits the prompt, which is routed whole.\nLeave it unset.")
        if asked("assistant_model") is not None or asked("prompt_lookup_num_tokens"):
            raise UserError(
                "assisted decoding would route its guesses with the prompt.\nGenerate without an assistant."
            )
        return inner(*args, **kwargs)

    # ---------------------------------------------------------------- the schedule, seen from a block

    def sparsity(self, index: int) -> float:
        return self.pruner.schedule.sparsity[index]

    def is_routed(self, index: int) -> bool:
        router = self.pruner.router
        return not router.keep[index].all() if isinstance(router, FixedRouter) else self.sparsity(index) > 0.0

    def scores_matter(self, index: int) -> bool:
        """Whether a later router reads what this block writes: not if a block in between writes every token anew."""
        for later in range(index + 1, len(self.sites)):
            if self.is_routed(later):
                return True
            if self.sites[later].window is None:
                return False
        return False

    # ---------------------------------------------------------------- the model's forward

    def run_decoder(self, decoder: nn.Module, inner, args: tuple, kwargs: dict):
        arguments = self._decoder_signature.bind(decoder, *args, **kwargs).arguments
        arguments |= arguments.get("kwargs", {})
        self.current = self._open(
            *(arguments.get(n) for n in ("input_ids", "inputs_embeds", "attention_mask", "past_key_values"))
        )
        try:
            output = inner(*args, **kwargs)
            self._close(self.current)
            return output
        finally:
            self.current, self._tapped = None, None

    def _open(self, ids: Tensor | None, embeddings: Tensor | None, mask: Tensor | None, cache) -> Pass:
        """Which phase this forward is, and which of its tokens are real."""
        tokens = embeddings if ids is None else ids
        (batch, new), device = tokens.shape[:2], tokens.device
        past = cache.get_seq_length() if cache is not None else 0
        self._refuse(cache, mask, past + new)
        real, past_real, padded = torch.ones(batch, new, dtype=torch.bool, device=device), None, False
        if mask is not None:
            whole = mask[:, -(past + new) :].to(torch.bool)
            padded = not bool(whole.all())
            real, past_real = whole[:, -new:], whole[:, :-new] if padded else None
        width = new if self.pruner.masked_prompt is None else self.pruner.masked_prompt
        routed = past == 0 or self.pruner.routing_chunk
        part = RoutedPart.of(real[:, :width], padded, past == 0) if routed else None
        table = torch.ones(batch, width, device=device) if self.pruner.router.needs_attention else None
        masked = self.pruner.masked_prompt is not None
        return Pass(real, past, past_real, padded, part, masked, table, Trace(real=real))

    def _refuse(self, cache, mask: Tensor | None, tokens: int) -> None:
        """UserError for what cannot be computed right."""
        if cache is not None and getattr(cache, "is_compileable", False):
            raise UserError(
                "token skipping needs a dynamic key-value cache; this one is static.\n"
                "Leave `cache_implementation` unset."
            )
        if mask is not None and mask.dim() != 2:
            raise UserError(
                "a TokenPruner reads padding from a (batch, tokens) attention_mask; masks of other shapes are refused."
            )
        if self.pruner.masked_prompt is not None and cache is not None and cache.get_seq_length():
            raise UserError("the training forward takes the whole text in one pass, without a filled cache.")
        if self._config._attn_implementation != self.sites[0].implementation:
            raise UserError("the attention implementation was changed while a pruner is attached.\nDetach it first.")
        for index, site in enumerate(self.sites):
            if site.window is not None and tokens > site.window:
                raise UserError(
                    f"block {index} sees a sliding window of {site.window} tokens and the text has {tokens}: "
                    "such texts cannot be pruned by this version.\n"
                    "Use shorter texts, or a model without sliding windows."
                )

    def _close(self, done: Pass) -> None:
        trace = done.trace
        trace.prompt = trace if done.part is not None else self.pruner.trace.prompt
        self.pruner.trace, self.pruner.decisions = trace, done.decisions

    # ---------------------------------------------------------------- a block's forward

    def run_block(self, index: int, inner, args: tuple, kwargs: dict):
        state, site = self.current, self.sites[index]
        if state is None:
            return inner(*args, **kwargs)
        call = BlockCall(site.signature, site.cache_name, args, kwargs)
        if state.part is not None and self.is_routed(index):
            return (run_masked if state.masked else run_gathered)(self, index, inner, call)
        state.trace.keep.append(state.real)
        output = run_continuation(self, index, inner, call)
        if state.part is not None:
            self.write_scores(state.new, state.seen, None)
        return output

    def run_query_projection(self, projection: nn.Module, inner, args: tuple, kwargs: dict) -> Tensor:
        """A deposit wants no queries: zeros that take no memory and no multiplication."""
        if not self.depositing:
            return inner(*args, **kwargs)
        hidden = args[0]
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], projection.out_features)

    # ---------------------------------------------------------------- routing

    def decide(self, index: int, hidden: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """keep (B, P) bool, and how many tokens of each row that is. hidden (B, P, D): the block's input."""
        pruner, part, state = self.pruner, self.current.part, self.current
        if isinstance(pruner.router, FixedRouter):
            keep = pruner.router.decision(index, part.real)
            return keep, tuple(keep.sum(1).tolist())
        kept = part.kept(self.sparsity(index))
        context = self._context(index, hidden, kept)
        by_rank = pruner.choice == "topk"
        probability = pruner.router.probability(context) if state.masked or not by_rank else None
        if by_rank:
            with torch.no_grad():
                keep = choose_topk(pruner.router.score(context), part, kept)
        else:
            keep = choose_threshold(probability.detach(), part, pruner.threshold)
            kept = tuple(keep.sum(1).tolist())
        if state.masked:
            state.decisions.append(Decision(probability, keep, part, context))
        return keep, kept

    def _context(self, index: int, hidden: Tensor, kept: tuple[int, ...]) -> RoutingContext:
        part, table = self.current.part, self.current.table
        lengths, counts = (torch.tensor(n, device=hidden.device)[:, None] for n in (part.lengths, kept))
        return RoutingContext(index, self.sparsity(index), part.real, part.position, lengths, counts, table, hidden)

    def _listen(self, module: nn.Module, tapped: Tapped) -> None:
        if self.current is not None and self.current.part is not None:
            self._tapped = tapped

    @torch.no_grad()
    def write_scores(self, queries: Tokens, keys: Tokens, index_BK: Tensor | None) -> None:
        """Write what the attention just tapped says of its keys into the table.

        The new tokens' keys are the last ones: all of them in order, or those that index_BK (B, K) names. Nothing was
        tapped where no later router reads the scores.
        """
        state, tapped = self.current, self._tapped
        if tapped is None:
            return
        self._tapped = None
        width = state.part.real.shape[1]
        if state.masked:  # tokens after the routed part have no say in how it is routed
            tapped = replace(tapped, query=tapped.query[:, :, :width], key=tapped.key[:, :, :width])
            queries, keys = queries.first(width), keys.first(width)
        last = self.pruner.window if self.pruner.attention == "window" else None
        scores, seen = received_attention(tapped, queries, keys, last)
        new = width if index_BK is None else index_BK.shape[1]
        scores, seen = scores[:, -new:], seen[:, -new:]
        if index_BK is None:
            state.table = torch.where(seen, scores, state.table)
        else:
            old = state.table.gather(1, index_BK)
            state.table = state.table.scatter(1, index_BK, torch.where(seen, scores, old))

    # ---------------------------------------------------------------- the cache's layers

    def layer(self, cache, index: int):
        """The cache's layer of a block, whatever its kind; None where there is none yet."""
        return None if cache is None or len(cache.layers) <= index else cache.layers[index]

    def routed_layer(self, cache, index: int, complete: bool) -> RoutedLayer | None:
        """The cache's layer of a block in its routed form; None without a cache."""
        if cache is None:
            return None
        if len(cache.layers) <= index:  # a lazily growing cache
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(index + 1 - len(cache.layers)))
        layer = cache.layers[index]
        if not isinstance(layer, RoutedLayer):
            layer = cache.layers[index] = RoutedLayer.adopt(layer, complete, self.current.past_real)
        return layer
