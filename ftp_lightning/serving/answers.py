"""OpenAI's shapes: answers, chunks of a stream, errors, the list of models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "too_many_requests"}


class Refused(Exception):
    """A request that gets an error for its answer: HTTP status, a sentence, and the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status)

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One answer's name and kind, which all its chunks carry."""

    name: str
    created: int
    model: str
    chat: bool

    def whole(self, end: dict[str, Any]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        text = {"message": {"role": "assistant", "content": end["text"]}} if self.chat else {"text": end["text"]}
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": end["finish_reason"]}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": [choice], "usage": end["usage"], "ftp": end["ftp"]}

    def chunk(self, text: str | None, first: bool = False) -> str:
        """One event of a stream: a piece of text."""
        return event(self._part(text, None, first))

    def last(self, end: dict[str, Any], usage: bool) -> str:
        """The events that end a stream: why it ended, what was skipped, and where it was asked for the usage."""
        events = event(self._part(None, end["finish_reason"]) | {"ftp": end["ftp"]})
        if usage:
            events += event(self._head(self._chunked) | {"choices": [], "usage": end["usage"]})
        return events + "data: [DONE]\n\n"

    @property
    def _chunked(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    def _part(self, text: str | None, reason: str | None, first: bool = False) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        said = {} if text is None else {"content": text}
        content = {"delta": role | said} if self.chat else {"text": text or ""}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return self._head(self._chunked) | {"choices": [choice]}


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def models(names: list[str], created: int) -> dict[str, Any]:
    """The list of `/v1/models`."""
    cards = [{"id": name, "object": "model", "created": created, "owned_by": "ftp-lightning"} for name in names]
    return {"object": "list", "data": cards}
