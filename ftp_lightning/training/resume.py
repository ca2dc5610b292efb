"""Where only one block is pruned, the blocks below it do as in the dense model: capture that once, start above.

Shapes: B rows, S tokens that entered the model (prompt and continuation, the text's last token does not), D hidden
    size, N blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ftp_lightning.pruning.family import find_attention, find_blocks, sliding_window
from ftp_lightning.pruning.kept import Call
from ftp_lightning.pruning.site import signature_of
from ftp_lightning.routing.base import Needs


@dataclass
class BlockStates:
    """Hidden states between the blocks of one text: (B, S, D) each, all passes over the text joined.

    `entering(l)` is the input of block l; `entering(N)` the output of the last block. Memory: (N + 1) B S D numbers.
    """

    passes: list[list[Tensor]] = field(default_factory=list)

    def entering(self, block: int) -> Tensor:
        if len(self.passes[block]) > 1:
            self.passes[block] = [torch.cat(self.passes[block], dim=1)]
        return self.passes[block][0]

    def detached(self) -> BlockStates:
        """The same numbers without the graph that made them."""
        return BlockStates([[part.detach() for part in parts] for parts in self.passes])


@contextmanager
def capture(model: nn.Module, only: int | None = None) -> Iterator[BlockStates]:
    """Record the hidden states between the blocks during the forwards of one text (prompt, then continuation).

    only: what enters this block alone.
    """
    blocks = find_blocks(model)
    states = BlockStates([[] for _ in range(len(blocks) + 1)])

    def enter(index: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
        states.passes[index].append(args[0] if args else kwargs["hidden_states"])

    def leave(block: nn.Module, args: tuple, output: Tensor) -> None:
        states.passes[-1].append(output)

    wanted = [(i, block) for i, block in enumerate(blocks) if only in (None, i)]
    handles = [b.register_forward_pre_hook(functools.partial(enter, i), with_kwargs=True) for i, b in wanted]
    if only in (None, len(blocks)):
        handles.append(blocks[-1].register_forward_hook(leave))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, with gradients enabled, what the blocks compute depends differentiably on what enters the first one, and
    on nothing else: weights take no gradient. Put `capture` inside; its states are then what to differentiate by.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def enter(block: nn.Module, args: tuple, kwargs: dict) -> None:
        (args[0] if args else kwargs["hidden_states"]).requires_grad_(True)

    handle = find_blocks(model)[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for weight in weights:
            weight.requires_grad_(True)


@contextmanager
def resume_from(model: nn.Module, block: int, states: BlockStates) -> Iterator[None]:
    """Inside, forwards over the captured text start at `block`; block - 1 returns the stored states and costs nothing.

    Which pass it is says the cache: its length is the number of tokens already seen. So that it keeps saying so
    (position ids, masks and the phase rule ask its lowest layer), a block that does not run deposits placeholder keys
    of one number per token.

    Attach a pruner inside, not outside: its wrappers then lie above these. Its schedule must be 0 below `block`.
    A forward without a cache is that of the whole text. ValueError beyond the captured text.
    """
    with ExitStack() as stack:
        for index, module in enumerate(find_blocks(model)[:block]):
            stored = states if index == block - 1 else None
            stack.enter_context(_forward_replaced(module, functools.partial(_return_stored, index, module, stored)))
        yield


def first_needed_block(model: nn.Module, block: int, needs: Needs, since: int | None = None) -> int:
    """The lowest block that must run so that a router decides at `block` as in the full forward.

    A router that reads attention scores needs the last dense block below that sees every token: it writes the whole
    table anew, so what stood there before is of no account. One that decides from block 0 needs the very first block,
    and one that reads what several blocks wrote the first of these (`since`). Any other needs `block` alone.
    """
    if not needs.attention:
        return block
    if needs.once == "from block 0":
        return 0
    if since is not None:
        return min(since, block)
    below = list(find_blocks(model)[:block])
    seeing_all = [index for index, module in enumerate(below) if sliding_window(find_attention(module)) is None]
    return seeing_all[-1] if seeing_all else 0


@contextmanager
def _forward_replaced(block: nn.Module, forward: Callable) -> Iterator[None]:
    """The block's `forward` on the instance, with the signature of the one it stands for."""
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = functools.wraps(block.forward)(forward)
    try:
        yield
    finally:
        del block.__dict__["forward"]
        if before is not None:
            block.__dict__["forward"] = before


def _return_stored(index: int, block: nn.Module, states: BlockStates | None, *args, **kwargs) -> Tensor:
    """What a block below the first that runs does instead of computing."""
    call = Call.of(signature_of(block), args, kwargs)
    hidden, cache = call.hidden, call.cache
    seen, new = 0 if cache is None else cache.get_seq_length(index), hidden.shape[1]
    if cache is not None:
        placeholder = hidden.new_zeros(hidden.shape[0], 1, new, 1)
        cache.update(placeholder, placeholder, index)
    if states is None:
        return hidden
    stored = states.entering(index + 1)[:, seen : seen + new]
    if stored.shape != hidden.shape:
        raise ValueError(f"tokens {seen} to {seen + new} of {tuple(hidden.shape)} were not captured")
    return stored
