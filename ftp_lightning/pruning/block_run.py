"""One block of one forward: what it does with its tokens, and what its attention may see and has to say.

Shapes: B rows, T new tokens, K kept tokens of the fullest row, G key heads, S keys, D hidden size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.cache import RoutedLayer
from ftp_lightning.pruning.calls import Call, tensor_of
from ftp_lightning.pruning.decide import Decision, decide
from ftp_lightning.pruning.forward import Forward
from ftp_lightning.pruning.kept import Kept, Tokens
from ftp_lightning.pruning.keys_values import Storing, evicting, keeping
from ftp_lightning.pruning.said import recall_scores, write_scores
from ftp_lightning.pruning.scores import Tapped
from ftp_lightning.pruning.site import Site
from ftp_lightning.pruning.training_run import recomputed, run_all_tokens
from ftp_lightning.routing.choice import RoutedTokens

if TYPE_CHECKING:
    from ftp_lightning.pruning.attached import Attached


class ScoutDone(Exception):
    """Ends a scout's look once it has seen what it wants."""


@dataclass
class BlockRun:
    """One call of a block's forward.

    Attributes:
        attached: the pruner in force. index: of the block. site: what is known of it.
        forward: the forward of the model that this is part of.
        inner: the stock block. args, kwargs: what it was called with.
        decision: which tokens enter; None: all of them.
        sight: what the attention about to run may see; None: the stock attention with the stock mask.
        silent: the kind of projections that return zeros, since nobody reads them: "query" or "key_value".
        tapped: what the attention that just ran was computed from, where its scores are wanted.
        mlp_hidden: (B, T, D), what came to the MLP, where it is entered by other tokens than the attention.
    """

    attached: Attached
    index: int
    site: Site
    forward: Forward
    inner: functools.partial
    args: tuple
    kwargs: dict
    decision: Decision | None = None
    sight: Sight | None = None
    silent: str = ""
    tapped: Tapped | None = None
    mlp_hidden: Tensor | None = None

    def compute(self) -> Tensor:
        """The block's output (B, T, D); what the cache and the attention scores need of it is stored."""
        forward, attached = self.forward, self.attached
        if forward.look is not None:
            return self._look()
        if forward.plain_step and (layer := self._plain_layer()) is not None:
            forward.trace.add(forward.real, forward.real)
            layer.expect(forward.new, 1)
            self.sight = None if layer.complete else forward.everything
            return self.inner(*self.args, **self.kwargs)
        if forward.training is not None and forward.training.recompute and not attached.enters_parts:
            self.inner = functools.partial(recomputed, self, self.inner)
        self.decision = decision = decide(self)
        attention, mlp = (decision.attention, decision.mlp) if decision else (None, None)
        forward.trace.add(*(forward.real if kept is None else kept.keep for kept in (attention, mlp)))
        if decision is None or not decision.by_block:  # parts are decided where they are entered, see `parts`
            if attention is None:
                return self._run_dense()
            return tensor_of(self.call.run(self.inner))
        assert attention is not None  # of a whole block both parts are one
        if forward.training is not None:
            gate, gates = decision.gates[0], forward.training.gates
            computed = tensor_of(run_all_tokens(self, self.inner, self.call, attention.keep, gate))
            return gates.blend(
                computed, self.attached.skipped(self.call.hidden, self.index, "block"), attention.keep, gate
            )
        if (read := self._read(attention)) is not None:
            return self._run_read(attention, read)
        output = self.run_kept(self.inner, self.call, attention)
        return self.spread("block", self.call.hidden, attention, None if output is None else tensor_of(output))

    @cached_property
    def call(self) -> Call:
        return Call(self.site.block, self.args, self.kwargs)

    @property
    def apart(self) -> Decision | None:
        """The decision, where attention and MLP are entered by different tokens."""
        return None if self.decision is None or self.decision.by_block else self.decision

    @property
    def routed(self) -> RoutedTokens:
        """The tokens that are ranked, where this is known to be a prompt."""
        assert self.forward.routed is not None
        return self.forward.routed

    # ---------------------------------------------------------------- all tokens

    def _run_dense(self) -> Tensor:
        """The block on all tokens: with the model's own attention and mask wherever these fit."""
        forward, call = self.forward, self.call
        if (read := self._read(None)) is not None:
            return self._run_read(None, read)
        layer = self.routed_layer(True) if self._adopts else self.layer
        keys = None
        if layer is not None:
            if self._needs_keys(layer):
                keys = layer.tokens.followed_by(forward.new) if layer.is_initialized else forward.new
            self.sight = self._dense_sight(layer, keys)
            layer.expect(forward.new, forward.real.shape[1])
        output = tensor_of(call.run(self.inner))
        if self.tapped:
            keys = forward.seen.last(self.tapped.key.shape[2]) if keys is None else keys
            write_scores(self, None, forward.new, keys, layer)
        return output

    @property
    def _adopts(self) -> bool:
        """Whether a dense block's cache layer becomes a routed one: each under a decode policy, which keeps what every
        block wrote; else the first, so that a model without its pruner is refused before any layer has changed."""
        forward = self.forward
        if self.attached.pruner.decode != "dense" and forward.training is None:
            return True
        return self.index == 0 and forward.routed is not None

    def _look(self) -> Tensor:
        output = self._run_dense()
        if self.forward.look is not None and self.index == self.forward.look.blocks - 1:
            raise ScoutDone
        return output

    def _plain_layer(self) -> RoutedLayer | None:
        """The cache's layer, where a single token that is computed sees all that it holds: no mask, no arguments to
        change. Generating is mostly this, and its time is short."""
        if self.attached.pruner.removed_parts(self.index) or self.site.window is not None:
            return None
        layer = self._layer_of(self.kwargs.get(self.site.block.cache_name))
        return layer if layer is not None and layer.all_valid else None

    def _needs_keys(self, layer: RoutedLayer) -> bool:
        """Whether a dense block has to know which tokens its cache holds; a plain decode step does not."""
        forward = self.forward
        several = forward.padded or not layer.all_valid or forward.real.shape[1] > 1
        return several or self.site.window is not None or self.wants_scores

    def _dense_sight(self, layer: RoutedLayer, keys: Tokens | None) -> Sight | None:
        """None where the model's own mask fits: on an empty cache, and where all tokens seen are stored in order."""
        forward, window = self.forward, self.site.window
        if not forward.past or (layer.complete and window is None):
            return None
        single = forward.real.shape[1] == 1 and layer.all_valid and not forward.padded
        held = layer.keys.shape[2] + 1 if layer.complete and layer.is_initialized else forward.span
        if single and (window is None or held <= window):
            return Sight(forward.new, forward.new, everything=True)
        assert keys is not None  # `_needs_keys`
        return Sight(forward.new, keys, window, new=forward.real.shape[1])

    # ---------------------------------------------------------------- the kept tokens alone

    def run_kept(self, inner, call: Call, kept: Kept, read: Kept | None = None, dense: bool = False):
        """What `inner` (the block, or its attention) returns for the kept tokens; None where no row keeps one.

        Whatever a skipped token leaves behind in the cache (`keep`: its key and value; `evict`: that it was seen) is
        there afterwards.

        Args:
            read: of the kept tokens those that run; None: all of them.
            dense: nothing is skipped: every token leaves its key and value.
        """
        forward, keep = self.forward, dense or self.attached.pruner.kv[self.index] == "keep"
        layer = self._routed_layer_of(call.cache, keep)
        running = kept if read is None else read
        if keep:
            storing = keeping(self, inner, call, running, layer)
        else:
            storing = evicting(self, inner, call, kept, layer, read)
        if not running.width:
            self.silent = ""
            recall_scores(self, storing.layer)
            return None
        queries = Tokens(running.index + forward.past, running.valid, running.even)
        if read is None and running.width == storing.keys.slots.shape[1] and (running.even or not keep):
            queries = storing.keys  # they are the same tokens
        ends = forward.real.shape[1] == 1 or (read is not None and forward.last_tokens == 1)
        self.sight = self._kept_sight(queries, storing, forward.real.shape[1] if keep else kept.width, ends)
        try:
            output = call.run(inner, **call.at(running.index), attention_mask=None, cache=storing.cache)
        finally:
            self.sight, self.silent = None, ""
        write_scores(self, running, queries, storing.keys, storing.layer)
        return output

    def _kept_sight(self, queries: Tokens, storing: Storing, new: int, ends: bool) -> Sight:
        """new: how many keys this forward brings. ends: the only query is that of the last new token."""
        forward, window, keys = self.forward, self.site.window, storing.keys
        unbounded = window is None or forward.span <= window
        plain = unbounded and keys.all_valid and queries.all_valid
        complete = storing.layer is not None and storing.layer.complete
        return Sight(
            queries, keys, None if unbounded else window, new,
            causal=plain and keys is queries, everything=plain and ends, complete=complete,
        )  # fmt: skip

    def spread(self, part: str, hidden: Tensor, kept: Kept, computed: Tensor | None) -> Tensor:
        """(B, T, D): `computed` (B, K, D) for the kept tokens, what `skip` says for the others, from hidden (B, T, D).

        A compensation is computed for the skipped tokens alone where rows are even, else for all of them.
        """
        skipped = self.attached.skipped
        if computed is not None and kept.even and self.attached.pruner.compensation is not None:
            return kept.join(computed, skipped(kept.rest.take(hidden), self.index, part))
        base = skipped(hidden, self.index, part)
        return base if computed is None else kept.put(base, computed)

    # ---------------------------------------------------------------- a last block, of which little is read

    def _read(self, kept: Kept | None) -> Kept | None:
        """Of the tokens that enter the last block (None: all) those whose output is read; None where all may be.

        A prompt's caller may read the logits of its last tokens alone (`logits_to_keep`): of the others the last block
        then has to give keys and values, and nothing else.
        """
        forward, attached, tokens = self.forward, self.attached, self.forward.real.shape[1]
        last = forward.last_tokens
        if last is None or last >= tokens or self.index != len(attached.sites) - 1:
            return None
        if forward.routed is None or forward.training is not None or attached.enters_parts or attached.is_watched():
            return None
        keep = (forward.real if kept is None else kept.keep).clone()
        keep[:, : tokens - last] = False
        if kept is None and not forward.padded:
            return Kept(keep, [last] * len(keep))
        if keep.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere this would wait for the device
            return Kept(keep, keep.sum(1).tolist())
        return None

    def _run_read(self, kept: Kept | None, read: Kept) -> Tensor:
        """(B, T, D): the block's output at the tokens that are read, anything at the others; the cache as ever."""
        forward, hidden, attached = self.forward, self.call.hidden, self.attached
        forward.trace.last_only = True
        output = self.run_kept(self.inner, self.call, read if kept is None else kept, read, dense=kept is None)
        if kept is not None and attached.pruner.compensation is not None:  # some of those that are read skip
            split = hidden.shape[1] - (forward.last_tokens or 0)
            tail = attached.skipped(hidden[:, split:], self.index, "block")
            hidden = torch.cat([hidden[:, :split].to(tail.dtype), tail], 1)
        return hidden if output is None else read.put(hidden, tensor_of(output))

    # ---------------------------------------------------------------- the cache's layer

    @property
    def wants_scores(self) -> bool:
        """Whether a later router reads what this block's attention says."""
        look, index = self.forward.look, self.index
        wanted = index in self.attached.scored if look is None else index == look.blocks - 1
        return wanted and self.forward.table is not None

    @property
    def layer(self) -> RoutedLayer | None:
        """The cache's layer of this block where it is a routed one."""
        return self._layer_of(self.call.cache)

    def _layer_of(self, cache) -> RoutedLayer | None:
        layer = None if cache is None or len(cache.layers) <= self.index else cache.layers[self.index]
        return layer if isinstance(layer, RoutedLayer) else None

    def routed_layer(self, complete: bool) -> RoutedLayer | None:
        """The cache's layer of this block in its routed form; None without a cache."""
        return self._routed_layer_of(self.call.cache, complete)

    def _routed_layer_of(self, cache, complete: bool) -> RoutedLayer | None:
        if cache is None:
            return None
        if len(cache.layers) <= self.index:  # a lazily growing cache
            more = self.index + 1 - len(cache.layers)
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(more))
        layer = cache.layers[self.index]
        if not isinstance(layer, RoutedLayer):
            layer = RoutedLayer.adopt(layer, complete, self.site.window, self.forward.past_real)
            cache.layers[self.index] = layer
        return layer
