"""The slow, obvious twin of the engine: a Llama forward in plain torch with T x T masks, one row at a time, no cache,
no gathering.

It shares no code with what it judges. Norms and rotary angles are the model's, whose rounding is not ours. Of other
families the model itself says which keys a block sees: by the mask that the stock forward gives to the block. Of the
package only routers and what they are told (`RoutingContext`) are used.
Padding is cut off before a row is computed, so nothing here knows of padding.
"""

import inspect
import operator

import torch

from ftp_lightning.routing import RoutingContext

LAYERS = ("model.layers", "gpt_neox.layers", "transformer.h", "model.decoder.layers")
ATTENTION = ("self_attn", "attention", "attn")
MLP = ("mlp", "block_sparse_moe", "feed_forward")


def layers_of(model):
    """The decoder layers, where the families that are tested have them; also inside of adapters (peft)."""
    model, found = model.get_base_model() if hasattr(model, "get_base_model") else model, []
    for path in LAYERS:
        try:
            found.append(operator.attrgetter(path)(model))
        except AttributeError:
            continue
    (layers,) = found
    return layers


def attention_of(layer):
    (attention,) = [getattr(layer, name) for name in ATTENTION if hasattr(layer, name)]
    return attention


def mlp_of(layer):
    """Where tokens enter and leave the feed-forward part."""
    if hasattr(layer, "fc1"):  # OPT
        return layer.fc1, layer.fc2
    (mlp,) = [getattr(layer, name) for name in MLP if hasattr(layer, name)]
    return mlp, mlp


def kept_tokens(length, sparsity, reserved):
    """method.md, section 2: T minus the rounded s T, ties to even, never below the reserved."""
    return max(min(reserved, length), length - round(sparsity * length))


def reads(router, name):
    return getattr(router.needs.reads, "__name__", None) == name


def given_to(layer, args, kwargs):
    """The arguments of a layer's call, by name."""
    names = [name for name in inspect.signature(type(layer).forward).parameters if name != "self"]
    return dict(zip(names, args)) | kwargs


