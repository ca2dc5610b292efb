"""The server's HTTP side: OpenAI's paths as a spec of LitServe, and metrics and a page beside them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from litserve.specs.base import LitSpec
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ftp_lightning.errors import UserError
from ftp_lightning.serving.answers import Refused, Shape, event, models
from ftp_lightning.serving.fields import Chat, Completion, Fields, read
from ftp_lightning.serving.metrics import Metrics
from ftp_lightning.serving.options import Ask, Served
from ftp_lightning.serving.plan import Plan
from ftp_lightning.serving.prompts import Prompts
from ftp_lightning.serving.replies import Gone, Replies

PAGE = Path(__file__).with_name("page.html")
FIRST_TOKEN = "x-ftp-time-to-first-token-ms"
log = logging.getLogger("ftp_lightning.serving")


class CompletionsSpec(LitSpec):
    """`/v1/completions`, `/v1/chat/completions` and `/v1/models`.

    LitServe's `OpenAISpec` has chat alone, adds up the usage of all chunks, always says "stop", and cannot carry
    fields of ours; so this is a spec of its own on the same seam.
    """

    def __init__(self, served: Served, prompts: Prompts, plan: Plan):
        super().__init__()
        self.api_path = "/v1/completions"
        self.served, self.prompts, self.plan = served, prompts, plan
        self.metrics, self.created = Metrics(), int(time.time())
        self.replies: Replies | None = None
        self.add_endpoint("/v1/completions", self.complete, ["POST"])
        self.add_endpoint("/v1/chat/completions", self.chat, ["POST"])
        self.add_endpoint("/v1/models", self.list_models, ["GET"])
        self.add_endpoint("/v1/models/{name:path}", self.one_model, ["GET"])
        self.add_endpoint("/metrics", self.tell_metrics, ["GET"])

    def __getstate__(self) -> dict[str, Any]:
        """A worker is sent the path alone."""
        return {"api_path": self.api_path, "_server": None}

    @property
    def stream(self) -> bool:
        return True

    def setup(self, server: Any) -> None:
        """Nothing: requests are sent by `Replies`."""

    # ---------------------------------------------------------------- paths

    async def complete(self, request: Request) -> Response:
        return await self._answered(request, Completion)

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, Chat)

    async def list_models(self) -> Response:
        return JSONResponse(models([self.served.model], self.created))

    async def one_model(self, name: str) -> Response:
        if name != self.served.model:
            raise _no_model(name, self.served.model)
        return JSONResponse(models([name], self.created)["data"][0])

    async def tell_metrics(self) -> Response:
        assert self.replies is not None
        return Response(self.metrics.text(self.replies.in_flight), media_type="text/plain; version=0.0.4")

    # ---------------------------------------------------------------- an answer

    async def _answered(self, request: Request, kind: type[Fields]) -> Response:
        """The answer, whole or streamed. Headers wait for the first token, so that errors until then have a status."""
        assert self.replies is not None
        if self.replies.deadline is not None:
            raise Refused(503, "the server is stopping; ask again")
        ask, fields = await self._ask(request, kind)
        if (waiting := await self.replies.waiting()) >= self.served.max_waiting:
            raise Refused(429, f"{waiting} requests are waiting already; ask again later")
        chat = kind is Chat
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        shape = Shape(name=name, created=int(time.time()), model=self.served.model, chat=chat)
        note = Note(shape, request, self.metrics)
        replies = self.replies.to(ask, request)
        try:
            first = await anext(replies)
            if not ask.stream:
                return JSONResponse(shape.whole(first[1]), headers=note.ended(first[1]))
        except Gone:
            note.left()
            return Response(status_code=499)
        except asyncio.CancelledError:
            note.left()
            raise
        usage = bool(fields.stream_options and fields.stream_options.include_usage)
        events = self._events(shape, first, replies, usage, note)
        headers = {FIRST_TOKEN: f"{1e3 * (time.monotonic() - note.since):.3f}", "cache-control": "no-cache"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _ask(self, request: Request, kind: type[Fields]) -> tuple[Ask, Fields]:
        try:
            async with asyncio.timeout(self.served.timeout):
                body = await request.body()
        except TimeoutError:
            raise Refused(408, f"the body did not come within {self.served.timeout:g} s") from None
        return await run_in_threadpool(self.asked, body, kind)

    def asked(self, body: bytes, kind: type[Fields]) -> tuple[Ask, Fields]:
        """What a body asks for. Refused (400, 404) where it cannot be answered."""
        fields = read(body, kind)
        if fields.model not in (None, self.served.model):
            raise _no_model(str(fields.model), self.served.model)
        ask = self.prompts.ask(fields)
        try:
            self.plan.schedule(ask.budget)
        except UserError as error:
            raise Refused(400, " ".join(str(error).splitlines()), param="ftp_budget") from None
        if self.served.log_prompts:
            log.info("prompt %r", self.prompts.tokenizer.decode(ask.ids))
        return ask, fields

    async def _events(
        self, shape: Shape, first: tuple[str, Any], replies: AsyncIterator, usage: bool, note: Note
    ) -> AsyncIterator[str]:
        """A stream that ends with [DONE], or with an error and without it."""
        try:
            if shape.chat:
                yield shape.chunk("", first=True)
            what, value = first
            while what == "text":
                yield shape.chunk(value)
                what, value = await anext(replies)
            yield shape.last(value, usage)
            note.ended(value)
        except Refused as refused:
            note.failed(refused)
            yield event(refused.body())
        except BaseException as error:
            note.left()
            if not isinstance(error, Gone):
                raise
        finally:
            await replies.aclose()  # type: ignore[attr-defined]


class Note:
    """One line in the log for one request, and its count."""

    def __init__(self, shape: Shape, request: Request, metrics: Metrics):
        self.shape, self.path, self.metrics, self.since = shape, request.url.path, metrics, time.monotonic()
        self._said = False

    def ended(self, end: dict[str, Any]) -> dict[str, str]:
        """Note an answer; the headers that tell of it."""
        self.metrics.requests.labels("200").inc()
        self.metrics.ended(end)
        usage, ftp = end["usage"], end["ftp"]
        skipped = usage["prompt_tokens_details"]["skipped"]
        first = ftp["time_to_first_token_ms"]
        self._say(
            f"200 {end['finish_reason']} prompt={usage['prompt_tokens']} skipped={skipped} "
            f"answer={usage['completion_tokens']} batch={ftp['batch']} first={first:.0f}ms"
        )
        return {FIRST_TOKEN: f"{first:.3f}"}

    def failed(self, error: Refused) -> None:
        """Note a stream that ended with an error."""
        self.metrics.requests.labels(str(error.status)).inc()
        self._say(f"{error.status} {error.message}")

    def left(self) -> None:
        """Note that the client has gone."""
        self.metrics.gone.inc()
        self._say("gone")

    def _say(self, what: str) -> None:
        if not self._said:
            log.info("%s %s %s total=%.0fms", self.path, self.shape.name, what, 1e3 * (time.monotonic() - self.since))
        self._said = True


def add_paths(app: Any, spec: CompletionsSpec) -> None:
    """The page in place of LitServe's own, and errors in OpenAI's shape."""
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in ("/", "/info")]
    app.router.redirect_slashes = False

    @app.get("/")
    async def page() -> Response:
        plan = spec.plan
        about = {"model": spec.served.model, "budget": plan.budget, "most": plan.most, "blocks": plan.blocks}
        words = json.dumps(about).replace("<", "\\u003c")
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("{{ABOUT}}", words))

    def told(request: Request, error: Refused, more: Mapping[str, str] | None = None) -> Response:
        """The error, with its line in the log and its count."""
        spec.metrics.requests.labels(str(error.status)).inc()
        said = f"{request.url.path[:100]} {error.status} {error.message}"
        log.info("%s", "".join(letter if letter.isprintable() else " " for letter in said))
        headers = {"retry-after": "1"} if error.status in (429, 503) else {}
        return JSONResponse(error.body(), error.status, headers=headers | dict(more or {}))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return told(request, error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path[:100]}"
        sentences = {
            404: f"there is nothing at {where}; POST to /v1/completions or /v1/chat/completions",
            405: f"{where} is not served: this path takes another method",
            413: f"the request is larger than {spec.served.max_body} bytes",
        }
        sentence = sentences.get(error.status_code, str(error.detail))
        return told(request, Refused(error.status_code, sentence), error.headers)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        spec.metrics.gone.inc()
        log.info("%s gone before the whole request was there", request.url.path[:100])
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s failed", request.url.path, exc_info=error)
        return told(request, Refused(500, "the server failed; its log says why"))


def _no_model(name: str, served: str) -> Refused:
    return Refused(
        404, f"there is no model {name[:100]!r} here; this server has {served!r}", "model", "model_not_found"
    )
