"""Examples: a prompt that is routed and the response that a loss is taken on, from instruction and chat records."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ftp_lightning.data.records import alpaca_prompt, chat_text, record_text, valid_text
from ftp_lightning.data.sources import MANY_DOCUMENTS, check_split, has_records, read_records, split_documents
from ftp_lightning.data.text import leading_ids
from ftp_lightning.errors import UserError

LEFT_OUT = ("long_prompt", "empty_prompt", "empty_response")
"""Why a record makes no example: a prompt over the limit, one without words, nothing to take a loss on."""


@dataclass(frozen=True)
class Example:
    """One row: what is routed, what follows, and the index of its record among `load_documents(source, split)`."""

    prompt_ids: list[int]
    response_ids: list[int]
    document: int


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of different lengths, and what became of the other records: `left_out` by LEFT_OUT, `cut` responses."""

    rows: list[Example]
    left_out: Mapping[str, int] = field(default_factory=dict)
    cut: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor | int]:
        """The rows side by side: prompts padded on the left to the longest P, responses on the right to the longest C.

        `{"input_ids": (B, P + C) int64, "prompt_tokens": P, "attention_mask": (B, P + C) int64}`, the mask only where
        something is padded. A model is to be given `position_ids` that count real tokens: mask.cumsum(1) - 1, at
        least 0.
        """
        chosen = [self.rows[row] for row in rows]
        prompt, response = (max(map(len, s)) for s in zip(*[(row.prompt_ids, row.response_ids) for row in chosen]))
        ids = torch.zeros(len(chosen), prompt + response, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(chosen):
            place = slice(prompt - len(row.prompt_ids), prompt + len(row.response_ids))
            ids[number, place], mask[number, place] = torch.tensor(row.prompt_ids + row.response_ids), 1
        padding = {} if mask.all() else {"attention_mask": mask}
        return {"input_ids": ids, "prompt_tokens": prompt, **padding}

    def subset(self, indices: Iterable[int]) -> "Examples":
        """The rows `indices`, in that order; the counts stay those of the whole."""
        return Examples([self.rows[index] for index in indices], self.left_out, self.cut)

    def sample(self, count: int, seed: int) -> "Examples":
        """`count` rows in a random order, or all where there are fewer; the first n are the same for every count."""
        order = list(range(len(self)))
        random.Random(f"{seed}/examples").shuffle(order)
        return self.subset(order[:count])

    def hash(self) -> str:
        """sha256 (hex) over tokens, where prompts and responses end, and documents."""
        head = repr([(len(row.prompt_ids), len(row.response_ids), row.document) for row in self.rows])
        ids = torch.tensor([token for row in self.rows for token in row.prompt_ids + row.response_ids])
        return hashlib.sha256(head.encode() + ids.to(torch.int64).numpy().tobytes()).hexdigest()

    def counts(self) -> dict[str, int]:
        """`examples`, `cut_response`, and those of LEFT_OUT, to be logged."""
        left_out = {name: self.left_out.get(name, 0) for name in LEFT_OUT}
        return {"examples": len(self), "cut_response": self.cut, **left_out}


@dataclass(frozen=True)
class _Exchange:
    """A record as words: `text` as a document. The prompt or the response is blank where there is none.

    templated: the tokenizer's chat template made both, special tokens included.
    """

    text: str
    prompt: str
    response: str
    templated: bool = False


def load_examples(
    source: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
) -> Examples:
    """The examples of `source`, a JSON(L) file or a Hub data set, that belong to `split`.

    * `{"instruction", "input", "output"}`: the Stanford Alpaca prompt, and the output;
    * `{"messages"}`: all up to and with the last user turn, and what follows it, by the tokenizer's chat template;
      without one `role: content` per message, a blank line between, the prompt ending in the answering `role:`.

    Both hold before `text`, which some data sets give beside them. Where no template says otherwise the prompt begins
    as the tokenizer begins a text, and EOS comes last. The split is that of the record as a document, by the hash of
    its text; duplicates count once.

    Longer prompts than `prompt_tokens` are left out, as are prompts and responses without words; responses are cut at
    `response_tokens`. Raises UserError for text without records, records without a prompt, fewer than 20 records that
    are to be split, and where nothing is left.
    """
    check_split(split)
    if not has_records(source):
        raise UserError(
            f"{source} is plain text, which has no prompts to train on\n"
            "Take --rows windows, or give instruction or chat records: JSON, JSONL or a Hub data set."
        )
    exchanges = _of_split(source, split, read_records(source, partial(_exchange, tokenizer=tokenizer)))
    found = _examples(exchanges, tokenizer, prompt_tokens, response_tokens)
    if not found.rows:
        counted = ", ".join(f"{name} {count}" for name, count in found.left_out.items()) or "it is empty"
        raise UserError(
            f"{source}: the split {split!r} holds no example ({counted})\ngive other records, or longer prompts"
        )
    return found


def _of_split(source: str, split: str, exchanges: Iterable[_Exchange]) -> list[_Exchange]:
    """Those of the split, each text once, in the order of `load_documents`."""
    by_text: dict[str, _Exchange] = {}
    for exchange in exchanges:
        if exchange.text.strip():
            by_text.setdefault(exchange.text, exchange)
    if split != "all" and len(by_text) < MANY_DOCUMENTS:  # as documents each of them would be cut into all splits
        raise UserError(
            f"{source} holds {len(by_text)} different records, {MANY_DOCUMENTS} are needed to tell splits apart\n"
            "give more records, or take --rows windows"
        )
    return [by_text[text] for text in split_documents(list(by_text), split)]


def _examples(
    exchanges: Sequence[_Exchange],
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int | None,
    response_tokens: int | None,
) -> Examples:
    rows: list[Any] = []
    left_out: Counter[str] = Counter()
    cut = 0
    for document, exchange in enumerate(exchanges):
        prompt, response = _tokens(exchange, tokenizer)
        if not exchange.prompt.strip() or not prompt:
            left_out["empty_prompt"] += 1
        elif not exchange.response.strip() or not response:
            left_out["empty_response"] += 1
        elif prompt_tokens is not None and len(prompt) > prompt_tokens:
            left_out["long_prompt"] += 1
        else:
            rows.append(Example(prompt, response[:response_tokens], document))
            cut += len(response) > len(rows[-1].response_ids)
    return Examples(rows, dict(left_out), cut)


def _tokens(exchange: _Exchange, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of prompt and response, each encoded alone, as they are in use; where no template is asked the
    prompt begins as the tokenizer begins a text, and the response ends in EOS."""
    prompt, response = (
        tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in (exchange.prompt, exchange.response)
    )
    if exchange.templated:
        return prompt, response
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return leading_ids(tokenizer) + prompt, response + eos


def _exchange(record: Any, tokenizer: PreTrainedTokenizerBase) -> _Exchange:
    """The words of a record; ValueError where it has no known form or no prompt."""
    text = record_text(record)
    if "messages" in record:
        return _chat(text, record["messages"], tokenizer)
    if "instruction" not in record or "output" not in record:
        raise ValueError("plain 'text' has no prompt: take --rows windows")
    prompt, asked = alpaca_prompt(record), f"{record['instruction']}{record.get('input') or ''}"
    response = record["output"]
    if not isinstance(response, str):
        raise ValueError(f"'output' must be a string, not {type(response).__name__}")
    return _Exchange(text, valid_text(prompt if asked.strip() else ""), valid_text(response))


def _chat(text: str, messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> _Exchange:
    """The words of a chat: up to and with the last user turn, and what follows."""
    whole = chat_text(messages)
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    turns = users[-1] + 1 if users else 0
    if not _has_words(messages[:turns]):
        return _Exchange(text, "", "")
    if not _has_words(messages[turns:]):
        return _Exchange(text, chat_text(messages[:turns]), "")
    if tokenizer.chat_template:
        return _Exchange(text, *_by_template(messages, turns, tokenizer), templated=True)
    prompt = f"{chat_text(messages[:turns])}\n\n{messages[turns]['role']}:"
    return _Exchange(text, valid_text(prompt), valid_text(whole.removeprefix(prompt)))


def _has_words(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(str(message["content"] or "").strip() for message in messages)


def _by_template(
    messages: Sequence[Mapping[str, Any]], turns: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """What the chat template makes of the first `turns` messages as a prompt, and what the whole chat adds to it.

    ValueError where it refuses them, or rewrites the prompt when an answer follows.
    """
    from jinja2 import TemplateError

    try:
        prompt = tokenizer.apply_chat_template(list(messages[:turns]), tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the tokenizer's chat template refuses it ({error})") from None
    if not whole.startswith(prompt):
        raise ValueError("the tokenizer's chat template words the prompt differently once it is answered")
    return valid_text(prompt), valid_text(whole.removeprefix(prompt))
