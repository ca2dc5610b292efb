"""What workers send back to one request, until it ends, its client leaves, its worker dies or the server stops."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from litserve.utils import LitAPIStatus, ResponseBufferItem
from starlette.requests import Request

from ftp_lightning.serving.answers import Refused
from ftp_lightning.serving.options import Ask

LOOK = 0.25
"""Seconds between two looks at client, worker and clock [ours]."""
LOST = 8
"""Looks in a row at an empty queue, after a worker was replaced, until a request that nobody started is lost [ours]."""
REMEMBERED = 1000
"""How many clients that have gone workers are told of, the latest ones."""


class Gone(Exception):
    """The client has left."""


class Replies:
    """Asks LitServe's workers, and reads what they answer.

    Attributes:
        deadline: `time.monotonic()` at which requests that still run are ended with an error; None: the server goes on.
    """

    def __init__(self, server: Any, path: str, timeout: float):
        self.server, self.path, self.timeout = server, path, timeout
        self.deadline: float | None = None
        self._gone: deque[str] = deque(maxlen=REMEMBERED)
        self._left = 0

    @property
    def in_flight(self) -> int:
        return len(self.server.response_buffer)

    async def waiting(self) -> int:
        """Requests that wait or run, and those whose clients have gone as long as they stand in the queue.

        Counted after the last await: who calls `to` at once keeps the number below a limit.
        """
        left, queued = self._left, 0
        if left and not (queued := await self.queued()) and left == self._left:
            self._left = 0
        return max(self.in_flight, queued)

    async def queued(self) -> int:
        """Requests that no worker has taken."""
        return await asyncio.to_thread(self._queue.qsize)

    @property
    def pids(self) -> list[int]:
        """The workers' processes."""
        return [worker.pid for worker in getattr(self.server, "inference_workers", ())]

    @property
    def _queue(self) -> Any:
        return self.server.litapi_request_queues[self.path]

    def _tell_gone(self) -> None:
        with suppress(OSError, EOFError):  # where the manager has ended
            self.server.lit_api.shared["gone"] = list(self._gone)

    async def to(self, ask: Ask, request: Request) -> AsyncIterator[tuple[str, Any]]:
        """("text", piece) of a streamed answer, then ("end", what `engine.answer` tells of it).

        Refused: 500 the model failed or its worker died, 503 the server stops, 504 it took too long. Gone: the client.
        """
        uid, since = str(uuid.uuid4()), time.monotonic()
        item = ResponseBufferItem(event=asyncio.Event(), response_queue=deque())
        self.server.response_buffer[uid] = item
        ended = False
        try:
            watch = _Watch(self, item, request, since)
            await asyncio.to_thread(self._queue.put, (self.server.app.response_queue_id, uid, since, ask))
            while not ended:
                with suppress(TimeoutError):
                    await asyncio.wait_for(item.event.wait(), LOOK)
                item.event.clear()
                while item.response_queue:
                    value, status = item.response_queue.popleft()
                    if status == LitAPIStatus.ERROR:
                        ended = True
                        raise Refused(500, value if isinstance(value, str) else "the worker died; ask again")
                    ended = status == LitAPIStatus.FINISH_STREAMING
                    yield ("end" if ended else "text"), value
                await watch.look()
        finally:
            self.server.response_buffer.pop(uid, None)
            if not ended:
                self._gone.append(uid)
                self._left += 1
                asyncio.get_running_loop().run_in_executor(None, self._tell_gone)


class _Watch:
    """Looks every now and then whether a request can still be answered."""

    def __init__(self, replies: Replies, item: ResponseBufferItem, request: Request, since: float):
        self.replies, self.item, self.request, self.since = replies, item, request, since
        self._looked, self._pid = since, 0
        self._pids, self._unseen = replies.pids, 0

    async def look(self) -> None:
        now, deadline = time.monotonic(), self.replies.deadline
        if deadline is not None and now > deadline:
            raise Refused(503, "the server is stopping; ask again")
        if now - self._looked < LOOK:
            return
        self._looked = now
        if now - self.since > self.replies.timeout:
            raise Refused(504, f"no answer within {self.replies.timeout:g} s")
        if self._worker_is_new() or await self._is_lost():
            raise Refused(500, "the worker died; ask again")
        if await self.request.is_disconnected():
            raise Gone

    def _worker_is_new(self) -> bool:
        """Whether the worker that took the request has been replaced: LitServe does not tell requests that are just
        being told something."""
        pids, number = self.replies.pids, self.item.worker_id
        if number is None or number >= len(pids):
            return False
        self._pid = self._pid or pids[number]
        return pids[number] != self._pid

    async def _is_lost(self) -> bool:
        """Whether a worker died after it took the request from the queue, and before it said so."""
        if self.item.worker_id is not None or self.replies.pids == self._pids:
            return False
        self._unseen = 0 if await self.replies.queued() else self._unseen + 1
        return self._unseen >= LOST
