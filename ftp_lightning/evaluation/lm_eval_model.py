"""The lm-eval model `ftp`: a Hugging Face model with a pruner attached, scored the way it is deployed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ftp_lightning import models
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import MODES
from ftp_lightning.evaluation.scoring import (
    Score,
    even_batches,
    rolling_windows,
    score_after_prompt,
    score_in_sequence,
)
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.pruned_folder import check_base, read_settings

REMEDY = "Give a Hub name (or run `ftp-lightning prefetch` where there is a network), a folder, or embedded."
# lm-eval's: the texts (None: nothing to cache), the context's tokens, the continuation's tokens
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass(frozen=True)
class Account:
    """What a score stands on [ours: method, section 8].

    `sparsity`: realised mean over blocks on the routed text. `exercised`: at least half the budget; otherwise the
    request (too short to be pruned) measured the dense model. `truncated`: tokens cut from the left to fit the model.
    """

    request: tuple[str, str] | None
    prompt_tokens: int
    continuation_tokens: int
    sparsity: float
    exercised: bool
    truncated: int


class FtpLM(HFLM):
    """lm-eval's HFLM with a TokenPruner; registered as `ftp` by `import ftp_lightning.evaluation`.

    pretrained: Hub name, folder, `random:SHAPE`, "embedded", or a model object (then give `tokenizer`); by default the
    base model that `pruned` names, else the embedded one.
    pruned: folder of a saved pruner, or pruner: the object; neither is the dense model. decode: the policy of
    continuation tokens, by default the pruner's own. mode "prompt" prefills and routes each distinct context once and
    scores its choices through the cache, causally; "sequence" [paper] routes context and choice together. Rolling
    requests are cut into `prompt_tokens` + `continuation_tokens` (mode "prompt"). `accounts` grows by one entry per
    scored request, in order. Deviation from HFLM: log-probabilities are never summed in less than float32, and texts
    are padded with a mask.
    """

    def __init__(
        self,
        pretrained=None,
        pruned: str | Path | None = None,
        pruner=None,
        mode: str = "prompt",
        decode: str | None = None,
        prompt_tokens: int = 192,
        continuation_tokens: int = 64,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        tokenizer=None,
        **kwargs,
    ):
        if mode not in MODES:
            raise UserError(f"mode is {mode!r}, must be one of {', '.join(MODES)}\nIt is a key of model_args.")
        self.mode, self.prompt_tokens, self.continuation_tokens = mode, int(prompt_tokens), int(continuation_tokens)
        self.pruner = _pruner(pruned, pruner, decode)
        self.accounts: list[Account] = []
        device = str(models.resolve_device(device or "auto"))
        pretrained = _base_name(pruned) if pretrained is None else pretrained
        if isinstance(pretrained, str | Path):
            pretrained, tokenizer = _source(str(pretrained), device, dtype, tokenizer)
        try:
            super().__init__(pretrained=pretrained, device=device, dtype=dtype, tokenizer=tokenizer, **kwargs)
        except OSError as error:  # the Hub out of reach included
            raise UserError(
                f"the model {pretrained} cannot be loaded: {str(error).splitlines()[0]}\n{REMEDY}"
            ) from error
        if pruned is not None:
            check_base(read_settings(pruned), self.model)
        if self.pruner is not None:
            self.pruner.attach(self.model)

    def close(self) -> None:
        """Take the pruner off the model again."""
        if self.pruner is not None:
            self.pruner.detach()

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, every token scored once.

        Mode "prompt": chunk k covers tokens [C k, C (k + 1)), its prompt is the up to P tokens before it, see
        `rolling_windows`. Mode "sequence": HFLM's disjoint windows of the model's length, each routed in one pass.
        """
        if self.mode == "sequence":
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        texts = [request.args[0] for request in requests]
        chunk = min(self.continuation_tokens, self.max_length)
        windows, owners = [], []
        for owner, text in enumerate(texts):
            cut = rolling_windows(self.tok_encode(text), self.prefix_token_id, self.prompt_tokens, chunk)
            windows += [(None, context, continuation) for context, continuation in cut]
            owners += [owner] * len(cut)
        totals = [0.0] * len(texts)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of each request, in the order of the requests."""
        items = [_Item(*request, limit=self.max_length) for request in requests]
        size = override_bs or self._batch_rows(requests)
        run = self._prompt_batches if self.mode == "prompt" else self._sequence_batches
        answers: dict[int, tuple[Score, float]] = {}
        bar = tqdm(total=len(items), disable=disable_tqdm or self.rank != 0, desc="Scoring continuations")
        with bar, self._precision():
            for scored in run(items, size):
                answers |= scored
                bar.update(len(scored))
        return [self._record(item, *answers[i]) for i, item in enumerate(items)]

    def _prompt_batches(self, items: list[_Item], size: int) -> Iterator[dict[int, tuple[Score, float]]]:
        """Batches of distinct contexts, of one length where possible; (score, realised sparsity) by item."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(item.context, []).append(i)
        order = sorted(groups, key=lambda context: (-len(context), context))
        for batch in even_batches(order, size):
            choices = [[items[i].continuation for i in groups[context]] for context in batch]
            scores = score_after_prompt(self.model, batch, choices, size)
            answers = {}
            for context, group, sparsity in zip(batch, scores, self._realised(len(batch)), strict=True):
                answers |= {i: (score, sparsity) for i, score in zip(groups[context], group, strict=True)}
            yield answers

    def _sequence_batches(self, items: list[_Item], size: int) -> Iterator[dict[int, tuple[Score, float]]]:
        """Batches of whole texts, longest first."""
        order = sorted(range(len(items)), key=lambda i: -items[i].length)
        for batch in _chunks(order, size):
            contexts, continuations = [items[i].context for i in batch], [items[i].continuation for i in batch]
            scores = score_in_sequence(self.model, contexts, continuations)
            yield dict(zip(batch, zip(scores, self._realised(len(batch)), strict=True), strict=True))

    def _realised(self, rows: int) -> list[float]:
        """Sparsity of each row of the prompt just routed."""
        return [0.0] * rows if self.pruner is None else self.pruner.trace.prompt.row_sparsity.tolist()

    def _record(self, item: _Item, score: Score, sparsity: float) -> tuple[float, bool]:
        schedule = None if self.pruner is None else self.pruner.schedule  # a FixedRouter goes without
        exercised = schedule is None or sparsity >= schedule.budget / 2
        sizes = len(item.context), len(item.continuation)
        self.accounts.append(Account(item.request, *sizes, sparsity, exercised, item.truncated))
        answer = (score.logprob, score.greedy)
        if item.request is not None:
            self.cache_hook.add_partial("loglikelihood", item.request, answer)
        return answer

    def _batch_rows(self, requests: Sequence[Request]) -> int:
        if self.batch_size != "auto" or not requests:
            return 1 if self.batch_size == "auto" else self.batch_size
        longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
        return self._detect_batch_size([longest], 0)

    def _precision(self):
        if self.mixed_precision_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.mixed_precision_dtype)


