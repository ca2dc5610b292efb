"""Runs a model's blocks on the tokens that are kept: the gathered executor, and the masked one that training needs.

Shapes: B rows, T new tokens of this forward (padding included), K kept tokens of the fullest row, S stored keys.
A *slot* is a token's place among all tokens seen, padding included; `past` slots were seen before this forward.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.attention import Tapped, Tokens, received_attention, tap_attention, visible_keys
from ftp_lightning.pruning.blocks import cache_name, find_attention, find_decoder, query_projection, sliding_window
from ftp_lightning.pruning.cache import Deposited, DepositPort, Port, RoutedLayer
from ftp_lightning.pruning.calls import BlockCall, WrappedMethod, gather_index, put_rows, take_rows
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.choice import RoutedPart, choose_threshold, choose_topk
from ftp_lightning.routing.fixed import FixedRouter


@dataclass
class Decision:
    """What the masked executor decided in one block: for the losses.

    probability (B, P) float32 with gradient; keep (B, P) bool; part: the routed tokens; context: what the router saw.
    """

    probability: Tensor
    keep: Tensor
    part: RoutedPart
    context: RoutingContext


@dataclass
class Pass:
    """One forward of the model. `part` is None for a continuation; `masked` = the training executor."""

    real: Tensor
    past: int
    past_real: Tensor | None
    part: RoutedPart | None
    masked: bool = False
    table: Tensor | None = None
    trace: Trace = field(default_factory=Trace)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def slots(self) -> Tensor:
        return torch.arange(self.past, self.past + self.real.shape[1], device=self.real.device).expand(self.real.shape)

    def all_tokens(self, padded: bool) -> Tokens:
        return Tokens(self.slots, self.real, not padded)


@dataclass(frozen=True)
class Site:
    """A block as the engine sees it."""

    signature: inspect.Signature
    cache_name: str
    attention: nn.Module
    window: int | None
    implementation: str


class Engine:
    """A pruner in force on one model: created by `attach`, gone after `undo`."""

    def __init__(self, pruner, model: nn.Module):
        self.pruner = pruner
        decoder, blocks = find_decoder(model)
        self.blocks = len(blocks)
        self.current: Pass | None = None
        self.depositing = False
        self._tapped: Tapped | None = None
        self._masks: dict = {}
        self.sites = [_site(block) for block in blocks]
        self._undo: list = []
        try:
            self._install(model, decoder, blocks)
        except BaseException:
            self.undo()
            raise

    def _install(self, model: nn.Module, decoder: nn.Module, blocks: nn.ModuleList) -> None:
        self._decoder_signature = inspect.signature(type(decoder).forward)
        self._wrap(decoder, "forward", self.run_decoder, decoder)
        for index, (block, site) in enumerate(zip(blocks, self.sites)):
            self._wrap(block, "forward", self.run_block, index)
            projection = query_projection(site.attention)
            if self.pruner.kv[index] == "keep" and projection is not None:
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
        """`generate`, refused where it would route a prompt more than once or in pieces."""
        config = kwargs.get("generation_config") or model.generation_config
        if kwargs.get("use_cache", config.use_cache) is False:
            raise UserError(
                "generate(use_cache=False) would route the prompt anew for every token.\nLeave use_cache on."
            )
        if kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)):
            raise UserError("prefill_chunk_size splits the prompt, which is routed whole.\nLeave it unset.")
        return inner(*args, **kwargs)

    # ---------------------------------------------------------------- the schedule, seen from a block

    def sparsity(self, index: int) -> float:
        return self.pruner.schedule.sparsity[index]

    def is_routed(self, index: int) -> bool:
        router = self.pruner.router
        return not router.keep[index].all() if isinstance(router, FixedRouter) else self.sparsity(index) > 0.0

    def scores_matter(self, index: int) -> bool:
        """Whether a later router reads what this block writes: not if a block in between writes every token anew."""
        for later in range(index + 1, self.blocks):
            if self.is_routed(later):
                return True
            if self.sites[later].window is None:
                return False
        return False

    # ---------------------------------------------------------------- the model's forward

    def run_decoder(self, decoder: nn.Module, inner, args: tuple, kwargs: dict):
        bound = self._decoder_signature.bind(decoder, *args, **kwargs).arguments
        self.current = self._open(bound)
        self._masks = {}
        try:
            output = inner(*args, **kwargs)
            self._close(self.current)
            return output
        finally:
            self.current, self._tapped, self._masks = None, None, {}

    def _open(self, arguments: dict) -> Pass:
        extra = arguments.get("kwargs", {})
        tokens, mask, cache = (
            arguments.get(name, extra.get(name)) for name in ("input_ids", "attention_mask", "past_key_values")
        )
        tokens = arguments.get("inputs_embeds", extra.get("inputs_embeds")) if tokens is None else tokens
        batch, new = tokens.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        if cache is not None and getattr(cache, "is_compileable", False):
            raise UserError(
                "token skipping needs a dynamic key-value cache; this one is static.\n"
                "Leave `cache_implementation` unset."
            )
        if mask is not None and mask.dim() != 2:
            raise UserError(
                "a TokenPruner reads padding from a (batch, tokens) attention_mask; masks of other shapes are refused."
            )
        real = torch.ones(batch, new, dtype=torch.bool, device=tokens.device)
        past_real, padded = None, False
        if mask is not None:
            whole = mask[:, -(past + new) :].to(torch.bool)
            real, past_real = whole[:, -new:], whole[:, :-new]
            padded = not bool(whole.all())
        self._check_windows(past + new)
        routed = past == 0 or self.pruner.routing_chunk
        prompt = self.pruner.masked_prompt
        if prompt is not None and past:
            raise UserError("the training forward takes the whole text in one pass, without a filled cache.")
        width = new if prompt is None else prompt
        part = RoutedPart.of(real[:, :width], padded, past == 0) if routed else None
        table = torch.ones(batch, width, device=tokens.device) if self.pruner.router.needs_attention else None
        past_real = past_real if padded else None
        return Pass(real, past, past_real, part, prompt is not None, table, Trace(real=real))

    def _check_windows(self, tokens: int) -> None:
        for index, site in enumerate(self.sites):
            if site.window is not None and tokens > site.window:
                raise UserError(
                    f"block {index} sees a sliding window of {site.window} tokens and the text has {tokens}: "
                    "such texts cannot be pruned by this version.\nUse shorter texts, or a model without sliding windows."
                )

    def _close(self, done: Pass) -> None:
        trace = done.trace
        trace.prompt = trace if done.part is not None else self.pruner.trace.prompt
        self.pruner.trace, self.pruner.decisions = trace, done.decisions

    # ---------------------------------------------------------------- a block's forward

    def run_block(self, index: int, inner, args: tuple, kwargs: dict):
        state = self.current
        if state is None:
            return inner(*args, **kwargs)
        site = self.sites[index]
        call = BlockCall(site.signature, site.cache_name, args, kwargs)
        if state.part is None:
            state.trace.keep.append(state.real)
            return self._continue(index, inner, call)
        if not self.is_routed(index):
            state.trace.keep.append(state.real)
            return self._dense(index, inner, call)
        run = self._masked if state.masked else self._gathered
        return run(index, inner, call)

    def _continue(self, index: int, inner, call: BlockCall) -> Tensor:
        """New tokens on a filled cache, all computed (decode policy `dense`)."""
        layer = self._layer(call.cache, index)
        if not isinstance(layer, RoutedLayer):
            return call.run(inner)
        state = self.current
        new = state.all_tokens(padded=state.past_real is not None)

        def store(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            layer.append(keys, values, new.slots, new.valid, new.all_valid, new.slots.shape[1])
            return layer.keys, layer.values

        if layer.complete:  # stored as seen: the model's own mask fits
            return call.run(inner, cache=Port(call.cache, store))
        keys = Tokens(
            torch.cat([layer.slots, new.slots], 1),
            torch.cat([layer.valid, new.valid], 1),
            layer.all_valid and new.all_valid,
        )
        mask = self._mask(index, new, keys, call.hidden.dtype)
        return call.run(inner, cache=Port(call.cache, store), attention_mask=mask)

    def _dense(self, index: int, inner, call: BlockCall) -> Tensor:
        """Every token of a routed part, by the stock block."""
        if isinstance(self._layer(call.cache, index), RoutedLayer):
            return self._continue(index, inner, call)
        output = call.run(inner)
        state = self.current
        if self._tapped is not None:
            everyone = state.all_tokens(state.past_real is not None or state.part.padded)
            past = self._past_tokens()
            keys = (
                everyone
                if past is None
                else Tokens(*(torch.cat(p, 1) for p in zip(past, (everyone.slots, everyone.valid))), False)
            )
            self._write_scores(everyone, keys, None)
        return output

    def _past_tokens(self) -> tuple[Tensor, Tensor] | None:
        state = self.current
        if not state.past:
            return None
        slots = torch.arange(state.past, device=state.real.device).expand(state.real.shape[0], state.past)
        return slots, torch.ones_like(slots, dtype=torch.bool) if state.past_real is None else state.past_real

    # ---------------------------------------------------------------- routing

    def _context(self, index: int, hidden: Tensor, kept: tuple[int, ...]) -> RoutingContext:
        state, device = self.current, hidden.device
        lengths, counts = (torch.tensor(n, device=device)[:, None] for n in (state.part.lengths, kept))
        part = state.part
        return RoutingContext(
            index, self.sparsity(index), part.real, part.position, lengths, counts, state.table, hidden
        )

    def _decide(self, index: int, hidden: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """keep (B, T) bool, and how many tokens of each row that is."""
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

    # ---------------------------------------------------------------- the gathered executor

    def _gathered(self, index: int, inner, call: BlockCall) -> Tensor:
        """Rows gathered, the block run on them, rows scattered back; skipped rows get `skip`."""
        state, hidden = self.current, call.hidden
        keep, kept = self._decide(index, hidden)
        state.trace.keep.append(keep)
        width, even = max(kept), len(set(kept)) == 1
        index_BK, valid = gather_index(keep, width)
        queries = Tokens(index_BK + state.past, valid, even)
        if self.pruner.kv[index] == "keep":
            port, keys = self._keep_port(index, inner, call, keep, index_BK, even)
        else:
            port, keys = self._evict_port(index, call, queries)
        base = self.pruner.skip_function(hidden, index)
        if width == 0:
            return base
        mask = self._mask(index, queries, keys, hidden.dtype)
        rows = call.run(inner, **call.rows(index_BK), attention_mask=mask, cache=port)
        if not even:
            rows = torch.where(valid[..., None], rows, take_rows(base, index_BK))
        if self._tapped is not None:
            self._write_scores(queries, keys, index_BK if self.pruner.kv[index] == "evict" else None)
        return put_rows(base, index_BK, rows)

    def _evict_port(self, index: int, call: BlockCall, queries: Tokens):
        """Skipped tokens give no key and no value: the cache gets the kept ones."""
        state, seen = self.current, self.current.real.shape[1]
        layer = self._routed_layer(call.cache, index, complete=False)
        if layer is None:
            return None, queries
        if not queries.slots.shape[1]:
            raise UserError(f"FixedRouter keeps no token at all in block {index}: evict would leave its cache empty.")
        keys = queries
        if layer.seen:
            keys = Tokens(
                torch.cat([layer.slots, queries.slots], 1),
                torch.cat([layer.valid, queries.valid], 1),
                layer.all_valid and queries.all_valid,
            )

        def store(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            layer.append(k, v, queries.slots, queries.valid, queries.all_valid, seen)
            return layer.keys, layer.values

        return Port(call.cache, store), keys if state.past else queries

    def _keep_port(self, index: int, inner, call: BlockCall, keep: Tensor, index_BK: Tensor, even: bool):
        """Keys and values for all tokens: those of the skipped ones are deposited first, then merged in order."""
        state = self.current
        batch, tokens = keep.shape
        layer = self._routed_layer(call.cache, index, complete=True) or RoutedLayer(complete=True)
        # without raggedness kept and skipped tokens make up the row; else deposit for every token (fillers are
        # overwritten)
        rest = gather_index(~keep, tokens - index_BK.shape[1])[0] if even else None
        deposit = self._deposit(index, inner, call, rest)
        padded = state.part.padded
        slots = state.slots

        def store(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            merged = (_merge(new, old, index_BK, rest, keep) for new, old in zip((k, v), deposit))
            layer.append(*merged, slots, state.real, not padded, tokens)
            return layer.keys, layer.values

        if not index_BK.shape[1]:
            layer.append(*deposit, slots, state.real, not padded, tokens)
        everyone = state.all_tokens(padded)
        past = self._past_tokens()
        if past is None:
            return Port(call.cache, store), everyone
        keys = Tokens(*(torch.cat(p, 1) for p in zip(past, (everyone.slots, everyone.valid))), not padded)
        return Port(call.cache, store), keys

    def _deposit(self, index: int, inner, call: BlockCall, rest: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Keys and values (B, G, R, D) of the tokens `rest` (B, R), or of all tokens: the block is run up to its
        cache."""
        if rest is not None and rest.shape[1] == 0:
            return None, None
        port = DepositPort(call.cache)
        self.depositing = True
        try:
            call.run(inner, **(call.rows(rest) if rest is not None else {}), attention_mask=None, cache=port)
        except Deposited:
            return port.keys, port.values
        finally:
            self.depositing = False
        raise UserError(
            f'block {index} did not hand keys and values to its cache: kv="keep" cannot be used with this model.'
        )

    def run_query_projection(self, projection: nn.Module, inner, args: tuple, kwargs: dict) -> Tensor:
        """A deposit wants no queries: zeros that take no memory and no multiplication."""
        if not self.depositing:
            return inner(*args, **kwargs)
        hidden = args[0]
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], projection.out_features)

    # ---------------------------------------------------------------- the masked executor

    def _masked(self, index: int, inner, call: BlockCall) -> Tensor:
        """All rows run, keys of skipped tokens hidden from all but themselves; forward value = the gathered executor's.

        Output: keep * block(x) + (1 - keep) * skip(x) with a straight-through gate: d/dp = block(x) - skip(x). What a
        skipped token's row computes is used for that gradient alone. Tokens after the routed part are all computed.
        """
        state, hidden = self.current, call.hidden
        part_width = state.part.real.shape[1]
        keep, _ = self._decide(index, hidden[:, :part_width])
        tail = state.real[:, part_width:]
        whole = torch.cat([keep, tail], 1)
        state.trace.keep.append(whole)
        visible_as_key = whole if self.pruner.kv[index] == "evict" else state.real
        everyone = Tokens(state.slots, state.real, False)
        keys = Tokens(state.slots, visible_as_key, False)
        mask = self._mask(index, everyone, keys, hidden.dtype, themselves=True)
        rows = call.run(inner, attention_mask=mask, cache=None)
        if self._tapped is not None:
            self._write_scores(Tokens(state.slots, whole, False), keys, None)
        base = self.pruner.skip_function(hidden, index)
        output = torch.where(whole[..., None], rows, base)
        if isinstance(self.pruner.router, FixedRouter):
            return output
        probability = state.decisions[-1].probability
        gate = torch.cat([probability - probability.detach(), torch.zeros_like(tail, dtype=probability.dtype)], 1)
        return output + (gate[..., None] * (rows - base).detach()).to(output.dtype)

    # ---------------------------------------------------------------- masks, scores, cache layers

    def _mask(
        self, index: int, queries: Tokens, keys: Tokens, dtype: torch.dtype, themselves: bool = False
    ) -> Tensor | None:
        """(B, 1, Q, S) attention mask, or None where the attention function's own causal rule says the same."""
        site = self.sites[index]
        alike, single = keys is queries, queries.slots.shape[1] == 1
        unbounded = site.window is None or site.window >= int(self.current.past + self.current.real.shape[1])
        eager = site.implementation == "eager"
        if (alike or single) and keys.all_valid and queries.all_valid and unbounded and not eager and not themselves:
            return None
        visible = visible_keys(queries.slots, keys, site.window)
        if themselves:
            visible = visible | torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)
        elif not (keys.all_valid and queries.all_valid):  # a filler's row must see something; its output is discarded
            visible = visible | ~visible.any(-1, keepdim=True)
        visible = visible[:, None]
        if eager:
            return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
                ~visible, torch.finfo(dtype).min
            )
        return visible

    def _listen(self, module: nn.Module, tapped: Tapped) -> None:
        if self.current is not None and self.current.part is not None:
            self._tapped = tapped

    @torch.no_grad()
    def _write_scores(self, queries: Tokens, keys: Tokens, index_BK: Tensor | None) -> None:
        """Write what this block's attention says of its keys into the table; `index_BK` = the tokens the last keys
        are."""
        state, tapped = self.current, self._tapped
        self._tapped = None
        if state.masked:  # tokens after the routed part have no say in how it is routed
            routed = state.part.real.shape[1]
            tapped = replace(tapped, query=tapped.query[:, :, :routed], key=tapped.key[:, :, :routed])
            queries, keys = queries.first(routed), keys.first(routed)
        last = self.pruner.window if self.pruner.attention == "window" else None
        scores, seen = received_attention(tapped, queries, keys, last)
        seen = seen & keys.valid
        width = state.table.shape[1] if index_BK is None else index_BK.shape[1]
        scores, seen = scores[:, -width:], seen[:, -width:]
        if index_BK is None:
            state.table = torch.where(seen, scores, state.table)
        else:
            old = state.table.gather(1, index_BK)
            state.table = state.table.scatter(1, index_BK, torch.where(seen, scores, old))

    def _layer(self, cache, index: int):
        if cache is None or len(cache.layers) <= index:
            return None
        return cache.layers[index]

    def _routed_layer(self, cache, index: int, complete: bool) -> RoutedLayer | None:
        """The cache's layer of this block in its routed form; None without a cache."""
        if cache is None:
            return None
        if len(cache.layers) <= index:  # a lazily growing cache
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(index + 1 - len(cache.layers)))
        layer = cache.layers[index]
        if not isinstance(layer, RoutedLayer):
            layer = cache.layers[index] = RoutedLayer.adopt(layer, complete, self.current.past_real)
        return layer


