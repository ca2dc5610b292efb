"""Log-likelihood of choices after their contexts, many at once and equal to one by one.

Lengths always come from the requests, never from token ids: id 0 is a real token in many vocabularies. G contexts of a
batch, R (context, choice) pairs, L tokens of the longest choice, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ftp_lightning.losses import nll_per_token
from ftp_lightning.pruning.devices import home
from ftp_lightning.pruning.family import cache_argument

Tokens = Sequence[int]


@dataclass(frozen=True)
class Score:
    """Sum of log-probabilities of the tokens, and whether each of them is the most probable one; `skipped`: the share
    of (token, block) pairs that the decode policy skipped of what was fed, None where that was not watched."""

    logprob: float
    greedy: bool
    skipped: float | None = None


@torch.no_grad()
def score_after_prompt(
    model,
    contexts: Sequence[Tokens],
    choices: Sequence[Sequence[Tokens]],
    batch_size: int,
    watch: Callable[[], list[float]] | None = None,
) -> list[list[Score]]:
    """Score the choices of each context through the cache of its prefill, causally (mode "prompt") [ours].

    Every context is prefilled once, left padded, and routed where a pruner is attached; its choices are scored from
    copies of its cache rows, `batch_size` pairs per forward. choices[g] belongs to contexts[g]; nothing may be empty.
    `watch` is called after every forward of continuations and gives the share that each row skipped. Returns one list
    of scores per context, in order.
    """
    context_ids, context_mask = pad_rows(contexts, "left", home(model))
    prefill = model(
        input_ids=context_ids,
        attention_mask=context_mask,
        position_ids=(context_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    pairs = [(owner, tokens) for owner, group in enumerate(choices) for tokens in group]
    scores: list[list[Score]] = [[] for _ in contexts]
    for start in range(0, len(pairs), batch_size):
        owners, tokens = zip(*pairs[start : start + batch_size], strict=True)
        logits = _choice_logits(model, prefill, context_mask, torch.tensor(owners, device=home(model)), tokens)
        skipped = _skipped(tokens, watch)
        for owner, score, share in zip(owners, _scores(logits, tokens), skipped, strict=True):
            scores[owner].append(replace(score, skipped=share))
    return scores


def _skipped(tokens: Sequence[Tokens], watch: Callable[[], list[float]] | None) -> list[float | None]:
    """Of each continuation; one token is never fed, and so skips nothing."""
    if watch is None:
        return [None] * len(tokens)
    shares = watch() if max(map(len, tokens)) > 1 else [0.0] * len(tokens)
    return [share if len(row) > 1 else 0.0 for row, share in zip(tokens, shares, strict=True)]


@torch.no_grad()
def score_in_sequence(model, contexts: Sequence[Tokens], continuations: Sequence[Tokens]) -> list[Score]:
    """Score continuations with context and continuation routed together in one pass (mode "sequence") [paper].

    Texts are right padded with an attention mask, so that a router sees real tokens only. As in lm-eval the last token
    is not fed. Returns one score per pair.
    """
    texts = [[*context, *tokens][:-1] for context, tokens in zip(contexts, continuations, strict=True)]
    ids, mask = pad_rows(texts, "right", home(model))
    first = min(len(context) for context in contexts) - 1  # no earlier position is read
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
    longest = max(map(len, continuations))
    rows = [
        torch.nn.functional.pad(row[start : start + len(tokens)], (0, 0, 0, longest - len(tokens)))
        for row, start, tokens in zip(logits, (len(c) - 1 - first for c in contexts), continuations, strict=True)
    ]
    return _scores(torch.stack(rows), continuations)


def even_batches(contexts: Sequence[Tokens], size: int) -> Iterator[list[Tokens]]:
    """Contexts in their order, at most `size` in a batch, and where that is half full, of one length only [ours].

    Rows of one length need no padding, and without a mask attention takes its fast causal kernel. Contexts should come
    sorted by length.
    """
    batch: list[Tokens] = []
    for context in contexts:
        changes = batch and len(context) != len(batch[-1])
        if len(batch) == size or (changes and 2 * len(batch) >= size):
            yield batch
            batch = []
        batch.append(context)
    if batch:
        yield batch


def rolling_windows(
    tokens: Sequence[int], prefix: int, prompt_tokens: int, continuation_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """Cut a text into (prompt, continuation) windows that score every token exactly once [ours].

    Window k scores tokens [C k, C (k + 1)) after the up to P tokens before them. The prefix token stands before the
    text, so that with P above the text's length the windows together give the plain likelihood of the text. It is not
    scored itself, even where the tokenizer puts it there (lm-eval then scores it, after itself).
    """
    text = [prefix, *(tokens[1:] if list(tokens[:1]) == [prefix] else tokens)]
    starts = range(1, len(text), continuation_tokens)
    return [
        (text[max(0, start - prompt_tokens) : start], text[start : start + continuation_tokens]) for start in starts
    ]


def _choice_logits(model, prefill, context_mask: Tensor, owners: Tensor, tokens: Sequence[Tokens]) -> Tensor:
    """(R, L, V): the prompt's last logit, then those of the choice but its last token, right padded."""
    first = prefill.logits[owners, -1:]
    fed, fed_mask = pad_rows([choice[:-1] for choice in tokens], "right", owners.device)
    if fed.shape[1] == 0:
        return first
    lengths = context_mask[owners].sum(1, keepdim=True)
    rest = model(
        input_ids=fed,
        attention_mask=torch.cat([context_mask[owners], fed_mask], dim=1),
        position_ids=lengths + torch.arange(fed.shape[1], device=owners.device),
        **{cache_argument(model): _cache_rows(prefill.past_key_values, owners)},
        use_cache=True,
    ).logits
    return torch.cat([first, rest], dim=1)


def _cache_rows(cache, rows: Tensor):
    """A cache of its own that holds the given rows; the original stays as it was prefilled."""
    cache = copy.deepcopy(cache)
    cache.batch_select_indices(rows)
    return cache


def _scores(logits: Tensor, tokens: Sequence[Tokens]) -> list[Score]:
    """Scores of right-padded logits (R, L, V), summed in float64; padding counts nowhere."""
    targets, mask = pad_rows(tokens, "right", logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = nll_per_token(logits, targets).double()
    logprobs = -nll.masked_fill(mask == 0, 0.0).sum(1)
    greedy = ((logits.argmax(-1) == targets) | (mask == 0)).all(1)
    return [Score(*pair) for pair in zip(logprobs.tolist(), greedy.tolist(), strict=True)]


def pad_rows(rows: Sequence[Tokens], side: str, device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (1 = real token), both int64 (rows, longest row)."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for tokens, ids_row, mask_row in zip(rows, ids, mask, strict=True):
        place = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
        ids_row[place] = torch.tensor(tokens, dtype=torch.long)
        mask_row[place] = 1
    return ids.to(device), mask.to(device)
