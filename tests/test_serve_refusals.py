"""Requests that cannot be answered: each gets a status in 4xx and a sentence in OpenAI's shape."""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.testclient import TestClient
from served import SERVED, address, inside

from ftp_lightning.serving import server as servers
from ftp_lightning.serving.fields import Completion, read

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
TURN = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def asked():
    """Nothing here reaches a worker."""
    with inside(working=False) as server:
        yield TestClient(server.app)


def bad(**fields):
    return {"prompt": "hello", **fields}


def chat(**fields):
    return {"messages": TURN, **fields}


REQUESTS = [
    (TEXT, b"", 400, "not JSON"),
    (TEXT, b"{", 400, "not JSON"),
    (TEXT, b'{"prompt": "a",}', 400, "not JSON"),
    (TEXT, b'{"prompt": "\xff"}', 400, "not JSON"),
    (TEXT, b'{"prompt": "\\ud800"}', 400, "not JSON"),
    (TEXT, b'{"prompt": "a", "temperature": NaN}', 400, "not JSON"),
    (TEXT, b'{"prompt": "a", "top_p": Infinity}', 400, "not JSON"),
    (TEXT, b"[" * 5000, 400, "not JSON"),
    (TEXT, b"[]", 400, "JSON object"),
    (TEXT, b'"prompt"', 400, "JSON object"),
    (TEXT, b"null", 400, "JSON object"),
    (TEXT, b"prompt=hello", 400, "not JSON"),
    (TEXT, {}, 400, "prompt is missing"),
    (TEXT, {"prompt": None}, 400, "prompt is missing"),
    (TEXT, {"prompt": ""}, 400, "prompt is empty"),
    (TEXT, {"prompt": []}, 400, "prompt is empty"),
    (TEXT, {"prompt": 7}, 400, "prompt"),
    (TEXT, {"prompt": {}}, 400, "prompt"),
    (TEXT, {"prompt": ["a", "b"]}, 400, "several prompts"),
    (TEXT, {"prompt": [[]]}, 400, "prompt is empty"),
    (TEXT, {"prompt": [-1]}, 400, "token ids"),
    (TEXT, {"prompt": [4096]}, 400, "token ids"),
    (TEXT, {"prompt": [10**30]}, 400, "token ids"),
    (TEXT, {"prompt": [1.5]}, 400, "prompt"),
    (TEXT, {"prompt": [[1, "a"]]}, 400, "prompt"),
    (TEXT, bad(model="gpt-4"), 404, "no model 'gpt-4'"),
    (TEXT, bad(model=1), 400, "model"),
    (TEXT, bad(max_tokens=0), 400, "max_tokens"),
    (TEXT, bad(max_tokens=-5), 400, "max_tokens"),
    (TEXT, bad(max_tokens=1.5), 400, "max_tokens"),
    (TEXT, bad(max_tokens="10"), 400, "max_tokens"),
    (TEXT, bad(max_tokens=True), 400, "max_tokens"),
    (TEXT, bad(max_tokens=5000), 400, "more than the model's 2048"),
    (TEXT, bad(temperature=-0.1), 400, "temperature"),
    (TEXT, bad(temperature=2.1), 400, "temperature"),
    (TEXT, bad(temperature="hot"), 400, "temperature"),
    (TEXT, bad(top_p=0), 400, "top_p"),
    (TEXT, bad(top_p=1.1), 400, "top_p"),
    (TEXT, bad(seed="x"), 400, "seed"),
    (TEXT, bad(seed=2**63), 400, "seed"),
    (TEXT, b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400, "not JSON"),
    (TEXT, b'{"prompt": "a", "temperature": 1e400}', 400, "finite"),
    (TEXT, bad(top_k=5), 400, "no field 'top_k'"),
    (TEXT, "\ufeff{}".encode(), 400, "not JSON"),
    (TEXT, '{"prompt": "a"}'.encode("utf-16"), 400, "not JSON"),
    (TEXT, bad(stop=["a"] * 5), 400, "stop"),
    (TEXT, bad(stop=""), 400, "stop"),
    (TEXT, bad(stop=[1]), 400, "stop"),
    (TEXT, bad(stop="x" * 201), 400, "stop"),
    (TEXT, bad(stream="yes"), 400, "stream"),
    (TEXT, bad(stream_options={"usage": True}), 400, "usage"),
    (TEXT, bad(n=2), 400, "n must be 1"),
    (TEXT, bad(n=True), 400, "n must be 1"),
    (TEXT, bad(best_of=3), 400, "best_of"),
    (TEXT, bad(logprobs=5), 400, "log-probabilities"),
    (TEXT, bad(echo=True), 400, "echo"),
    (TEXT, bad(suffix="end"), 400, "suffix"),
    (TEXT, bad(presence_penalty=0.5), 400, "presence_penalty"),
    (TEXT, bad(presence_penalty=False), 400, "presence_penalty"),
    (TEXT, bad(frequency_penalty=1), 400, "frequency_penalty"),
    (TEXT, bad(logit_bias={"5": 10}), 400, "logit_bias"),
    (TEXT, bad(cache_implementation="static"), 400, "dynamic"),
    (TEXT, bad(promt="a"), 400, "no field 'promt'"),
    (TEXT, bad(messages=TURN), 400, "no field 'messages'"),
    (TEXT, bad(ftp_budget=1.0), 400, "ftp_budget"),
    (TEXT, bad(ftp_budget=-0.1), 400, "ftp_budget"),
    (TEXT, bad(ftp_budget="half"), 400, "ftp_budget"),
    (TEXT, bad(ftp_mode="sometimes"), 400, "off, auto, always"),
    (TEXT, bad(ftp_trace=1), 400, "ftp_trace"),
    (TEXT, bad(metadata="x"), 400, "metadata"),
    (TEXT, bad(metadata={"a": 1}), 400, "metadata.a"),
    (TEXT, bad(metadata={"ftp_budget": "2"}), 400, "ftp_budget"),
    (TEXT, bad(metadata={"ftp_budget": "a"}), 400, "ftp_budget"),
    (TEXT, bad(ftp_budget=0.1, metadata={"ftp_budget": "0.2"}), 400, "given twice"),
    (TEXT, {"prompt": "word " * 3000}, 400, "the model sees 2048"),
    (TEXT, {"prompt": "a" * 300_000}, 413, "larger than 200000 bytes"),
    (CHAT, {}, 400, "messages is missing"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hello"}, 400, "messages"),
    (CHAT, {"messages": [{"content": "a"}]}, 400, "role is missing"),
    (CHAT, {"messages": [{"role": "king", "content": "a"}]}, 400, "role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "'image_url'"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "content.0.text is missing"),
    (CHAT, {"messages": [{"role": "user", "content": ["a"]}]}, 400, "messages.0.content.0: input should be"),
    (CHAT, {"messages": [7]}, 400, "messages.0: input should be a valid object"),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, 400, "messages are empty"),
    (CHAT, chat(logprobs=True), 400, "log-probabilities"),
    (CHAT, chat(response_format={"type": "json_object"}), 400, "no grammar"),
    (CHAT, chat(tools=[{"type": "function"}], tool_choice="required"), 400, "no grammar"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "knows no tools"),
    (CHAT, chat(modalities=["audio"]), 400, "modalities"),
    (CHAT, chat(max_completion_tokens=0), 400, "max_completion_tokens"),
    (CHAT, chat(prompt="x"), 400, "no field 'prompt'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "words"), REQUESTS, ids=[f"{i}-{words[:20]}" for i, (*_, words) in enumerate(REQUESTS)]
)
def test_a_bad_request_gets_a_sentence(asked, path, body, status, words):
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = asked.post(path, content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert words in error["message"] and len(error["message"]) < 400
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", TEXT, 405), ("PUT", CHAT, 405), ("POST", "/v1/models", 405), ("GET", "/v1/engines", 404),
     ("POST", "/v1/embeddings", 404), ("GET", "/v1/models/gpt-4", 404), ("GET", "/../etc/passwd", 404),
     ("GET", "/info", 404), ("GET", "/docs", 404), ("POST", f"{TEXT}/", 404), ("OPTIONS", TEXT, 405),
     ("POST", "/V1/completions", 404), ("GET", "//v1/models", 404), ("GET", "/%2e%2e/passwd", 404)],
)  # fmt: skip
def test_a_path_that_is_not_there_says_so(asked, method, path, status):
    answer = asked.request(method, path, follow_redirects=False)
    said = answer.json()["error"]["message"]
    assert answer.status_code == status and (said.startswith("there is no") or f"{method} {path}" in said)
    assert (status == 405) == ("allow" in answer.headers)


def test_the_zero_of_a_number_is_its_neutral_value_as_a_float_too():
    fields = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1.0, "logprobs": None, "stop": None}
    assert read(json.dumps(bad(**fields)).encode(), Completion).stop == []