class _Item:
    """A request cut to the model's length from the left, as lm-eval does: the last `limit` + 1 tokens of both."""

    def __init__(
        self, request: tuple[str, str] | None, context: Iterable[int], continuation: Iterable[int], limit: int
    ):
        context, self.request, self.continuation = tuple(context), request, tuple(continuation)
        if not context or not 1 <= len(self.continuation) <= limit:
            raise UserError(
                f"a continuation has {len(self.continuation)} tokens after a context of {len(context)}, the model takes"
                f" {limit}\nrequest: {str(request)[:80]}"
            )
        self.context = context[max(0, len(context) + len(self.continuation) - limit - 1) :]
        self.truncated = len(context) - len(self.context)
        self.length = len(self.context) + len(self.continuation)


def _chunks(order: list, size: int) -> Iterator[list]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _pruner(folder: str | Path | None, pruner, decode: str | None):
    """The pruner given, or loaded; under the decode policy asked for."""
    if folder is not None and pruner is not None:
        raise UserError("both `pruned` and `pruner` are given\nGive the folder or the object, not both.")
    if folder is not None:
        pruner = TokenPruner.load(folder)
    if pruner is None or decode in (None, pruner.decode):
        return pruner
    return pruner.changed(decode=decode)


def _base_name(pruned: str | Path | None) -> str:
    """The model a pruner folder was made for; the embedded one where it names none."""
    return (read_settings(pruned).get("base") if pruned is not None else None) or "embedded"


def _source(name: str, device: str, dtype: str | torch.dtype, tokenizer) -> tuple[object, object]:
    """What HFLM takes for a name and its tokenizer: names and folders it loads itself, random shapes are made here."""
    if name.startswith("random:"):
        dtype = "float32" if dtype == "auto" else str(dtype).removeprefix("torch.")
        return models.load_model(name, dtype=dtype, device=device), tokenizer or models.load_tokenizer(name)
    if name == "embedded":
        return str(models.EMBEDDED), tokenizer
    # A relative folder reads like a Hub name, and lm-eval would ask the Hub for its commit.
    return str(Path(name).resolve()) if Path(name).is_dir() else name, tokenizer
