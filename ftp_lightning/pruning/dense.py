"""A block that computes every new token, where the cache below it may hold only some of the earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.cache import RoutedLayer
from ftp_lightning.pruning.calls import Call, tensor_of
from ftp_lightning.pruning.kept import Tokens

if TYPE_CHECKING:
    from ftp_lightning.pruning.engine import Engine


def run_dense(engine: Engine, index: int, inner, call: Call) -> Tensor:
    """The block on all rows: with the model's own attention and mask wherever these fit. (B, T, hidden)."""
    state = engine.running
    follows = engine.pruner.decode != "dense" and not state.masked  # then every block keeps what it wrote
    layer = engine.routed_layer(call.cache, index, True) if follows else engine.layer(call.cache, index)
    keys = None
    if layer is not None:
        if engine.needs_keys(index, layer):
            keys = layer.tokens.followed_by(state.new) if layer.is_initialized else state.new
        engine.sight = _sight(engine, index, layer, keys)
        layer.expect(state.new, state.real.shape[1])
    output = tensor_of(call.run(inner))
    engine.sight = None
    if engine.tapped:
        keys = state.seen.last(engine.tapped.key.shape[2]) if keys is None else keys
        engine.write_scores(None, state.new, keys, layer)
    return output


def _sight(engine: Engine, index: int, layer: RoutedLayer, keys: Tokens | None) -> Sight | None:
    """None where the model's own mask fits: on an empty cache, and where all tokens seen are stored in order."""
    state, window = engine.running, engine.sites[index].window
    if not state.past or (layer.complete and window is None):
        return None
    single = state.real.shape[1] == 1 and layer.all_valid and not state.padded
    held = layer.keys.shape[2] + 1 if layer.complete and layer.is_initialized else state.span
    if single and (window is None or held <= window):
        return Sight(state.new, state.new, everything=True)
    assert keys is not None  # `Engine.needs_keys`
    return Sight(state.new, keys, window, new=state.real.shape[1])
