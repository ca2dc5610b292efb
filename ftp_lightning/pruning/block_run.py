"""One block of one forward: what it does with its tokens, and what its attention may see and has to say.

Shapes: B rows, T new tokens, K kept tokens of the fullest row, G key heads, S keys, D hidden size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.cache import RoutedLayer, evicting, keeping
from ftp_lightning.pruning.continuation_scores import ContinuationTable
from ftp_lightning.pruning.decide import Decision, decide
from ftp_lightning.pruning.forward import Forward
from ftp_lightning.pruning.kept import Call, Kept, Tokens, tensor_of
from ftp_lightning.pruning.last_block import run_last
from ftp_lightning.pruning.plan import BlockPlan
from ftp_lightning.pruning.scores import Tapped, write_scores
from ftp_lightning.pruning.training_run import recomputed, run_with_gates

if TYPE_CHECKING:
    from ftp_lightning.pruning.attached import Attached


class ScoutDone(Exception):
    """Ends a scout's look once it has seen what it wants."""


@dataclass
class BlockRun:
    """One call of a block's forward.

    Attributes:
        attached: the pruner in force. plan: what it does with this block.
        forward: the forward of the model that this is part of.
        inner: the stock block. args, kwargs: what it was called with. call: the same by name.
        wants_scores: a later router reads what this block's attention says.
        decision: which tokens enter; None: all of them.
        sight: what the attention about to run may see; None: the stock attention with the stock mask.
        silent: the kind of projections that return zeros, since nobody reads them: "query" or "key_value".
        tapped: what the attention that just ran was computed from, where its scores are wanted.
        mlp_hidden: (B, T, D), what came to the MLP, where it is entered by other tokens than the attention.
    """

    attached: Attached
    plan: BlockPlan
    forward: Forward
    inner: functools.partial
    args: tuple
    kwargs: dict
    wants_scores: bool
    decision: Decision | None = None
    sight: Sight | None = None
    silent: str = ""
    tapped: Tapped | None = None
    mlp_hidden: Tensor | None = None
    call: Call = field(init=False)

    def compute(self) -> Tensor:
        """The block's output (B, T, D); what the cache and the attention scores need of it is stored."""
        forward, training = self.forward, self.forward.training
        if forward.plain_step and (layer := self._plain_layer()) is not None:
            return self._run_plain(layer)
        self.call = Call.of(self.plan.site.block, self.args, self.kwargs)
        if forward.look is not None:
            return self._look()
        if training is not None and training.recompute and not self.attached.plan.enters_parts:
            self.inner = functools.partial(recomputed, self, self.inner)
        self.decision = decision = decide(self)
        kept, mlp = (None, None) if decision is None else (decision.attention, decision.mlp)
        forward.note(forward.real if kept is None else kept.keep, forward.real if mlp is None else mlp.keep)
        if kept is not mlp and kept is not None:  # parts take their tokens out where they are entered, see `parts`
            return tensor_of(self.inner(**self.call.arguments))
        if forward.last_tokens is not None and self.plan.is_last and (output := run_last(self, kept)) is not None:
            return output
        if kept is None:
            return self.run_dense()
        if training is not None:
            return run_with_gates(self, self.inner, self.call, "block")
        hidden, output = self.call.hidden, self.run_kept(self.inner, self.call, kept)
        if self.attached.maps is None:
            return hidden if output is None else kept.put(hidden, tensor_of(output))
        return self.spread("block", hidden, kept, None if output is None else tensor_of(output))

    @property
    def apart(self) -> Decision | None:
        """The decision, where attention and MLP are entered by different tokens."""
        decision = self.decision
        return None if decision is None or decision.attention is decision.mlp else decision

    # ---------------------------------------------------------------- all tokens

    def run_dense(self) -> Tensor:
        """The block on all tokens: with the model's own attention and mask wherever these fit."""
        forward, call, keys = self.forward, self.call, self.forward.new
        # Under a decode policy each block keeps what it wrote, so its cache layer becomes a routed one; else the first
        # alone does, so that a model without its pruner is refused before any layer has changed.
        adopts = (self.plan.index == 0 and forward.routed is not None) or self.attached.pruner.decode != "dense"
        layer = self.routed_layer(call.cache, True, adopts)
        if layer is not None:
            if forward.past:
                keys, self.sight = self._continued(layer)
            layer.expected = forward.new, forward.real.shape[1]
        output = tensor_of(self.inner(**call.arguments))
        if self.tapped is not None:
            if forward.past and layer is None:
                keys = forward.seen.last(self.tapped.key.shape[2])
            write_scores(self, None, forward.new, keys, layer)
        return output

    def _continued(self, layer: RoutedLayer) -> tuple[Tokens, Sight | None]:
        """On a filled cache: the keys, and what queries may see of them; None where the model's own mask fits, since
        all tokens seen are stored in order."""
        forward, window, tokens = self.forward, self.plan.site.window, self.forward.real.shape[1]
        single, keys = tokens == 1 and layer.all_valid and not forward.padded, forward.new
        if layer.is_initialized and (not single or window is not None or self.wants_scores):
            keys = layer.tokens.followed_by(forward.new)  # a plain decode step does not ask
        if layer.complete and window is None:
            return keys, None
        held = layer.keys.shape[2] + 1 if layer.complete and layer.is_initialized else forward.span
        if single and (window is None or held <= window):
            return keys, Sight(forward.new, forward.new, everything=True)
        return keys, Sight(forward.new, keys, window, new=tokens)

    def _plain_layer(self) -> RoutedLayer | None:
        """The cache's layer, where a single token that is computed sees all that it holds: no mask, no arguments to
        change. Generating is mostly this, and its time is short."""
        if self.plan.removed or self.plan.site.window is not None:
            return None
        layer = self.routed_layer(self.kwargs.get(self.plan.site.block.cache_name), True, adopt=False)
        return layer if layer is not None and layer.all_valid else None

    def _run_plain(self, layer: RoutedLayer) -> Tensor:
        new = self.forward.new
        self.forward.note(new.valid, new.valid)
        layer.expected = new, 1
        self.sight = None if layer.complete else Sight(new, new, everything=True)
        return self.inner(*self.args, **self.kwargs)

    def _look(self) -> Tensor:
        output = self.run_dense()
        if self.forward.look is not None and self.plan.index == self.forward.look.blocks - 1:
            raise ScoutDone
        return output

    # ---------------------------------------------------------------- the kept tokens alone

    def run_kept(self, inner, call: Call, kept: Kept, read: Kept | None = None, dense: bool = False):
        """What `inner` (the block, or its attention) returns for the kept tokens; None where no row keeps one.

        Whatever a skipped token leaves behind in the cache (`keep`: its key and value; `evict`: that it was seen) is
        there afterwards.

        Args:
            read: of the kept tokens those that run; None: all of them.
            dense: nothing is skipped: every token leaves its key and value.
        """
        forward, window, keep = self.forward, self.plan.site.window, dense or self.plan.keeps
        layer, running = self.routed_layer(call.cache, keep), kept if read is None else read
        if keep:
            cache, keys, layer = keeping(self, inner, call, running, layer)
        else:
            cache, keys, layer = evicting(self, inner, call, kept, layer, read)
        if not running.width:
            self.silent = ""
            if isinstance(forward.table, ContinuationTable) and self.wants_scores and layer is not None:
                forward.table.recall(layer)
            return None
        queries = Tokens(running.index + forward.past, running.valid, running.even)
        if read is None and running.width == keys.slots.shape[1] and (running.even or not keep):
            queries = keys  # they are the same tokens
        unbounded = window is None or forward.span <= window
        plain = unbounded and keys.all_valid and queries.all_valid
        ends = forward.real.shape[1] == 1 or (read is not None and forward.last_tokens == 1)  # the last token alone
        self.sight = Sight(
            queries, keys, None if unbounded else window, forward.real.shape[1] if keep else kept.width,
            causal=plain and keys is queries, everything=plain and ends, complete=layer is not None and layer.complete,
        )  # fmt: skip
        try:
            output = inner(**call.at(running.index, cache))
        finally:
            self.sight, self.silent = None, ""
        if self.tapped is not None:
            write_scores(self, running, queries, keys, layer)
        return output

    def spread(self, part: str, hidden: Tensor, kept: Kept, computed: Tensor | None) -> Tensor:
        """(B, T, D): `computed` (B, K, D) for the kept tokens, what `skip` says for the others, from hidden (B, T, D).

        A compensation is computed for the skipped tokens alone where rows are even, else for all of them.
        """
        if computed is not None and kept.even and self.attached.maps is not None:
            return kept.join(computed, self.skipped(kept.rest.take(hidden), part))
        base = self.skipped(hidden, part)
        return base if computed is None else kept.put(base, computed)

    def skipped(self, hidden: Tensor, part: str) -> Tensor:
        """What tokens hidden (B, n, D) become where they skip: of a block the residual stream behind it, of a part its
        update. The compensation is taken where the tokens are, in their dtype."""
        compensation = self.attached.maps
        if compensation is None or part not in compensation.parts:  # of a part that was not fitted padding alone skips
            return hidden if part == "block" else torch.zeros_like(hidden)
        moved, place = self.attached.compensations, (hidden.device, hidden.dtype)
        if place not in moved:
            moved[place] = compensation.to(*place)
        update = moved[place].update(hidden, self.plan.index, part)
        return hidden + update if part == "block" else update

    # ---------------------------------------------------------------- the cache's layer

    def routed_layer(self, cache, complete: bool, adopt: bool = True) -> RoutedLayer | None:
        """The cache's layer of this block in its routed form, which a stock layer is given (`adopt`); None without."""
        index = self.plan.index
        if cache is None or (not adopt and len(cache.layers) <= index):
            return None
        if len(cache.layers) <= index:  # a lazily growing cache
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(index + 1 - len(cache.layers)))
        layer = cache.layers[index]
        if isinstance(layer, RoutedLayer):
            return layer
        if not adopt:
            return None
        cache.layers[index] = routed = RoutedLayer.adopt(layer, complete, self.plan.site.window, self.forward.past_real)
        return routed
