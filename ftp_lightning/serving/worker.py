"""The process that has the model: LitServe's `LitAPI`, and the loop that makes batches of what waits."""

from __future__ import annotations

import ctypes
import hmac
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty
from typing import Any

from fastapi import HTTPException, Request
from litserve import LitAPI
from litserve.loops.base import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from ftp_lightning.errors import UserError
from ftp_lightning.serving.engine import Row, answer
from ftp_lightning.serving.options import Ask, Served
from ftp_lightning.serving.plan import Plan, Pruners
from ftp_lightning.stopping import end_with_parent

IDLE = 0.1
"""Seconds that an idle worker waits for a request at a time [ours]."""
RESTS = 50
"""Looks in a row at an empty queue after which a worker gives freed memory back [ours]: it costs some 10 ms, and the
next request as much."""
OPEN = ("/", "/health")
"""Paths that need no key: the page sends it with its requests."""
SPREAD = 2.0
"""Times the tokens of its shortest prompt that the longest of a batch may have [ours]: the rest is padding."""
Waiting = tuple[int, str, float, Ask]
"""LitServe's number of the process that asked, the request's name, `time.monotonic()` when it came, and what it asks.
"""


class PrunedAPI(LitAPI):
    """The model with its pruners, in a worker process.

    Attributes:
        shared: what workers and server tell each other beside requests: a dict of LitServe's manager, with "gone", the
            requests whose clients have gone, and "error", what a worker could not start for.
    """

    def __init__(self, served: Served, spec: Any):
        super().__init__(max_batch_size=served.max_batch, loop=BatchLoop(), spec=spec, stream=True)
        self.served = served
        self.shared: Any = {}

    def authorize(self, request: Request) -> None:
        """HTTPException 401 unless a request brings the server's key, compared in constant time."""
        key = self.served.key
        if key is None or request.url.path in OPEN:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode()):
            raise HTTPException(401, "give the server's key as `Authorization: Bearer KEY`")

    def setup(self, device: str) -> None:
        """Load the model; what the user can mend is told to the server, which says it."""
        end_with_parent()
        try:
            self._load(device)
        except UserError as error:
            self.shared["error"] = str(error)
            logging.getLogger("litserve").setLevel(logging.CRITICAL)
            raise

    def _load(self, device: str) -> None:
        import torch

        from ftp_lightning import models
        from ftp_lightning.disk.pruned_folder import check_base
        from ftp_lightning.pruning.family import find_blocks

        served = self.served
        if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // served.workers))
        self.model, self.tokenizer = models.load(
            served.model, dtype=served.dtype, device=device, revision=served.revision
        )
        plan = Plan.of(served, len(find_blocks(self.model)))
        if plan.pruner is not None:
            check_base(plan.pruner._base or {}, self.model)
        self.pruners = Pruners(plan, served, self.model)

    def gone(self) -> set[str]:
        """Requests whose clients have gone."""
        return set(self.shared.get("gone", ()))

    def predict(self, x: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the loop answers batches")


class BatchLoop(LitLoop):
    """Takes what waits, and answers requests that may share a forward in one batch.

    LitServe's own batched streaming loop cannot be used: it ends all rows together, fails all for the error of one,
    cannot stop a row whose client has gone, and looks at an empty queue without a pause.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Waiting] = []
        self.rests = 0

    def run(self, lit_api: Any, device: Any, worker_id: Any, request_queue: Any, transport: Any, *about: Any) -> None:
        """Answer one batch, if there is one."""
        try:
            self._take(lit_api, request_queue, transport)
        except (EOFError, BrokenPipeError, ConnectionError, FileNotFoundError):
            raise SystemExit(0) from None  # the server is gone
        if self.waiting:
            self._answer(lit_api, transport)
            self.rests = 0
            return
        self.rests += 1
        if self.rests == RESTS:
            give_back()

    def _take(self, lit_api: Any, request_queue: Any, transport: Any) -> None:
        """Move requests from the queue to `waiting`, as many as make a batch; waits a moment where there is none.

        Of several workers each leaves the others what its batch has no room for.
        """
        while len(self.waiting) < lit_api.max_batch_size:
            if lit_api.served.workers > 1 and len(self._batch(lit_api)) < len(self.waiting):
                return
            try:
                item = request_queue.get(timeout=IDLE) if not self.waiting else request_queue.get_nowait()
            except Empty:
                return
            queue, uid, since, ask = item
            self.put_response(transport, queue, uid, (), LitAPIStatus.START, LoopResponseType.STREAMING)
            try:
                lit_api.pruners.chosen(ask)
            except Exception as error:
                self._fail(transport, {uid: queue}, error)
            else:
                self.waiting.append((queue, uid, since, ask))

    def _batch(self, lit_api: Any) -> list[Waiting]:
        """Those of `waiting` that are computed next."""
        if not self.waiting:
            return []
        pruner, _ = lit_api.pruners.chosen(self.waiting[0][3])
        return together(self.waiting, lambda ask: lit_api.pruners.chosen(ask)[0] is pruner)

    def _answer(self, lit_api: Any, transport: Any) -> None:
        gone = lit_api.gone()
        self.waiting = [one for one in self.waiting if one[1] not in gone]
        batch = self._batch(lit_api)
        if not batch:
            return
        pruner, _ = lit_api.pruners.chosen(batch[0][3])
        self.waiting = [one for one in self.waiting if one not in batch]
        queues = {uid: queue for queue, uid, _, _ in batch}

        def tell(uid: str, what: str, value: Any) -> None:
            last = what == "end"
            status = LitAPIStatus.FINISH_STREAMING if last else LitAPIStatus.OK
            self.put_response(transport, queues[uid], uid, value, status, LoopResponseType.STREAMING)
            if last:
                del queues[uid]

        rows = [Row(uid, ask, since, lit_api.tokenizer, lit_api.pruners.chosen(ask)[1]) for _, uid, since, ask in batch]
        costs = None if pruner is None else lit_api.pruners.block_costs(pruner)
        try:
            answer(lit_api.model, lit_api.tokenizer, rows, pruner, tell, lit_api.gone, costs)
        except Exception as error:
            self._fail(transport, queues, error)

    def _fail(self, transport: Any, queues: dict[str, int], error: Exception) -> None:
        """Tell the clients of these requests that they failed, and the log why."""
        logging.getLogger(__name__).error("%d requests failed", len(queues), exc_info=error)
        for uid, queue in queues.items():
            self.put_response(transport, queue, uid, _sentence(error), LitAPIStatus.ERROR, LoopResponseType.STREAMING)


def together(waiting: Sequence[Waiting], alike: Callable[[Ask], bool]) -> list[Waiting]:
    """The request that has waited longest, and those that may share its forward: the same pruner, little padding."""
    batch: list[Waiting] = []
    shortest, longest = math.inf, 0.0
    for one in waiting:
        tokens = len(one[3].ids)
        if not batch or (alike(one[3]) and max(longest, tokens) <= SPREAD * min(shortest, tokens)):
            batch.append(one)
            shortest, longest = min(shortest, tokens), max(longest, tokens)
    return batch


def give_back() -> None:
    """Give the system the freed memory that glibc keeps after a large batch; with another C library nothing is done."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _sentence(error: Exception) -> str:
    """What a client is told of an error: a UserError's words, of others only that there was one."""
    return str(error) if isinstance(error, UserError) else "the model failed; the server's log says why"