def _site(block: nn.Module) -> Site:
    attention = find_attention(block)
    signature = inspect.signature(functools.partial(type(block).forward, block))
    return Site(
        signature, cache_name(block), attention, sliding_window(attention), attention.config._attn_implementation
    )


def _merge(new: Tensor, deposited: Tensor | None, index_BK: Tensor, rest: Tensor | None, keep: Tensor) -> Tensor:
    """Keys (or values) of all tokens in order: `new` (B, G, K, D) at index_BK, `deposited` at `rest` (or
    everywhere)."""
    if deposited is None:
        return put_heads(new, index_BK, keep.shape[1])
    if rest is not None:
        order = torch.cat([index_BK, rest], 1)
        both = torch.cat([new, deposited], 2)
        return put_heads(both, order, keep.shape[1])
    valid = keep.gather(1, index_BK)[:, None, :, None]
    at = index_BK[:, None, :, None].expand_as(new)
    return deposited.scatter(2, at, torch.where(valid, new, deposited.gather(2, at)))


def put_heads(x: Tensor, order: Tensor, tokens: int) -> Tensor:
    """x (B, G, T, D) whose rows are the tokens `order` (B, T), put in ascending order of tokens."""
    inverse = order.argsort(dim=1)
    if inverse.shape[0] == 1:
        return x.index_select(2, inverse[0])
    return x.gather(2, inverse[:, None, :, None].expand_as(x))
