"""The block mask of flex attention, judged by a Q x S mask that is made pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftp_lightning.pruning import attention, flex
from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.kept import Kept, Tokens
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.routing import RandomRouter
from ftp_lightning.schedule import Schedule
from tests.families import family


def drawn(seed, batch, tokens, most, window, padded, themselves):
    """A Sight over `tokens` keys, its queries some of them, uneven rows where batch > 1."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(batch, tokens, dtype=torch.bool)
    counts = [max(1, most - 3 * row) for row in range(batch)]
    for row, count in enumerate(counts):
        keep[row, torch.randperm(tokens, generator=generator)[:count]] = True
    rows = Kept(keep, counts)
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    if padded:
        valid[-1, : tokens // 3] = False
    keys = Tokens(torch.arange(tokens).expand(batch, tokens).contiguous(), valid, not padded)
    return Sight(Tokens(rows.index, rows.valid, rows.even), keys, window, tokens, themselves=themselves), rows


def pair_by_pair(sight):
    """(B, Q, S) bool."""
    rows, queries = sight.queries.slots.shape
    found = torch.zeros(rows, queries, sight.keys.slots.shape[1], dtype=torch.bool)
    for row in range(rows):
        for i, own in enumerate(sight.queries.slots[row].tolist()):
            for j, other in enumerate(sight.keys.slots[row].tolist()):
                near = sight.window is None or other > own - sight.window
                found[row, i, j] = other <= own and near and bool(sight.keys.valid[row, j])
                found[row, i, j] |= sight.themselves and other == own
    return found


def listed(numbers, places, width):
    """(B, q, s) bool: the tiles that a block mask names."""
    found = torch.zeros(*numbers.shape[:1], numbers.shape[2], width, dtype=torch.bool)
    for row, counts in enumerate(numbers[:, 0].tolist()):
        for tile, count in enumerate(counts):
            found[row, tile, places[row, 0, tile, :count].long()] = True
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_visible_pair_is_left_out_and_full_tiles_are_full(data):
    tokens, batch = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    window, padded = data.draw(st.sampled_from([None, 1, 5, 30])), data.draw(st.booleans())
    most, themselves = data.draw(st.integers(1, tokens)), data.draw(st.booleans())
    sight, _ = drawn(data.draw(st.integers(0, 99)), batch, tokens, most, window, padded, themselves)
    size, visible = data.draw(st.sampled_from([1, 4, 8])), pair_by_pair(sight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "TILE", size)
        mask = flex.block_mask(sight)
    queries, keys = visible.shape[1:]
    tiles = -(-keys // size)
    partial = listed(mask.kv_num_blocks, mask.kv_indices, tiles)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, tiles)
    assert not (partial & full).any()
    place = [torch.arange(n) for n in visible.shape]
    said = mask.mask_mod(place[0][:, None, None], torch.tensor(0), place[1][:, None], place[2])
    assert torch.equal(said, visible)
    named = partial | full
    exact = window is None and not padded
    for row in range(batch):
        for i in range(-(-queries // size)):
            for j in range(tiles):
                tile = visible[row, i * size : (i + 1) * size, j * size : (j + 1) * size]
                assert named[row, i, j] or not tile.any()
                assert not full[row, i, j] or (tile.all() and tile.shape[1] == size)
                assert not exact or bool(named[row, i, j]) == bool(tile.any())


def test_nothing_of_the_size_of_queries_times_keys_is_made():
    sight, _ = drawn(0, 1, 4096, 1024, None, False, False)
    mask = flex.block_mask(sight)
    assert mask.kv_indices.numel() == (1024 // 128) * (4096 // 128)
    assert mask.seq_lengths == (1024, 4096)
    assert mask.q_indices is not None
    with torch.no_grad():
        assert flex.block_mask(sight).q_indices is None


@pytest.fixture
def seen(monkeypatch):
    """Flex attention on the CPU, not compiled: (queries, block mask) of each call."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers import masking_utils
    from transformers.integrations import flex_attention as theirs

    found = []

    def uncompiled(query, key, value, training=False, block_mask=None, **kwargs):
        found.append((query.shape[2], block_mask))
        return flex_attention(query, key, value, block_mask=block_mask, **kwargs)

    monkeypatch.setattr(theirs, "compile_friendly_flex_attention", uncompiled)
    whole = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **about: whole(**about | {"_compile": False}))
    monkeypatch.setattr(attention, "FLEX_NEVER", set())
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2"])
@pytest.mark.parametrize("kv", ["keep", "evict"])
@pytest.mark.parametrize("padded", [False, True])
def test_gathered_tokens_reach_flex_attention(name, kv, padded, seen, monkeypatch):
    """Sliding windows, soft caps, padding; a chunk and a token that go on."""
    monkeypatch.setattr(flex, "TILE", 8)
    text = torch.randint(2, 60, (2, 41), generator=torch.Generator().manual_seed(0))
    mask, found = torch.ones(2, 41, dtype=torch.long), {}
    if padded:
        mask[1, :7] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    model = family(name, torch.float32, "eager")
    pruner = TokenPruner(RandomRouter(2), Schedule([0.0, 0.5, 0.6, 0.0]), kv=kv)
    for backend in ("eager", "flex_attention"):
        model.set_attn_implementation(backend)
        cache, parts = None, []
        with torch.no_grad(), pruner(model):
            for start, end in ((0, 30), (30, 40), (40, 41)):
                about = {"attention_mask": mask[:, :end], "position_ids": position[:, start:end]}
                output = model(text[:, start:end], past_key_values=cache, use_cache=True, **about)
                cache = output.past_key_values
                parts.append(output.logits)
        found[backend] = torch.cat(parts, 1)[mask.bool()]
    assert (found["flex_attention"] - found["eager"]).abs().max() < 1e-5
    gathered = [(count, block_mask) for count, block_mask in seen if count not in (30, 10, 1)]
    assert gathered and all(block_mask.seq_lengths[0] == count for count, block_mask in gathered)


def test_what_flex_attention_cannot_do_goes_to_sdpa(monkeypatch):
    query = torch.zeros(1, 2, 3, 4)
    assert not attention._flexes(query, {}), "flex attention of a CPU is not used"
    monkeypatch.setattr(attention, "FLEX_NEVER", set())
    assert attention._flexes(query, {"dropout": 0.0})
    assert not attention._flexes(query, {"dropout": 0.1})
    assert not attention._flexes(query[:, :, :1], {})


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("window", [None, 70])
def test_the_compiled_kernel_obeys_the_tiles(window):
    """Tiles that the block mask leaves out are not computed: what is not compiled asks each pair."""
    from torch.nn.attention.flex_attention import flex_attention

    sight, rows = drawn(0, 2, 700, 300, window, True, False)
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, n, 16, generator=draw) for heads, n in ((4, rows.width), (2, 700), (2, 700)))
    compiled = torch.compile(flex_attention, dynamic=False)
    found = compiled(q, k, v, block_mask=flex.block_mask(sight), enable_gqa=True)
    visible = pair_by_pair(sight)
    p = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    expected = p @ v.repeat_interleave(2, 1)
    some = rows.valid & visible.any(-1)
    assert torch.allclose(found.transpose(1, 2)[some], expected.transpose(1, 2)[some], atol=1e-5)
