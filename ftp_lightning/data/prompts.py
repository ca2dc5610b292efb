"""Prompts of their own length: rows from chat, instruction and prompt records, or from plain text."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ftp_lightning.data.records import alpaca_prompt, chat_text, record_text, valid_text
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.data.sources import (
    MANY_DOCUMENTS,
    check_split,
    has_records,
    load_documents,
    read_records,
    split_documents,
)
from ftp_lightning.data.template import rendered
from ftp_lightning.data.text import leading_ids
from ftp_lightning.data.windows import plain_windows
from ftp_lightning.errors import UserError

LEFT_OUT = ("long_prompt", "empty_prompt", "empty_response")
"""Why a record makes no row: a prompt over the limit, one without words, a blank answer."""


@dataclass(frozen=True)
class _Exchange:
    """A record as words: `text` as a document. The prompt or the response is blank where it has no words.

    Attributes:
        response: None where the record has no answer.
        templated: the tokenizer's chat template made both, special tokens included.
        document: what the record says that it comes from.
    """

    text: str
    prompt: str
    response: str | None
    kind: str
    templated: bool = False
    document: str | None = None


class NoPrompt(UserError):
    """A split of a source holds no prompt that can be used."""


def load_prompts(
    source: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int | None = None,
    continuation_tokens: int | None = None,
    answers: bool = True,
) -> Rows:
    """The rows of `source`, a JSON(L) file or a Hub data set, that belong to `split`.

    * `{"messages"}`: all up to and with the last user turn, and what follows it, by the tokenizer's chat template;
      without one `role: content` per message, a blank line between, the prompt ending in the answering `role:`;
    * `{"prompt", "completion"}` or `{"prompt"}`: lists of messages as above; a string is one user turn where the
      tokenizer has a chat template, else the text as it is;
    * `{"instruction", "input", "output"}`: the Stanford Alpaca prompt, and the output if there is one.

    All hold before `text`, which some data sets give beside them. A record without an answer gives a row without a
    continuation. Where no template says otherwise the prompt begins as the tokenizer begins a text, and EOS comes last.
    The split is that of the record as a document, by the hash of its text; duplicates count once. Records that name the
    same `document`, a text of any length, or that have one prompt and different answers, go where the first of them
    goes, and are one document in intervals.

    Longer prompts than `prompt_tokens` are left out and counted, as are prompts and responses without words;
    continuations are cut at `continuation_tokens`. Raises UserError for text without records, records without a prompt,
    fewer than 20 prompts that are to be split, and where nothing is left.

    Without `answers` no record's answer is read, so that none can be blank or broken.
    """
    check_split(split)
    make = partial(_exchange, tokenizer=tokenizer)
    records = read_records(source, make if answers else lambda one: make(_asked(one)))
    found = _rows(_of_split(source, split, records), tokenizer, prompt_tokens, continuation_tokens)
    if not found.rows:
        counted = ", ".join(f"{name} {count}" for name, count in found.left_out.items() if count) or "none has words"
        raise NoPrompt(
            f"{source}: the split {split!r} holds no prompt to use ({counted})\n"
            "Give other records, or more --prompt_tokens."
        )
    return found


def sampled_prompts(
    source: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int,
    continuation_tokens: int,
    count: int | None,
    seed: int,
) -> Rows:
    """`count` rows of `load_prompts` in a random order, or all; of plain text `text_windows`."""
    about = (source, split, tokenizer, prompt_tokens, continuation_tokens)
    return load_prompts(*about).sample(count, seed) if has_records(source) else text_windows(*about, count, seed)


def text_windows(
    source: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int,
    continuation_tokens: int,
    count: int | None,
    seed: int,
) -> Rows:
    """`count` random windows of the text, or all consecutive ones: see `plain_windows`."""
    rng, documents = random.Random(f"{seed}/windows"), load_documents(source, split)
    return plain_windows(tokenizer, documents, prompt_tokens, continuation_tokens, count, rng)


def _of_split(source: str, split: str, exchanges: Iterable[_Exchange]) -> list[tuple[_Exchange, int]]:
    """Those of the split, each text once, in the order of `load_documents`, each with the number of its document."""
    by_text: dict[str, _Exchange] = {}
    for exchange in exchanges:
        if exchange.text.strip():
            by_text.setdefault(exchange.text, exchange)
    first: dict[int, str] = {}  # whose split all records of one document share
    numbers = _documents(list(by_text.values()))
    for number, text in zip(numbers, by_text):
        first.setdefault(number, text)
    if split != "all" and len(first) < MANY_DOCUMENTS:  # as documents each of them would be cut into all splits
        raise UserError(
            f"{source} holds {len(first)} different prompts or documents, {MANY_DOCUMENTS} are needed to tell splits "
            "apart\nGive more records, or take all of them by --split all"
        )
    chosen = set(split_documents(list(first.values()), split))
    return [(one, number) for number, one in zip(numbers, by_text.values()) if first[number] in chosen]


def _documents(exchanges: Sequence[_Exchange]) -> list[int]:
    """The number of each one's document: those that name one document, or have one prompt, share it, also by others
    in between."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not exchanges:
        return []
    names: dict[tuple[str, str], int] = {}
    pairs = [
        (place, len(exchanges) + names.setdefault((kind, name), len(names)))
        for place, one in enumerate(exchanges)
        for kind, name in (("prompt", one.prompt.strip() or one.text), ("document", one.document))
        if name is not None
    ]
    nodes = len(exchanges) + len(names)
    graph = coo_array(([1] * len(pairs), tuple(zip(*pairs, strict=True))), shape=(nodes, nodes))
    return [int(number) for number in connected_components(graph, directed=False)[1][: len(exchanges)]]