def test_the_log_has_one_line_for_a_request_that_brings_lines_of_its_own(asked, caplog):
    with caplog.at_level("INFO", "ftp_lightning.serving"):
        asked.post(TEXT, json=bad(metadata={"a\nb\x1b[31m": 1}))
        asked.get("/a%0ab%1b")
    assert len(caplog.messages) == 2 and all(message.isprintable() for message in caplog.messages)


def test_a_key_is_asked_for_on_every_path_but_the_page_and_health():
    with inside(working=False, key="secret-key") as server:
        asked = TestClient(server.app)
        right, wrong = {"authorization": "Bearer secret-key"}, {"authorization": "Bearer secret-kez"}
        for path in ("/v1/models", "/metrics", "/v1/models/embedded"):
            assert asked.get(path).status_code == asked.get(path, headers=wrong).status_code == 401
            assert asked.get(path, headers=right).status_code == 200
        for headers in ({}, wrong, {"authorization": b"Bearer \xff"}):
            answer = asked.post(TEXT, json={"prompt": "a"}, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert asked.get("/").status_code == asked.get("/health").status_code == 200
        assert asked.post(TEXT, json={}, headers=right).status_code == 400


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda *both: bool(compared.append(both)))
    with inside(working=False, key="secret-key") as server:
        TestClient(server.app).get("/v1/models", headers={"authorization": "Bearer x"})
    assert compared == [(b"x", b"secret-key")]


