"""A chat rendered by the tokenizer's template, and where in it the last question stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ftp_lightning.data.template import rendered
from ftp_lightning.errors import UserError


@dataclass(frozen=True)
class ChatQuestion:
    """Ids of a rendered chat up to where the assistant answers, and the tokens [start, end) of the last user's words.

    `span` is for `with pruner.question([span]):`, `window_end`, the tokens that the template puts after the question,
    for `AttentionScore(window_end=...)`.
    """

    ids: list[int]
    start: int
    end: int

    @property
    def span(self) -> tuple[int, int]:
        return self.start, self.end

    @property
    def window_end(self) -> int:
        return len(self.ids) - self.end


def chat_question(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> ChatQuestion:
    """Render a chat by the tokenizer's template and find the last user's words in it.

    A token that holds the end of the words and the beginning of what the template adds counts as theirs.

    Args:
        messages: {"role", "content"} each, the last of them a user's, its content a text.

    Raises:
        UserError: no template, no words of a user at the end, a template that rewrites them, or a tokenizer that does
        not tell where in a text its tokens stand.
    """
    question = str(messages[-1]["content"]).strip() if messages and messages[-1]["role"] == "user" else ""
    if not question:
        raise UserError("a chat's question is its last message: it must come from the user and must not be blank.")
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template: give the span of the question yourself.")
    if not tokenizer.is_fast:
        raise UserError("this tokenizer does not say where its tokens stand: give the span of the question yourself.")
    text = rendered(tokenizer, messages, add_generation_prompt=True)
    first = text.rfind(question)
    if first < 0:
        raise UserError("the chat template rewrites the question: give its span yourself.")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    stands = [low < first + len(question) and high > first for low, high in found["offset_mapping"]]
    start = stands.index(True)
    return ChatQuestion(list(found["input_ids"]), start, start + sum(stands))
