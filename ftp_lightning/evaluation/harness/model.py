"""The lm-eval model `ftp`: a Hugging Face model with a pruner attached, scored the way it is deployed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ftp_lightning import models
from ftp_lightning.data.template import checked, limited
from ftp_lightning.disk.pruned_folder import check_base, read_settings
from ftp_lightning.errors import UserError, hub_errors
from ftp_lightning.evaluation.continuation import MODES
from ftp_lightning.evaluation.harness.accounts import Account, Answer, realised_rows
from ftp_lightning.evaluation.harness.answers import AnswerBook, asked_identity
from ftp_lightning.evaluation.harness.generation import generate, job_batches, jobs_of
from ftp_lightning.evaluation.harness.ranks import Ranked
from ftp_lightning.evaluation.harness.requests import Item, context_batches, text_batches
from ftp_lightning.evaluation.harness.seen import warn_of_seen
from ftp_lightning.evaluation.scoring import rolling_windows, score_after_prompt, score_in_sequence
from ftp_lightning.pruning import TokenPruner

REMEDY = "Give a Hub name (or run `ftp-lightning prefetch` where there is a network), a folder, or embedded."
# lm-eval's: the texts (None: nothing to cache), the context's tokens, the continuation's tokens
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class FtpLM(Ranked, HFLM):
    """lm-eval's HFLM with a TokenPruner; registered as `ftp` by `import ftp_lightning.evaluation`.

    pretrained: Hub name, folder, `random:SHAPE`, "embedded", or a model object (then give `tokenizer`); by default the
    base model that `pruned` names, else the embedded one.
    pruned: folder of a saved pruner, or pruner: the object; neither is the dense model. decode: the policy of
    continuation tokens, threshold: where it cuts; by default the pruner's own. answers: a folder to keep answers in and
    to take them from, see `AnswerBook`. In a chat template the attention window is widened by the tokens that follow
    the question, see `apply_chat_template`. mode "prompt" prefills and routes each distinct context once and
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
        threshold: float | None = None,
        answers: str | Path | None = None,
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
        self.pruner = _pruner(pruned, pruner, decode, threshold)
        self.accounts: list[Account] = []
        self._told: set[str] = set()
        device = str(models.resolve_device(device or "auto"))
        pretrained = _base_name(pruned) if pretrained is None else pretrained
        if isinstance(pretrained, str | Path):
            pretrained, tokenizer = _source(str(pretrained), device, dtype, tokenizer)
        try:
            super().__init__(pretrained=pretrained, device=device, dtype=dtype, tokenizer=tokenizer, **kwargs)
        except hub_errors(OSError) as error:
            raise UserError(
                f"the model {pretrained} cannot be loaded: {str(error).splitlines()[0]}\n{REMEDY}"
            ) from error
        if pruned is not None:
            check_base(read_settings(pruned), self.model)
        self._join()
        self.window = None if self.pruner is None else self.pruner.window
        self._folder = answers
        self._open_book()
        if self.pruner is not None:
            self.pruner.attach(self.model)

    def _open_book(self) -> None:
        """Answers of this model under this very pruner."""
        about = {"mode": self.mode, "autocast": str(self.mixed_precision_dtype)}
        who = "" if self._folder is None else asked_identity(self.model, self.pruner, **about)
        self.book = AnswerBook(self._folder, who, self.rank)

    def close(self) -> None:
        """Take the pruner off the model again."""
        if self.pruner is not None:
            self.pruner.detach()

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """HFLM's, but that an empty continuation is told of."""
        self._check_seen(requests)
        for request in requests:
            if request.args[1] == "":
                raise UserError(f"an empty continuation cannot be scored\nrequest: {str(request.args)[:80]}")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

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
        items = [Item(*request, limit=self.max_length) for request in requests]
        size = override_bs or self._batch_rows(requests)
        plan = context_batches(items, size) if self.mode == "prompt" else text_batches(items, size)
        answers: dict[int, Answer] = {}
        bar = tqdm(total=len(items), disable=disable_tqdm or self.rank != 0, desc="Scoring continuations")
        with bar, self._precision():
            for batch in plan:
                answers |= (found := self._known(items, batch) or self._scored(items, batch, size))
                bar.update(len(found))
        return [self._record(item, answers[i]) for i, item in enumerate(items)]

    def _known(self, items: list[Item], batch: list[list[int]]) -> dict[int, Answer] | None:
        """The answers in the book, where it has those of the whole batch: an evaluation that goes on computes the very
        batches that are missing, and so ends with the very numbers it would have had."""
        found = {i: self.book.get(items[i].key) for group in batch for i in group}
        known = {i: answer for i, answer in found.items() if answer is not None}
        return known if len(known) == len(found) else None

    def _scored(self, items: list[Item], batch: list[list[int]], size: int) -> dict[int, Answer]:
        """Answers by item; batch: groups of items that share a context (mode "sequence": of one)."""
        contexts = [items[group[0]].context for group in batch]
        choices = [[items[i].continuation for i in group] for group in batch]
        if self.mode == "prompt":
            scores = score_after_prompt(self.model, contexts, choices, size, self._watch())
        else:
            pairs = score_in_sequence(self.model, contexts, [group[0] for group in choices])
            scores = [[score] for score in pairs]
        fed = [[len(items[i].continuation) - 1 if self.mode == "prompt" else 0 for i in group] for group in batch]
        answers = {}
        for group, ours, realised in zip(batch, scores, realised_rows(self.model, self.pruner, fed), strict=True):
            for i, score, spent in zip(group, ours, realised.spent, strict=True):
                answers[i] = Answer((score.logprob, score.greedy), realised.sparsity, score.skipped, spent)
        self.book.add({items[i].key: answer for i, answer in answers.items()})
        return answers

    def _check_seen(self, requests) -> None:
        schedule = None if self.pruner is None else self.pruner.schedule
        if schedule is not None and schedule.seen:
            warn_of_seen(requests, schedule.seen, self._told)

    def _watch(self):
        """What tells which share of a continuation was skipped; a dense model's is not asked for."""
        return None if self.pruner is None else lambda: self.pruner.trace.row_sparsity.tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts that go on from their contexts: routed prompts, then the decode policy. Requests that ask the same get
        one generation, except where it is sampled."""
        self._check_seen(requests)
        jobs, texts = jobs_of(self, requests), [""] * len(requests)
        size = 1
        if requests:
            longest = max(len(job.context) for job in jobs)
            size = self._batch_rows([(None, [0] * longest, [0])])
        bar = tqdm(total=len(jobs), disable=disable_tqdm or self.rank != 0, desc="Generating")
        for batch in job_batches(jobs, size):
            sampled = bool(batch[0].options.get("do_sample"))
            found: list[Any] = [None if sampled else self.book.get(job.key) for job in batch]
            if None in found:
                found = generate(self, batch)
                if not sampled:
                    self.book.add({job.key: answer for job, answer in zip(batch, found, strict=True)})
            for job, answer in zip(batch, found, strict=True):
                self._deliver(job, answer, requests, texts)
            bar.update(len(batch))
        bar.close()
        return texts

    def _deliver(self, job, answer: Answer, requests, texts: list[str]) -> None:
        """The text to each request that asked for it, in lm-eval's cache and with its account."""
        new_tokens = len(self.tok_encode(answer.value, add_special_tokens=False))
        for place in job.places:
            texts[place] = answer.value
            request = tuple(requests[place].args)
            self._account(request, len(job.context), new_tokens, job.truncated, answer)
            self.cache_hook.add_partial("generate_until", request, answer.value)

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """HFLM's, and what the template puts after the last question widens the attention window [ours].

        The window is the prompt's last W queries. A template that ends in a long suffix would fill it with tokens that
        ask nothing; so W grows by the longest suffix seen, and at least W queries of the question's text speak.
        """
        with limited():
            text = checked(super().apply_chat_template(chat_history, add_generation_prompt))
        question = next((str(m["content"]).strip() for m in reversed(chat_history) if m["role"] == "user"), "")
        suffix = text.rpartition(question)[2] if question and question in text else ""
        if chat_history[-1]["role"] == "assistant":  # the answer's first words, which speak as they do without template
            suffix = suffix.removesuffix(str(chat_history[-1]["content"]).strip())
        self._widen(len(self.tok_encode(suffix, add_special_tokens=False)) if suffix else 0)
        return text

    def _widen(self, suffix: int) -> None:
        wanted, score = (self.window or 0) + suffix, None if self.pruner is None else self.pruner.attention_score
        if score is None or not isinstance(score.window, int) or score.window_end or score.window >= wanted:
            return
        self.pruner.detach()
        self.pruner = self.pruner.changed(window=wanted)
        self._open_book()
        self.pruner.attach(self.model)

    def _record(self, item: Item, answer: Answer) -> tuple[float, bool]:
        self._account(item.request, len(item.context), len(item.continuation), item.truncated, answer)
        if item.request is not None:
            self.cache_hook.add_partial("loglikelihood", item.request, answer.value)
        return answer.value

    def _account(self, request, prompt_tokens: int, new_tokens: int, truncated: int, answer: Answer) -> None:
        schedule = None if self.pruner is None else self.pruner.schedule  # a FixedRouter goes without
        exercised = schedule is None or answer.sparsity >= schedule.budget / 2
        what = (request, prompt_tokens, new_tokens, answer.sparsity, exercised, truncated)
        self.accounts.append(Account(*what, answer.skipped, answer.spent))

    def _batch_rows(self, requests: Sequence[Request]) -> int:
        """Contexts or texts per forward; `auto` is what fits this process, which need not be what fits the others."""
        if self.batch_size != "auto" or not requests:
            return 1 if self.batch_size == "auto" else self.batch_size
        longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
        world, self._world_size = self._world_size, 1
        try:
            return self._detect_batch_size([longest], 0)
        finally:
            self._world_size = world

    def _precision(self):
        if self.mixed_precision_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.mixed_precision_dtype)


def _pruner(folder: str | Path | None, pruner, decode: str | None, threshold: float | None):
    """The pruner given, or loaded; under the decode policy asked for."""
    if folder is not None and pruner is not None:
        raise UserError("both `pruned` and `pruner` are given\nGive the folder or the object, not both.")
    if folder is not None:
        pruner = TokenPruner.load(folder)
    asked = {"decode": decode, "threshold": None if threshold is None else float(threshold)}
    changes = {name: value for name, value in asked.items() if value is not None}
    if pruner is None or all(getattr(pruner, name) == value for name, value in changes.items()):
        return pruner
    return pruner.changed(**changes)


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
    name = models.locate(name)
    # A relative folder reads like a Hub name, and lm-eval would ask the Hub for its commit.
    return str(Path(name).resolve()) if Path(name).is_dir() else name, tokenizer