@torch.no_grad()
def stock_visibility(model, ids):
    """For every layer a (T, T) bool: which keys each query of one text sees in the stock model, read from the mask that
    its forward gives to the layer. No mask is what SDPA is given where all earlier keys are seen."""
    assert model.config.get_text_config()._attn_implementation in ("eager", "sdpa")
    layers, causal, seen = layers_of(model), torch.ones(len(ids), len(ids)).tril().bool(), []

    def read(layer, args, kwargs):
        mask = given_to(layer, args, kwargs)["attention_mask"]
        if mask is not None:  # (1, 1, T, T): bool, or added to the scores
            assert mask.shape == (1, 1, len(ids), len(ids))
            mask = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        seen.append(causal if mask is None else mask.clone())

    handles = [layer.register_forward_pre_hook(read, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(layers)
    return seen


def rotate(x, cos, sin):
    """Rotary embedding. x (H, T, D), cos and sin (T, D)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def llama_block(layer, config, x, cos, sin, visible):
    """One decoder layer on x (T, D) under a (T, T) bool mask. Returns its output and the attention probabilities (H, T,
    T)."""
    attention, heads, groups = layer.self_attn, config.num_attention_heads, config.num_key_value_heads
    tokens = len(x)
    h = layer.input_layernorm(x)
    q = (h @ attention.q_proj.weight.T).view(tokens, heads, -1).transpose(0, 1)
    k = (h @ attention.k_proj.weight.T).view(tokens, groups, -1).transpose(0, 1)
    v = (h @ attention.v_proj.weight.T).view(tokens, groups, -1).transpose(0, 1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = (t.repeat_interleave(heads // groups, 0) for t in (k, v))
    logits = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    p = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    out = (p @ v).transpose(0, 1).reshape(tokens, -1) @ attention.o_proj.weight.T
    x = x + out
    h = layer.post_attention_layernorm(x)
    mlp = layer.mlp
    return x + (
        torch.nn.functional.silu(h @ mlp.gate_proj.weight.T) * (h @ mlp.up_proj.weight.T)
    ) @ mlp.down_proj.weight.T, p


def update(compensation, x, block, part="block"):
    """What a token that skips is given, by the book: W x + b with the whole matrix W. x (T, D) or (1, T, D)."""
    if compensation is None or part not in compensation.parts:  # a part that was not fitted is one that nobody skips
        return torch.zeros_like(x)
    tensors = {name: t[block].to(x.dtype) for name, t in compensation.tensors.items()}
    if not compensation.rank:
        return torch.zeros_like(x) + tensors[f"{part}.bias"]
    whole = tensors[f"{part}.up"] @ tensors[f"{part}.down"]
    return x @ whole.T + tensors[f"{part}.bias"]


def scores(p, visible, queries):
    """a_j by the book, with loops: p (H, T, T), visible (T, T), queries = the list Q. nan where no query of Q sees
    j."""
    tokens = p.shape[-1]
    result = torch.full((tokens,), torch.nan, dtype=torch.float64)
    mean, sees = p.double().mean(0).tolist(), visible.tolist()
    for j in range(tokens):
        seeing = [i for i in queries if sees[i][j]]
        if seeing:
            result[j] = sum(mean[i][j] * sum(sees[i]) for i in seeing) / len(seeing)
    return result


def sums(p, visible, queries):
    """The attention that every key receives in all, by the book; nan where no query sees it."""
    mean, sees = p.double().mean(0).tolist(), visible.tolist()
    seen = [any(sees[i][j] for i in queries) for j in range(len(mean))]
    total = [sum(mean[i][j] for i in queries if sees[i][j]) for j in range(len(mean))]
    return torch.tensor([t if s else torch.nan for t, s in zip(total, seen)], dtype=torch.float64)


def page_rank(p, visible, queries, keys, iterations=5, damping=0.85):
    """Weighted page rank over that of uniform attention, with whole matrices; nan for tokens that are no keys."""
    tokens = p.shape[-1]
    votes = torch.zeros(tokens, tokens, dtype=torch.float64)
    even = votes.clone()
    for i in queries:
        votes[i] = p[:, i].double().mean(0) * visible[i]
        even[i] = visible[i].double() / visible[i].sum()
    base = keys.double() / keys.sum()

    def rank(matrix):
        s = base
        for _ in range(iterations):
            s = (1 - damping) * base + damping * matrix.T @ s
        return s

    return torch.where(keys, rank(votes) / rank(even), torch.nan)


def looked(model, pruner, ids):
    """What the router's scout says of the tokens of one prompt, from the stock model."""
    scout, tokens = pruner.router.needs.scout, len(ids)
    if scout is None:
        return None
    if scout.kind == "surprisal":
        p = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        return torch.tensor([[torch.inf, *(-float(p[j - 1, ids[j]]) for j in range(1, tokens))]])
    x = model.model.embed_tokens.weight[ids]
    cos, sin = (t[0] for t in model.model.rotary_emb(x, torch.arange(tokens)[None]))
    causal = torch.ones(tokens, tokens).tril().bool()
    for layer in model.model.layers[: scout.blocks]:
        x, p = llama_block(layer, model.config, x, cos, sin, causal)
    if reads(pruner.router, "last_logits"):  # but for a number that is the same for all keys
        return p[:, -1].double().log().mean(0)[None].float()
    queries = range(tokens)[-pruner.window :] if pruner.attention == "window" else range(tokens)
    said = scores(p, causal, list(queries))
    return torch.where(said.isnan(), torch.ones_like(said), said)[None].float()


def choose(pruner, context, kept, tokens):
    reserved = {0, tokens - 1}
    if pruner.choice == "threshold":
        p = pruner.router.probability(context)[0]
        return torch.tensor([i in reserved or bool(p[i] > pruner.threshold) for i in range(tokens)])
    s = pruner.router.score(context)[0]
    order = sorted(range(tokens), key=lambda i: (i not in reserved, -float(s[i]), i))
    keep = torch.zeros(tokens, dtype=torch.bool)
    keep[order[:kept]] = True
    return keep


@torch.no_grad()
def run_row(model, pruner, ids, prompt_tokens, keep=None):
    """Logits (T, V) and keep [N x (P,)] of one row without padding: the first `prompt_tokens` are routed, the rest is
    dense.

    `keep` replays decisions instead of taking them.
    """
    config, tokens, prompt = model.config, len(ids), prompt_tokens
    x = model.model.embed_tokens.weight[ids]
    cos, sin = (t[0] for t in model.model.rotary_emb(x, torch.arange(tokens)[None]))
    causal = torch.ones(tokens, tokens).tril().bool()
    router, entered, memo = pruner.router, None, {}
    table = torch.zeros(1, prompt) if router.needs.adds_up else torch.ones(1, prompt)
    scouted, decided = looked(model, pruner, ids[:prompt]), []
    for index, layer in enumerate(model.model.layers):
        if pruner.removed_parts(index):  # whole blocks only
            decided.append(torch.zeros(prompt, dtype=torch.bool))
            continue
        s = 0.0 if pruner.schedule is None else pruner.schedule.sparsity[index]
        keep_P = torch.ones(prompt, dtype=torch.bool)
        if keep is not None:
            keep_P = keep[index][:prompt]
        elif s > 0:
            kept = kept_tokens(prompt, s, min(2, prompt))
            real = torch.ones(1, prompt, dtype=torch.bool)
            context = RoutingContext(
                index,
                s,
                real,
                torch.arange(prompt)[None],
                torch.tensor([[prompt]]),
                torch.tensor([[kept]]),
                table,
                x[None, :prompt],
                memo=memo,
                entered=entered,
                scouted=scouted,
            )
            keep_P = choose(pruner, context, kept, prompt)
            entered = keep_P[None]
        decided.append(keep_P)
        computed = torch.cat([keep_P, torch.ones(tokens - prompt, dtype=torch.bool)])
        visible = causal & computed[None, :] if pruner.kv[index] == "evict" else causal
        visible = visible | torch.eye(
            tokens, dtype=torch.bool
        )  # a skipped row must see something; its output is thrown away
        out, p = llama_block(layer, config, x, cos, sin, visible)
        queries = [i for i in range(prompt) if computed[i]]
        is_key = computed[:prompt] if pruner.kv[index] == "evict" else torch.ones(prompt, dtype=torch.bool)
        seen = p[:, :prompt, :prompt], visible[:prompt, :prompt]
        if reads(router, "attention_sums"):
            new = sums(*seen, queries)
        elif reads(router, "attention_rank"):
            new = page_rank(*seen, queries, is_key)
        else:
            new = scores(*seen, queries[-pruner.window :] if pruner.attention == "window" else queries)
        new = table[0] + new.float() if router.needs.adds_up else new.float()
        table = torch.where(is_key & ~new.isnan(), new, table[0])[None]
        x = torch.where(computed[:, None], out, x + update(pruner.compensation, x, index))
    return model.model.norm(x) @ model.lm_head.weight.T, decided


@torch.no_grad()
def masked_dense(model, keep_attention, keep_mlp, kv, ids, compensation=None):
    """Logits (T, V) of one text, every family: all tokens run through every block under a T x T mask, and what a token
    skipped is thrown away afterwards. No cache, no padding, no gathering, nothing of the engine. Which keys are near
    enough to be seen the stock model says (`stock_visibility`).

    keep_attention, keep_mlp: N x (T,) bool; kv: N modes. Under `evict` keys of tokens that skip attention are hidden.
    compensation: what skipped tokens get, by the parts it was fitted for; None for nothing.
    """
    blocks, stock = layers_of(model), stock_visibility(model, ids)
    tokens, undo = len(ids), []
    for index, (block, attends, computes, mode) in enumerate(zip(blocks, keep_attention, keep_mlp, kv)):
        near, attended = stock[index].tolist(), attends.tolist()
        visible = torch.tensor(
            [
                [j <= i and near[i][j] and (mode == "keep" or attended[j] or i == j) for j in range(tokens)]
                for i in range(tokens)
            ]
        )
        undo.append(_mask_block(block, index, visible, attends, computes, compensation))
    try:
        return model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        for put_back in undo:
            put_back()


def _mask_block(block, index, visible, attends, computes, compensation):
    """Wrap a block so that it sees this mask and drops what was skipped; returns what undoes it."""
    attention = attention_of(block)
    enter, leave = mlp_of(block)
    by_parts = compensation is not None and "block" not in compensation.parts
    entered = {}

    def instead(part):
        return update(compensation if by_parts else None, entered[part], index, part)

    def see(part):
        return lambda m, a, k: entered.update({part: a[0] if a else k["hidden_states"]})

    def leave_block(m, a, k, out):
        if by_parts:
            return out
        x = a[0] if a else k["hidden_states"]
        skipped = x + update(compensation, x, index)
        return torch.where((attends | computes)[None, :, None], out, skipped)

    handles = [
        block.register_forward_pre_hook(lambda m, a, k: _with_mask(m, a, k, visible), with_kwargs=True),
        attention.register_forward_pre_hook(see("attention"), with_kwargs=True),
        attention.register_forward_hook(
            lambda m, a, out: (torch.where(attends[None, :, None], out[0], instead("attention")), out[1])
        ),
        enter.register_forward_pre_hook(see("mlp"), with_kwargs=True),
        leave.register_forward_hook(
            lambda m, a, out: torch.where(computes.view(*out.shape[:-1], 1), out, instead("mlp"))  # (T, D), (1, T, D)
        ),
        block.register_forward_hook(leave_block, with_kwargs=True),
    ]
    return lambda: [handle.remove() for handle in handles]


def _with_mask(block, args, kwargs, visible):
    given = given_to(block, args, kwargs)
    mask = visible[None, None]
    if attention_of(block).config._attn_implementation == "eager":
        dtype = given["hidden_states"].dtype
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    given["attention_mask"] = mask
    return (), given


def rank_of(values, mine):
    """Ascending rank of values[mine] over n - 1; neighbours (in order) within 1e-6 share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda j: values[j])
    group = [order.index(mine)]
    while group[0] > 0 and values[order[group[0]]] - values[order[group[0] - 1]] <= 1e-6:
        group.insert(0, group[0] - 1)
    while group[-1] < len(order) - 1 and values[order[group[-1] + 1]] - values[order[group[-1]]] <= 1e-6:
        group.append(group[-1] + 1)
    return sum(group) / len(group) / max(len(values) - 1, 1)


@torch.no_grad()
def follow_row(model, pruner, ids, prompt_tokens, keep):
    """The decode policies by the book, one continuation token after the other, each time from the whole text.

    keep: N x (T,) decisions to go on with (those of the prompt, and of the continuation once it has been decided).
    What is decided here is returned beside them: logits (T - P, V), and two tables [block][continuation token]:
    p_compute (None where the block is not routed) and whether the token is computed.
    """
    config, tokens, prompt = model.config, len(ids), prompt_tokens
    blocks, router = model.model.layers, pruner.router
    sparsity = pruner.schedule.sparsity
    cos, sin = (t[0] for t in model.model.rotary_emb(model.model.embed_tokens.weight[ids], torch.arange(tokens)[None]))
    written = [{} for _ in blocks]  # written[block][j]: what block wrote last about token j
    logits, probability, computes = [], [[] for _ in blocks], [[] for _ in blocks]
    for i in range(prompt - 1, tokens):  # the first round is the prompt itself: it only writes scores
        n = i + 1
        x, memo = model.model.embed_tokens.weight[ids[:n]], {}
        table = [1.0] * n
        for block, layer in enumerate(blocks):
            s = sparsity[block]
            if i >= prompt:
                decided, p_compute = True, None
                if s > 0 and pruner.decode != "dense":
                    p_compute = _p_of_last(router, pruner, block, n, table, x, memo)
                    decided = not _skips(pruner, s, p_compute, keep[block][prompt:i])
                probability[block].append(p_compute)
                computes[block].append(decided)
            computed = keep[block][:n]
            visible = torch.ones(n, n).tril().bool()
            is_key = computed if pruner.kv[block] == "evict" else torch.ones(n, dtype=torch.bool)
            visible = visible & is_key[None, :] | torch.eye(n, dtype=torch.bool)
            out, p = llama_block(layer, config, x, cos[:n], sin[:n], visible)
            if i < prompt:
                queries = [q for q in range(prompt) if computed[q]]
                queries = queries[-pruner.window :] if pruner.attention == "window" else queries
                new = scores(p, visible, queries)
                written[block] = {j: float(new[j]) for j in range(n) if is_key[j] and not new[j].isnan()}
            elif computed[i]:
                mean, seen = p[:, i].double().mean(0).tolist(), visible[i].tolist()
                written[block] |= {j: mean[j] * sum(seen) for j in range(n) if seen[j]}
            if block == 0 or router.needs.once != "from block 0":
                table = [written[block].get(j, table[j]) for j in range(n)]
            x = torch.where(computed[:, None], out, x + update(pruner.compensation, x, block))
        if i >= prompt:
            logits.append((model.model.norm(x) @ model.lm_head.weight.T)[-1])
    return torch.stack(logits), probability, computes


def _p_of_last(router, pruner, block, n, table, x, memo):
    """p_compute of the last of n tokens, at this block."""
    s = pruner.schedule.sparsity[block]
    context = RoutingContext(
        block,
        s,
        torch.ones(1, 1, dtype=torch.bool),
        torch.tensor([[n - 1]]),
        torch.tensor([[n]]),
        torch.tensor([[kept_tokens(n, s, min(2, n))]]),
        torch.tensor([[table[-1]]]),
        x[None, -1:],
        rank=torch.tensor([[rank_of(table, n - 1)]]),
        schedule=pruner.schedule.sparsity,
        memo=memo,
    )
    return float(router.probability(context))


def _skips(pruner, s, p_compute, before):
    if pruner.decode == "threshold":
        return p_compute < pruner.threshold
    return p_compute < 0.5 and sum(not k for k in before) + 1 <= s * (len(before) + 1)
