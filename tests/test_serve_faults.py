"""A server as a process under attack: thousands wait, giants come, its workers die, it is stopped while all ask."""

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from test_serve_process import LONG, Process, until

TINY = ("--model", "random:tiny", "--chat_template", "plain")
WHERE = "/v1/completions"


def megabytes(server: Process) -> float:
    pids = [server.process.pid, *server.descendants()]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def at_once(server: Process, bodies: list[dict], during=lambda: None) -> list[httpx.Response | Exception]:
    """The answers to requests that are all sent at once."""

    async def ask() -> list:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            asked = [asyncio.create_task(client.post(WHERE, json=body)) for body in bodies]
            await asyncio.to_thread(during)
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(ask())


@pytest.mark.slow
def test_of_a_thousand_at_once_each_is_answered_or_told_to_come_again(tmp_path):
    with Process(tmp_path, *TINY) as server:
        bodies = [{"prompt": f"number {number}", "max_tokens": 2, "temperature": 0} for number in range(1000)]
        found = at_once(server, bodies)
        answered = [index for index, one in enumerate(found) if one.status_code == 200]
        assert {one.status_code for one in found} == {200, 429} and len(answered) >= 64
        assert all(one.headers["retry-after"] for one in found if one.status_code == 429)
        for index in answered[::10]:  # nothing is mixed up
            assert server.ask(**bodies[index]).json()["choices"] == found[index].json()["choices"]
        assert "ftp_requests_in_flight 0.0" in httpx.get(f"{server.url}/metrics").text


@pytest.mark.slow
def test_giants_are_refused_and_leave_no_memory_behind(tmp_path):
    with Process(tmp_path, *TINY) as server:
        giant = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'

        def send() -> None:
            for content in (giant, iter([giant[:5_000_000], giant[5_000_000:]])):
                answer = httpx.post(f"{server.url}{WHERE}", content=content, timeout=60)
                assert answer.status_code == 413 and "larger than 2000000 bytes" in answer.json()["error"]["message"]

        send()
        before = megabytes(server)
        for _ in range(10):
            send()
        assert megabytes(server) < before + 10 and server.ask().status_code == 200


@pytest.mark.slow
def test_a_killed_worker_leaves_the_others_answering(tmp_path):
    with Process(tmp_path, "--workers", "2", *TINY) as server:
        one, _ = server.children()
        bodies = [{"prompt": f"number {number}", "max_tokens": 100, "temperature": 0} for number in range(40)]

        def kill() -> None:
            until(lambda: "ftp_requests_in_flight 40.0" in httpx.get(f"{server.url}/metrics").text)
            os.kill(one, signal.SIGKILL)

        found = [answer.status_code for answer in at_once(server, bodies, kill)]
        assert set(found) <= {200, 500} and found.count(500) <= 8 < found.count(200)
        until(lambda: len(server.children()) == 2 and one not in server.children())
        assert server.ask().status_code == 200


@pytest.mark.slow
def test_a_server_under_load_leaves_in_time_and_ends_every_answer(tmp_path):
    with Process(tmp_path, "--model", "random:tiny", "--max_batch", "4") as server:
        bodies = [LONG | {"prompt": f"number {number}", "stream": number % 2 == 0} for number in range(40)]
        left = []

        def stop() -> None:
            until(lambda: "ftp_requests_in_flight 40.0" in httpx.get(f"{server.url}/metrics").text)
            server.process.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            assert server.process.wait(30) == 0
            left.append(time.monotonic() - begin)

        found = at_once(server, bodies, stop)
        print(f"left after {left[0]:.1f} s")
        for number, answer in enumerate(found):
            whole = '"usage"' in answer.text if number % 2 else "[DONE]" in answer.text
            assert answer.status_code in (200, 503) and whole != ("the server is stopping" in answer.text)