def test_a_chat_needs_a_template():
    with inside(working=False, chat_template=None) as server:
        answer = TestClient(server.app).post(CHAT, json=chat())
    assert answer.status_code == 400 and "--chat_template" in answer.json()["error"]["message"]


def test_a_prompt_of_no_tokens_is_refused(monkeypatch):
    with inside(working=False) as server:
        monkeypatch.setattr("ftp_lightning.serving.prompts.prompt_ids", lambda *_: [])
        answer = TestClient(server.app).post(TEXT, json={"prompt": "\u200b"})
    assert answer.status_code == 400 and "empty" in answer.json()["error"]["message"]


def test_prompts_above_the_servers_own_limit_are_refused():
    with inside(working=False, max_prompt_tokens=5) as server:
        answer = TestClient(server.app).post(TEXT, json={"prompt": "one two three four five six seven eight"})
    assert answer.status_code == 400 and "this server takes 5" in answer.json()["error"]["message"]


def test_more_requests_than_may_wait_are_refused():
    with inside(working=False, max_waiting=2) as server:
        server.response_buffer |= {"a": None, "b": None}
        answer = TestClient(server.app).post(TEXT, json={"prompt": "a"})
    assert (
        answer.status_code == 429 and answer.headers["retry-after"] and "waiting" in answer.json()["error"]["message"]
    )


def test_of_requests_that_come_at_once_no_more_than_may_wait_are_taken():
    async def ask(server) -> list:
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=30) as client:
            asked = [asyncio.create_task(client.post(TEXT, json=bad())) for _ in range(40)]
            while sum(task.done() for task in asked) < 35:
                await asyncio.sleep(0.02)
            found = [task.result().status_code for task in asked if task.done()]
            for task in asked:
                task.cancel()
            return found

    with inside(working=False, max_waiting=5) as server:
        found = asyncio.run(asyncio.wait_for(ask(server), 30))
    assert found == [429] * 35


def test_a_request_that_died_with_an_idle_worker_is_told_so(monkeypatch):
    monkeypatch.setattr("ftp_lightning.serving.replies.LOOK", 0.01)

    class Worker:
        pid = 1

    with inside(working=False) as server, ThreadPoolExecutor(1) as pool:
        server.inference_workers = [Worker()]
        asked = pool.submit(TestClient(server.app).post, TEXT, json=bad())
        server.litapi_request_queues[TEXT].get(timeout=10)  # taken, and START never comes
        server.inference_workers = [type("Other", (), {"pid": 2})]
        answer = asked.result(20)
    assert answer.status_code == 500 and "worker died" in answer.json()["error"]["message"]


def test_a_body_that_does_not_come_is_given_up_and_a_client_that_leaves_before_is_no_failure(caplog):
    head = f"POST {TEXT} HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n{{".encode()
    with address(timeout=0.3) as url:
        place = (url.split("/")[2].split(":")[0], int(url.rsplit(":", 1)[1]))
        with socket.create_connection(place) as slow:
            slow.sendall(head)
            assert b" 408 " in slow.recv(200)
        with socket.create_connection(place) as leaves:
            leaves.sendall(head)
        while "ftp_clients_gone_total 1.0" not in (metrics := httpx.get(f"{url}/metrics").text):
            assert 'status="500"' not in metrics
            time.sleep(0.02)
    assert "Traceback" not in caplog.text


def test_a_server_that_stops_takes_nothing_new():
    with inside(working=False) as server:
        server.lit_api.spec.replies.deadline = 0.0
        answer = TestClient(server.app).post(TEXT, json={"prompt": "a"})
    assert answer.status_code == 503 and "stopping" in answer.json()["error"]["message"]


def test_a_chat_template_that_makes_a_giant_is_refused(tmp_path):
    (tmp_path / "giant.jinja").write_text("{{ (messages[0].content * 200000000) | length }}")
    with inside(working=False, chat_template=str(tmp_path / "giant.jinja")) as server:
        answer = TestClient(server.app).post(CHAT, json=chat())
    assert answer.status_code == 400 and "more than" in answer.json()["error"]["message"]


def test_a_template_or_a_schedule_that_is_none_is_refused_at_the_start(tmp_path):
    from dataclasses import replace

    from ftp_lightning import Schedule, UserError

    Schedule.uniform(3, 0.2).save(tmp_path / "three.json")
    for change, words in (
        ({"chat_template": str(tmp_path / "none.jinja")}, "cannot be read"),
        ({"schedule": str(tmp_path / "three.json")}, "3 blocks, the model has 12"),
        ({"pruned": str(tmp_path)}, "not a pruner"),
        ({"model": str(tmp_path / "none")}, "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            servers.build(replace(SERVED, **change))