def _rows(
    exchanges: Sequence[tuple[_Exchange, int]],
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int | None,
    continuation_tokens: int | None,
) -> Rows:
    rows: list[Row] = []
    left_out: Counter[str] = Counter(dict.fromkeys(LEFT_OUT, 0))
    cut, places = 0, dict[int, int]()
    for place, (exchange, number) in enumerate(exchanges):
        document = places.setdefault(number, place)
        prompt, response = _tokens(exchange, tokenizer)
        if not exchange.prompt.strip() or not prompt:
            left_out["empty_prompt"] += 1
        elif exchange.response is not None and not exchange.response.strip():
            left_out["empty_response"] += 1
        elif prompt_tokens is not None and len(prompt) > prompt_tokens:
            left_out["long_prompt"] += 1
        else:
            rows.append(Row(prompt, response[:continuation_tokens], exchange.kind, document))
            cut += len(response) > len(rows[-1].continuation)
    return Rows(rows, dict(left_out), cut)


def _tokens(exchange: _Exchange, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of prompt and response, each encoded alone, as they are in use; where no template is asked the prompt begins
    as the tokenizer begins a text, and the response ends in EOS."""
    prompt, response = (
        tokenizer.encode(text, add_special_tokens=False, verbose=False)
        for text in (exchange.prompt, exchange.response or "")
    )
    if exchange.templated:
        return prompt, response
    eos = [] if tokenizer.eos_token_id is None or exchange.response is None else [tokenizer.eos_token_id]
    return leading_ids(tokenizer) + prompt, response + eos


def _exchange(record: Any, tokenizer: PreTrainedTokenizerBase) -> _Exchange:
    """The words of a record and its document; ValueError where it has no known form or no prompt."""
    found, document = _words(record, tokenizer), record.get("document")
    if not isinstance(document, str | int | None):
        raise ValueError(f"'document' must be a name, not {type(document).__name__}")
    return found if document is None else replace(found, document=str(document))


def _words(record: Any, tokenizer: PreTrainedTokenizerBase) -> _Exchange:
    text = record_text(record)
    if "messages" in record:
        return _chat(text, record["messages"], tokenizer)
    if "prompt" in record:
        return _prompt(text, record["prompt"], record.get("completion"), tokenizer)
    if "instruction" not in record:
        raise ValueError("plain 'text' has no prompt: take --rows windows")
    prompt, asked = alpaca_prompt(record), f"{record['instruction']}{record.get('input') or ''}"
    response = record.get("output")
    if not isinstance(response, str | None):
        raise ValueError(f"'output' must be a string, not {type(response).__name__}")
    known = None if response is None else valid_text(response)
    return _Exchange(text, valid_text(prompt if asked.strip() else ""), known, "instruction")


def _asked(record: Any) -> Any:
    """The record without its answer: up to and with its last user turn, without completion and output."""
    if not isinstance(record, Mapping):
        return record
    found = {name: value for name, value in record.items() if name not in ("completion", "output")}
    for name in ("messages", "prompt"):
        if isinstance(turns := found.get(name), list):
            found[name] = turns[: _turns_asked(turns) or None]
    return found


def _turns_asked(messages: Sequence[Any]) -> int:
    """How many turns there are up to and with the last one of the user; 0 without any."""
    users = [n for n, turn in enumerate(messages, 1) if isinstance(turn, Mapping) and turn.get("role") == "user"]
    return users[-1] if users else 0


def _prompt(text: str, prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> _Exchange:
    """The words of a prompt and its completion, both strings or both lists of messages."""
    if isinstance(prompt, list) and isinstance(completion, list | None):
        return _chat(text, [*prompt, *(completion or [])], tokenizer)
    for name, value in (("prompt", prompt), ("completion", completion or "")):
        if not isinstance(value, str):
            raise ValueError(f"{name!r} must be a string, as the other is, not {type(value).__name__}")
    valid_text(prompt + (completion or ""))
    if not tokenizer.chat_template or not prompt.strip():
        return _Exchange(text, prompt, completion, "prompt")
    turns = [{"role": "user", "content": prompt}]
    turns += [] if completion is None else [{"role": "assistant", "content": completion}]
    return replace(_chat(text, turns, tokenizer), kind="prompt")


def _chat(text: str, messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> _Exchange:
    """The words of a chat: up to and with the last user turn, and what follows, if anything does."""
    whole = chat_text(messages)
    turns = _turns_asked(messages)
    answered = turns < len(messages)
    if not _has_words(messages[:turns]):
        return _Exchange(text, "", "", "chat")
    if answered and not _has_words(messages[turns:]):
        return _Exchange(text, chat_text(messages[:turns]), "", "chat")
    if tokenizer.chat_template:
        return _Exchange(text, *_by_template(messages, turns, tokenizer), "chat", templated=True)
    role = messages[turns]["role"] if answered else "assistant"
    prompt = f"{chat_text(messages[:turns])}\n\n{role}:"
    return _Exchange(text, valid_text(prompt), valid_text(whole.removeprefix(prompt)) if answered else None, "chat")


def _has_words(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(str(message["content"] or "").strip() for message in messages)


def _by_template(
    messages: Sequence[Mapping[str, Any]], turns: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str | None]:
    """What the chat template makes of the first `turns` messages as a prompt, and what the whole chat adds to it; None
    where it has no more messages.

    ValueError where it refuses them, or rewrites the prompt when an answer follows.
    """
    try:
        prompt = rendered(tokenizer, messages[:turns], add_generation_prompt=True)
        whole = rendered(tokenizer, messages)
    except UserError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"the tokenizer's chat template refuses it ({reason})") from None
    if turns == len(messages):
        return valid_text(prompt), None
    if not whole.startswith(prompt):
        raise ValueError("the tokenizer's chat template words the prompt differently once it is answered")
    return valid_text(prompt), valid_text(whole.removeprefix(prompt))
