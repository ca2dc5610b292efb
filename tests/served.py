"""A server in this process: LitServe's app and our loop in a thread, over HTTP where a client needs an address."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from queue import Empty, Queue

import uvicorn
from fastapi.testclient import TestClient
from litserve.utils import WorkerSetupStatus

from ftp_lightning.models import load
from ftp_lightning.serving import server as servers
from ftp_lightning.serving.options import Served
from ftp_lightning.serving.plan import Plan, Pruners

SERVED = Served(
    model="embedded", revision=None, dtype="float32", device="cpu", pruned=None, schedule=None, budget=None, mode="off",
    least_tokens="0", dense_structured=False, chat_template="plain", max_batch=8, workers=1, max_new_tokens=16,
    max_prompt_tokens=None, max_waiting=64, max_body=200_000, timeout=60.0, log_prompts=False, key=None,
    kv=None, seed=None,
)  # fmt: skip


@cache
def embedded():
    return load("embedded")


class Direct:
    """A transport within one process."""

    def __init__(self):
        self.queue: Queue = Queue()

    def send(self, item, consumer_id):
        self.queue.put(item)

    async def areceive(self, consumer_id):
        try:
            return await asyncio.to_thread(self.queue.get, timeout=0.05)
        except Empty:
            return None


@contextmanager
def inside(working: bool = True, **changes) -> Iterator[servers.PrunedServer]:
    """A server with its worker in a thread; `working` False leaves requests waiting until `work` is called."""
    served = replace(SERVED, **changes)
    server = servers.build(served)
    api = server.lit_api
    server.app.response_queue_id = 0
    server.litapi_request_queues[api.api_path] = Queue()
    server._transport = Direct()
    server.workers_setup_status = {"completions_0": WorkerSetupStatus.READY}
    api.shared = {"gone": []}
    api.model, api.tokenizer = embedded()
    api.pruners = Pruners(Plan.of(served, 12), served, api.model)
    stopped, started = threading.Event(), threading.Event()

    def work() -> None:
        started.wait()
        while not stopped.is_set():
            api.loop.run(api, "cpu", 0, server.litapi_request_queues[api.api_path], server._transport)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    server.work = started.set
    if working:
        started.set()
    try:
        yield server
    finally:
        started.set()
        stopped.set()
        thread.join()


@contextmanager
def client(**changes) -> Iterator[TestClient]:
    with inside(**changes) as server, TestClient(server.app) as asked:
        yield asked


@contextmanager
def address(**changes) -> Iterator[str]:
    """A server that real clients reach at this address."""
    with inside(**changes) as server:
        bound = servers._bind("127.0.0.1", 0)
        http = uvicorn.Server(uvicorn.Config(server.app, log_level="warning"))
        thread = threading.Thread(target=http.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not http.started:
            time.sleep(0.01)
        try:
            yield servers._address(bound)
        finally:
            http.should_exit = True
            thread.join()
