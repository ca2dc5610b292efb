"""Start the server, say that it is ready, and stop it: LitServe's processes under a uvicorn that drains."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

import uvicorn
from litserve import LitServer
from litserve.utils import WorkerSetupStatus, wrap_litserve_start

from ftp_lightning import models
from ftp_lightning.errors import UserError
from ftp_lightning.serving.app import CompletionsSpec, add_paths
from ftp_lightning.serving.options import Served
from ftp_lightning.serving.plan import Plan
from ftp_lightning.serving.prompts import Prompts
from ftp_lightning.serving.replies import Replies
from ftp_lightning.serving.worker import PrunedAPI
from ftp_lightning.stopping import SIGNALS, end_with_parent

DRAIN, GRACE = 2.0, 4
"""Seconds after SIGTERM at which running requests end with an error, and at which those that could not be told so are
dropped [ours]."""
LOOK_AT_WORKERS = 0.3
"""Seconds between two looks at whether workers live; a dead one is started again."""
SyncManager.register("end_with_parent", end_with_parent)


class PrunedServer(LitServer):
    """LitServe's server with what workers share, and with our paths."""

    def __init__(self, api: PrunedAPI, spec: CompletionsSpec, served: Served):
        kind, _, number = str(models.resolve_device(served.device)).partition(":")
        super().__init__(
            api,
            accelerator=kind,
            devices=[int(number or 0)] if kind == "cuda" else 1,
            workers_per_device=served.workers,
            timeout=False,
            restart_workers=True,
            max_payload_size=served.max_body,
            disable_openapi_url=True,
        )
        self.monitor_internal = LOOK_AT_WORKERS
        spec.replies = Replies(self, api.api_path, served.timeout)
        add_paths(self.app, spec)

    def _init_manager(self, num_api_servers: int) -> Any:
        with _deaf_children(*SIGNALS):
            manager = super()._init_manager(num_api_servers)
        manager.end_with_parent()  # it would not notice that this process was killed
        self.lit_api.shared = manager.dict(gone=[])
        return manager

    def launch_inference_worker(self, lit_api: Any) -> Any:
        with _deaf_children(signal.SIGINT):
            return super().launch_inference_worker(lit_api)

    def launch_single_inference_worker(self, lit_api: Any, worker_id: int) -> Any:
        with _deaf_children(signal.SIGINT):
            return super().launch_single_inference_worker(lit_api, worker_id)


@contextmanager
def _deaf_children(*numbers: signal.Signals) -> Iterator[None]:
    """Processes that are started inside do not hear these signals: what is told to all is for this process, which ends
    the others."""
    resource_tracker.ensure_running()  # whose start, with the first such process, unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def build(served: Served) -> PrunedServer:
    """The server, not started. UserError for a model, pruner or template that cannot be served."""
    tokenizer = models.load_tokenizer(served.model, revision=served.revision)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {served.model} is a slow one, which cannot stream\nGive another --model.")
    config = models.load_config(served.model, revision=served.revision).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    prompts = Prompts(tokenizer, served, positions, config.vocab_size)
    spec = CompletionsSpec(served, prompts, Plan.of(served, config.num_hidden_layers))
    return PrunedServer(PrunedAPI(served, spec), spec, served)


class Draining(uvicorn.Server):
    """A uvicorn that gives running requests some seconds when it is told to stop, and then lets the caller clean up."""

    def __init__(self, config: uvicorn.Config, replies: Replies, ready: Callable[[], None]):
        super().__init__(config)
        self.replies, self.ready = replies, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` has SIGHUP ignored
                signal.signal(number, self.handle_exit)
        self.ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.should_exit = True
        if self.replies.deadline is None:
            self.replies.deadline = time.monotonic() + DRAIN


def serve(served: Served, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C. `ready` is told the address as soon as requests are answered."""
    server = build(served)
    bound = _bind(host, port)
    before = {sig: signal.signal(sig, _stop) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        with wrap_litserve_start(server, worker_monitor=True):
            try:
                _wait_for_workers(server)
                gc.freeze()  # else the end of the interpreter looks through all objects of the libraries: a second
                config = uvicorn.Config(
                    server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE
                )
                spec: Any = server.lit_api.spec
                Draining(config, spec.replies, lambda: ready(_address(bound))).run(sockets=[bound])
            finally:
                logging.getLogger("litserve").setLevel(logging.CRITICAL)  # its monitor misses the manager that ends
                server._shutdown_event.set()
                time.sleep(0.05)  # so that the monitor starts no worker for those that are ended next
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
        bound.close()


def _stop(sig: int, frame: Any) -> None:
    """Before requests are answered a signal ends the start, and what was started."""
    raise SystemExit(128 + sig)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except (OSError, OverflowError) as error:
        bound.close()
        raise UserError(
            f"cannot listen at {host}, port {port}: {error}\nGive another --port (0 takes a free one) or --host."
        ) from None
    bound.set_inheritable(False)
    return bound


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _wait_for_workers(server: Any) -> None:
    """Return when all workers have their model. UserError where one cannot load it."""
    while True:
        states = list(server.workers_setup_status.values())
        if WorkerSetupStatus.ERROR in states:
            problem = server.lit_api.shared.get("error")
            raise UserError(problem or "a worker could not start; the lines above say why\nMend it, and start again.")
        if states and all(state == WorkerSetupStatus.READY for state in states):
            return
        time.sleep(0.05)


def log_to_stderr() -> None:
    """One line per request on stderr, with the time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("ftp_lightning.serving")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
