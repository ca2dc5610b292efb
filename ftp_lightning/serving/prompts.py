"""From a request's text or turns to token ids, with the limits of their number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ftp_lightning.data.template import rendered
from ftp_lightning.data.text import prompt_ids
from ftp_lightning.errors import UserError
from ftp_lightning.named_file import read_named_text
from ftp_lightning.serving.answers import Refused
from ftp_lightning.serving.fields import Chat, Completion, Fields
from ftp_lightning.serving.options import Ask, Served

PLAIN = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
"""`--chat_template plain`: the turns' texts one after the other, for models without a template."""
_MARKS = re.compile(r"[{}\[\]<>|=;\\]|\t|```")
_LARGEST_TEMPLATE = 1_000_000
"""Bytes that a chat template may have [ours]: they take a few kB."""
_STRUCTURED = 0.04
"""Share of a text's characters that make it code, a table or JSON [ours]."""


def is_structured(text: str) -> bool:
    """Whether a prompt is code, a table, markup or JSON rather than prose: by its share of brackets and the like."""
    return len(_MARKS.findall(text)) > max(4.0, _STRUCTURED * len(text))


def template_named(name: str | None) -> str | None:
    """The chat template of --chat_template: `plain`, or a file. UserError where it cannot be read."""
    if name in (None, "plain"):
        return PLAIN if name else None
    return read_named_text(str(name), _LARGEST_TEMPLATE)


class Prompts:
    """A tokenizer with the server's limits.

    Args:
        positions: tokens that the model can see, prompt and answer together; None: no limit is known.
    """

    def __init__(self, tokenizer: Any, served: Served, positions: int | None, vocabulary: int):
        self.tokenizer, self.served, self.positions = tokenizer, served, positions
        self.vocabulary = vocabulary
        self.template = template_named(served.chat_template) or tokenizer.chat_template

    def ask(self, fields: Fields) -> Ask:
        """What a worker is asked. Refused (400) where the prompt is empty, too long, or cannot be rendered."""
        wanted = fields.max_tokens
        if isinstance(fields, Chat):
            text = self._rendered(fields)
            ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
            structured = bool(fields.tools) or any(turn.role == "tool" or turn.tool_calls for turn in fields.messages)
            structured = structured or any(is_structured(str(turn.turn()["content"])) for turn in fields.messages)
            wanted = fields.max_completion_tokens or wanted
        else:
            assert isinstance(fields, Completion)
            ids, structured = self._ids(fields.prompt)
        if not ids:
            raise Refused(400, "the prompt is empty: it has no tokens")
        return Ask(
            ids=ids,
            max_tokens=self._room(len(ids), wanted),
            temperature=fields.temperature,
            top_p=fields.top_p,
            seed=self.served.seed if fields.seed is None else fields.seed,
            stop=tuple(fields.stop),
            stream=fields.stream,
            mode=fields.ftp_mode or self._mode(fields.ftp_budget),
            budget=fields.ftp_budget,
            structured=structured,
            trace=fields.ftp_trace,
        )

    def _mode(self, budget: float | None) -> str:
        """A budget without a mode means that pruning is wanted."""
        return "auto" if budget and self.served.mode == "off" else self.served.mode

    def _ids(self, prompt: str | Sequence[int]) -> tuple[list[int], bool]:
        if isinstance(prompt, str):
            if not prompt:
                raise Refused(400, "prompt is empty", param="prompt")
            return prompt_ids(self.tokenizer, prompt), is_structured(prompt)
        if not prompt:
            raise Refused(400, "prompt is empty", param="prompt")
        if not all(0 <= token < self.vocabulary for token in prompt):
            raise Refused(400, f"prompt holds token ids outside [0, {self.vocabulary})", param="prompt")
        return list(prompt), False

    def _rendered(self, chat: Chat) -> str:
        if not self.template:
            sentence = "this model has no chat template: use /v1/completions, or serve it with --chat_template plain"
            raise Refused(400, sentence, param="messages")
        if chat.tools and "tools" not in str(self.template):
            raise Refused(400, "this model's chat template knows no tools", param="tools")
        turns = [message.turn() for message in chat.messages]
        more: dict[str, Any] = {"tools": chat.tools} if chat.tools else {}
        try:
            more |= {"chat_template": self.template, "add_generation_prompt": True}
            text = rendered(self.tokenizer, turns, today=True, **more)
        except UserError as error:
            said = str(error.__cause__ or error)[:200]
            raise Refused(400, f"the chat template refuses these messages: {said}", "messages") from None
        if not text.strip():
            raise Refused(400, "messages are empty", param="messages")
        return text

    def _room(self, tokens: int, wanted: int | None) -> int:
        """How many tokens the answer may have."""
        most = self.served.max_prompt_tokens
        if most is not None and tokens > most:
            raise _too_long(f"the prompt has {tokens} tokens, this server takes {most}")
        limit = self.positions or tokens + (wanted or self.served.max_new_tokens)
        if tokens >= limit:
            raise _too_long(f"the prompt has {tokens} tokens, the model sees {limit} with the answer")
        if wanted is not None and tokens + wanted > limit:
            raise _too_long(f"{tokens} tokens of the prompt and max_tokens {wanted} are more than the model's {limit}")
        return wanted or min(self.served.max_new_tokens, limit - tokens)


def _too_long(sentence: str) -> Refused:
    return Refused(400, sentence, code="context_length_exceeded")
