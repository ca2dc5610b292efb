"""The server as a process: it starts, says so, survives its worker, drains and leaves; and what stops it at once."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from served import SERVED

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.serving import server as servers

ROOT = Path(__file__).resolve().parents[1]
LONG = {"prompt": "Once upon a time", "max_tokens": 1900, "temperature": 0}


class Process:
    """`ftp-lightning serve` with a free port."""

    def __init__(self, folder: Path, *flags: str):
        self.log = folder / "log"
        command = [sys.executable, "-m", "ftp_lightning", "serve", "--port", "0", *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.line = self.process.stdout.readline()
        assert self.line.startswith("ready: http://127.0.0.1:"), self.log.read_text()
        self.url = self.line.split()[1]

    def ask(self, **fields) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={"prompt": "a", "max_tokens": 2} | fields, timeout=120)

    def children(self) -> list[int]:
        """The worker processes."""
        return [pid for pid in self.descendants() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def descendants(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()  # a thread starts those that were killed
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(30)
        self.process.stdout.close()


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
    except FileNotFoundError:
        return True


def until(what, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_a_stop_ends_every_request(tmp_path):
    with Process(tmp_path, "--budget", "0.3") as server:
        assert server.ask().json()["choices"] and httpx.get(f"{server.url}/health").text == "ok"
        (worker,) = server.children()

        failed: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: failed.append(server.ask(**LONG)))
        waiting.start()
        until(lambda: "ftp_requests_in_flight 1.0" in httpx.get(f"{server.url}/metrics").text)
        time.sleep(0.5)
        os.kill(worker, signal.SIGKILL)
        waiting.join()
        assert failed[0].status_code == 500 and "worker died" in failed[0].json()["error"]["message"]
        assert server.ask().status_code == 200

        (worker,), half = server.children(), []
        waits = threading.Thread(target=lambda: failed.append(server.ask(**LONG)))
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}, timeout=60) as stream:
            for line in stream.iter_lines():
                half += [line] * bool(line)
                if line and len(half) == 3:
                    waits.start()
                    until(lambda: "ftp_requests_in_flight 2.0" in httpx.get(f"{server.url}/metrics").text)
                    server.process.send_signal(signal.SIGTERM)
        waits.join()
        assert failed[1].status_code == 503 and "stopping" in half[-1] and "[DONE]" not in half[-1]
        assert server.process.wait(60) == 0
        until(lambda: ended(worker))
        with pytest.raises(httpx.ConnectError):
            server.ask()
    said = server.log.read_text()
    assert "Traceback" not in said and said.count("/v1/completions") == 5


@pytest.mark.slow
def test_workers_end_with_their_server(tmp_path):
    with Process(tmp_path, "--workers", "2") as server:
        workers, everything = server.children(), server.descendants()
        assert len(workers) == 2 and set(everything) > set(workers)  # LitServe's manager
        server.process.kill()
        until(lambda: all(map(ended, everything)))


@pytest.mark.slow
@pytest.mark.parametrize("number, to_all", [(signal.SIGHUP, False), (signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_a_server_leaves_in_order_whatever_signal_comes(tmp_path, number, to_all):
    """Also where all its processes are told, as systemd does."""
    with Process(tmp_path) as server:
        for pid in (*server.descendants(), server.process.pid) if to_all else (server.process.pid,):
            os.kill(pid, number)
        assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


def test_what_a_server_starts_first_ends_with_it():
    """LitServe's manager, which also holds the port: no worker is there yet that could end it."""
    come, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(tell, str(servers.build(SERVED)._init_manager(1)._process.pid).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    manager = int(os.read(come, 20))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: ended(manager), 10)


@pytest.mark.slow
def test_a_base_model_that_is_another_one_is_said_by_the_worker(tmp_path):
    from ftp_lightning.models import load_model

    other = load_model("random:tiny", seed=1)
    TokenPruner(StaticRouter(), Schedule.default(3, 0.3)).save(tmp_path / "pruned", base="random:tiny", model=other)
    flags = ["--port", "0", "--pruned", "pruned"]
    done = subprocess.run(
        [sys.executable, "-m", "ftp_lightning", "serve", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "another base model" in done.stderr and "Traceback" not in done.stderr


def test_what_cannot_be_served_is_said_before_anything_starts(command, tmp_path):
    (tmp_path / "short").write_text("abc\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags, words in (
            (["--port", port], "cannot listen at 127.0.0.1"),
            (["--host", "not an address", "--port", 0], "cannot listen"),
            (["--pruned", "nowhere"], "nowhere is not a pruner"),
            (["--model", "./nowhere"], "does not exist"),
            (["--chat_template", "nowhere"], "nowhere cannot be read"),
            (["--api_key_file", "nowhere"], "nowhere cannot be read"),
            (["--api_key_file", "short"], "at least 8"),
            (["--least_tokens", "few"], "least_tokens"),
            (["--budget", "1"], "budget"),
            (["--workers", "0"], "workers"),
            (["--port", "70000"], "port"),
            (["--device", "tpu"], "device"),
        ):
            status, out, err = command("serve", *flags)
            assert status == 2 and words in err and not out and len(err.splitlines()) <= 3, (flags, err)
