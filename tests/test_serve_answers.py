"""The server's answers are those of `generate`: dense and pruned, whole and streamed, alone and in a batch."""

import json
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from served import SERVED, address, client, embedded, inside

from ftp_lightning import Schedule, ScheduleFamily, StaticRouter, TokenPruner, UserError
from ftp_lightning.data.text import prompt_ids
from ftp_lightning.serving.engine import Row, answer, padded
from ftp_lightning.serving.options import Ask
from ftp_lightning.serving.plan import Plan
from ftp_lightning.serving.stops import Text
from ftp_lightning.serving.worker import together

WORDS = "the boy saw a small red house by the sea and the old man told him of ships and gold".split()
PRUNER = TokenPruner(StaticRouter(), Schedule.default(12, 0.3))


def text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def generated(prompt: str, new: int = 8, pruned: bool = False, **more) -> str:
    """What `generate` says."""
    model, tokenizer = embedded()
    ids = torch.tensor([prompt_ids(tokenizer, prompt)])
    if pruned:
        PRUNER.attach(model)
    try:
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **{"do_sample": False} | more
        )
    finally:
        PRUNER.detach()
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def asked():
    with client() as one:
        yield one


def complete(asked, prompt: str, **fields):
    fields = {"max_tokens": 8, "temperature": 0} | fields
    answer = asked.post("/v1/completions", json={"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(asked, path: str, body: dict) -> tuple[str, list[dict]]:
    """The text of a stream, and its events."""
    answer = asked.post(path, json=body | {"stream": True})
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert answer.status_code == 200 and lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    pieces = [choice.get("text") or choice.get("delta", {}).get("content") for e in events for choice in e["choices"]]
    return "".join(piece or "" for piece in pieces), events


@pytest.mark.parametrize("mode", ["off", "always"])
def test_an_answer_is_that_of_generate_whole_and_streamed(asked, mode):
    prompt = text(0, 40)
    wanted = generated(prompt, pruned=mode == "always")
    whole = complete(asked, prompt, ftp_mode=mode)
    assert whole["choices"][0]["text"] == wanted
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ftp_mode": mode}
    assert streamed(asked, "/v1/completions", body)[0] == wanted
    body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    chat = asked.post("/v1/chat/completions", json=body).json()
    assert streamed(asked, "/v1/chat/completions", body)[0] == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "top_p": 0.5}])
def test_a_seed_draws_what_generate_draws(asked, settings):
    torch.manual_seed(5)
    wanted = generated(text(1, 30), do_sample=True, top_k=0, **settings)
    assert complete(asked, text(1, 30), **{"temperature": 1.0} | settings, seed=5)["choices"][0]["text"] == wanted


def test_the_servers_seed_is_that_of_requests_without_one():
    torch.manual_seed(5)
    wanted = generated(text(1, 30), do_sample=True, top_k=0)
    with client(seed=5) as one:
        found = [complete(one, text(1, 30), temperature=1.0, **own)["choices"][0]["text"] for own in ({}, {"seed": 6})]
    assert found[0] == wanted != found[1]


def test_kv_is_that_of_the_flag_else_that_of_the_schedule(tmp_path):
    Schedule.default(12, 0.4).save(tmp_path / "schedule.json")
    TokenPruner(StaticRouter(), Schedule.default(12, 0.4)).save(tmp_path / "pruned", base="embedded")
    for how in ({"budget": 0.3}, {"schedule": str(tmp_path / "schedule.json")}, {"pruned": str(tmp_path / "pruned")}):
        served = replace(SERVED, **how)
        assert Plan.of(served, 12).pruner_of(0.2).kv == Schedule.default(12, 0.2).kv
        assert Plan.of(replace(served, kv="keep"), 12).pruner_of(0.2).kv == ("keep",) * 12
        with pytest.raises(UserError, match="kv lists 2 blocks.*\n.*Give --kv one mode, or one per block"):
            Plan.of(replace(served, kv=("keep", "evict")), 12)


def test_a_temperature_of_nearly_nothing_is_greedy(asked):
    wanted = complete(asked, text(1, 30), max_tokens=4)["choices"][0]["text"]
    assert complete(asked, text(1, 30), max_tokens=4, temperature=1e-40)["choices"][0]["text"] == wanted


def test_usage_and_the_first_token_are_told(asked):
    prompt = text(3, 60)
    tokens = len(prompt_ids(embedded()[1], prompt))
    answer = asked.post(
        "/v1/completions", json={"prompt": prompt, "max_tokens": 4, "temperature": 0, "ftp_budget": 0.3}
    )
    found = answer.json()
    usage, ftp = found["usage"], found["ftp"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (tokens, 4, tokens + 4)
    assert usage["prompt_tokens_details"]["skipped"] == round(ftp["skipped_share"] * tokens) > 0.25 * tokens
    assert ftp["pruned"] and ftp["budget"] == pytest.approx(0.3) and 0.2 < ftp["flops_saved"] < 0.3
    assert float(answer.headers["x-ftp-time-to-first-token-ms"]) == ftp["time_to_first_token_ms"] >= ftp["prefill_ms"]
    assert found["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("server", "request_", "why"),
    [
        ({}, {}, "off"),
        ({"mode": "auto", "least_tokens": "1000"}, {}, "short"),
        ({"mode": "auto"}, {"ftp_budget": 0}, "budget 0"),
        ({"mode": "auto"}, {"ftp_mode": "off"}, "off"),
        ({"mode": "auto"}, {"metadata": {"ftp_mode": "off"}}, "off"),
        ({"mode": "auto", "dense_structured": True}, {"prompt": '{"a": [1, 2], "b": {"c": [3]}} ' * 4}, "structured"),
        ({"mode": "auto"}, {"prompt": '{"a": [1, 2], "b": {"c": [3]}} ' * 4}, None),
        ({"mode": "auto", "least_tokens": "1000"}, {"ftp_mode": "always"}, None),
        ({"mode": "auto", "dense_structured": True}, {}, None),
        ({}, {"metadata": {"ftp_budget": "0.2"}}, None),
        ({"mode": "auto", "least_tokens": "auto"}, {}, "short"),
    ],
)
def test_a_prompt_is_pruned_only_where_it_was_asked_for(server, request_, why):
    with client(**server) as one:
        ftp = complete(one, **{"prompt": text(4, 40), "max_tokens": 1} | request_)["ftp"]
    assert (
        ftp["dense_because"] == why and ftp["pruned"] == (why is None) and (ftp["skipped_share"] > 0) == (why is None)
    )


def test_a_stored_pruner_serves_its_budget_and_smaller_ones(tmp_path):
    pruner = TokenPruner(StaticRouter(), Schedule.default(12, 0.4))
    pruner.save(tmp_path / "pruned", base="embedded")
    with client(pruned=str(tmp_path / "pruned"), mode="always") as one:
        assert complete(one, text(5, 50), max_tokens=1)["ftp"]["budget"] == pytest.approx(0.4)
        assert complete(one, text(5, 50), max_tokens=1, ftp_budget=0.2)["ftp"]["budget"] == pytest.approx(0.2)
        refused = one.post("/v1/completions", json={"prompt": "a", "ftp_budget": 0.5})
    assert refused.status_code == 400 and "at most 0.4" in refused.json()["error"]["message"]


def test_a_pruner_with_a_family_serves_all_its_budgets(tmp_path):
    family = ScheduleFamily([Schedule.default(12, budget) for budget in (0.2, 0.6)])
    pruner = TokenPruner(StaticRouter(), family.at(0.4), family=family)
    pruner.save(tmp_path / "pruned", base="embedded")
    with client(pruned=str(tmp_path / "pruned"), mode="always") as one:
        for asked, budget in ((None, 0.4), (0.6, 0.6)):
            assert complete(one, text(5, 50), max_tokens=1, ftp_budget=asked)["ftp"]["budget"] == pytest.approx(budget)
    with pytest.raises(UserError, match="at most 0.6"), client(pruned=str(tmp_path / "pruned"), budget=0.7):
        pass


def test_a_ready_made_pruner_serves_by_its_name():
    from ftp_lightning.disk.ready import load_pruner

    with client(pruned="embedded", mode="always") as one:
        budget = complete(one, text(5, 50), max_tokens=1)["ftp"]["budget"]
    assert budget == pytest.approx(load_pruner("embedded").schedule.budget)


def test_stop_strings_end_an_answer_and_are_not_told(asked):
    said = generated(text(2, 30), new=12)
    stop = said[8:12]
    body = {"prompt": text(2, 30), "max_tokens": 12, "temperature": 0, "stop": [stop, "never said"]}
    found = complete(asked, **body)
    assert found["choices"][0] | {"index": 0} == {
        "index": 0, "text": said[: said.index(stop)], "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert found["usage"]["completion_tokens"] < 12
    assert streamed(asked, "/v1/completions", body)[0] == said[: said.index(stop)]


def test_text_is_held_back_while_it_may_be_a_stop_string():
    tokenizer = embedded()[1]
    ids = tokenizer.encode("one two three four — ü 🙂 five", add_special_tokens=False)
    plain = Text(tokenizer)
    assert "".join([plain.add(token) for token in ids] + [plain.end()]) == plain.said == tokenizer.decode(ids)
    held = Text(tokenizer, ["four five", "ee fix"])
    assert "".join([held.add(token) for token in ids] + [held.end()]) == held.said == tokenizer.decode(ids)
    cut, told = Text(tokenizer, ["ee fo"]), ""
    while not cut.stopped:
        told += cut.add(ids.pop(0))
    assert told + cut.end() == cut.said == "one two thr"
    ids = tokenizer.encode("ü 🙂", add_special_tokens=False)
    for end in range(1, len(ids)):  # half a character at the end is told as decoding shows it
        half = Text(tokenizer)
        assert "".join([half.add(token) for token in ids[:end]] + [half.end()]) == tokenizer.decode(ids[:end])


@pytest.mark.parametrize("mode", ["off", "always"])
def test_requests_that_arrive_together_are_one_batch_and_each_as_alone(mode):
    prompts = [text(seed, 30 + 5 * seed) for seed in range(4)]
    with inside(working=False) as server:
        from fastapi.testclient import TestClient

        with TestClient(server.app) as one:
            answers: dict[int, dict] = {}

            def ask(index: int) -> None:
                sampled = {"temperature": 0.9, "seed": index} if index % 2 else {}
                answers[index] = complete(one, prompts[index], ftp_mode=mode, max_tokens=4 + index, **sampled)

            threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
            for thread in threads:
                thread.start()
            while server.litapi_request_queues["/v1/completions"].qsize() < 4:
                time.sleep(0.01)
            server.work()
            for thread in threads:
                thread.join()
    for index, found in answers.items():
        more = {}
        if index % 2:
            torch.manual_seed(index)
            more = {"do_sample": True, "temperature": 0.9, "top_k": 0}
        assert found["ftp"]["batch"] == 4
        assert found["choices"][0]["text"] == generated(prompts[index], 4 + index, mode == "always", **more)


def test_a_batch_takes_what_may_share_its_forward_and_little_padding():
    def waiting(*lengths):
        return [(0, str(index), 0.0, Ask(ids=[1] * length, max_tokens=1)) for index, length in enumerate(lengths)]

    def names(batch):
        return "".join(uid for _, uid, _, _ in batch)

    assert names(together(waiting(100, 90, 10, 80), lambda ask: True)) == "013"
    assert names(together(waiting(10, 1000, 12), lambda ask: True)) == "02"
    assert names(together(waiting(10, 11, 12), lambda ask: len(ask.ids) != 11)) == "02"


def test_a_worker_among_several_leaves_the_others_what_its_batch_has_no_room_for():
    for workers, taken in ((1, 4), (2, 2)):
        with inside(working=False, workers=workers) as server:
            api, queue = server.lit_api, server.litapi_request_queues["/v1/completions"]
            for number, mode in enumerate(("off", "always", "off", "always")):
                queue.put((0, str(number), 0.0, Ask(ids=[5] * 9, max_tokens=1, mode=mode)))
            api.loop._take(api, queue, server._transport)
            assert len(api.loop.waiting) == taken and queue.qsize() == 4 - taken
            api.loop.waiting.clear()
            while queue.qsize():
                queue.get()


def test_a_request_that_no_pruner_can_be_made_for_fails_alone(monkeypatch, caplog):
    with client() as one:
        with monkeypatch.context() as patch:
            patch.setattr("ftp_lightning.serving.plan.Plan.pruner_of", lambda *_: 1 / 0)
            failed = one.post("/v1/completions", json={"prompt": "a", "ftp_mode": "always"})
        assert failed.status_code == 500 and complete(one, "a", max_tokens=1)
    assert "division by zero" in caplog.text


def test_rows_are_padded_on_the_left():
    ids, mask = padded([[5], [6, 7]], 0, torch.device("cpu"))
    assert ids.tolist() == [[0, 5], [6, 7]] and mask.tolist() == [[0, 1], [1, 1]]


def test_a_row_whose_client_has_gone_stops_and_the_others_go_on():
    model, tokenizer = embedded()
    told: list[tuple] = []
    rows = [Row(name, Ask(ids=[5, 6, 7], max_tokens=300), 0.0, tokenizer) for name in "ab"]
    rows[1].ask = Ask(ids=[5, 6, 7], max_tokens=30)
    answer(model, tokenizer, rows, None, lambda *what: told.append(what), lambda: {"a"})
    assert [row.reason for row in rows] == ["gone", "length"] and rows[0].tokens < 300
    assert {uid for uid, what, _ in told if what == "end"} == {"a", "b"}


def test_one_request_in_a_stream_tells_every_prompt_tokens_blocks(asked):
    body = {"prompt": text(6, 40), "max_tokens": 3, "temperature": 0, "ftp_mode": "always", "ftp_trace": True}
    ftp = streamed(asked, "/v1/completions", body)[1][-1]["ftp"]
    assert "".join(token["text"] for token in ftp["tokens"]) == "<s>" + body["prompt"]
    assert {token["blocks"] for token in ftp["tokens"]} <= set(range(13))
    share = 1 - sum(token["blocks"] for token in ftp["tokens"]) / (12 * len(ftp["tokens"]))
    assert share == pytest.approx(ftp["skipped_share"])


def test_metrics_count_what_was_answered():
    with client() as one:
        for mode in ("off", "always"):
            complete(one, text(7, 40), ftp_mode=mode, max_tokens=2)
        lines = dict(line.rsplit(" ", 1) for line in one.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert lines['ftp_requests_total{status="200"}'] == "2.0" and lines["ftp_completion_tokens_total"] == "4.0"
    assert float(lines["ftp_skipped_tokens_total"]) > 5
    dense, pruned = (
        float(lines[f'ftp_prefill_dense_estimate_seconds_total{{kind="{kind}"}}']) for kind in ("dense", "pruned")
    )
    assert dense == float(lines['ftp_prefill_seconds_total{kind="dense"}'])
    assert pruned > float(lines['ftp_prefill_seconds_total{kind="pruned"}'])


def test_the_log_has_one_line_per_request_and_no_prompt(caplog):
    with caplog.at_level("INFO", "ftp_lightning.serving"), client() as one:
        complete(one, "secret words", max_tokens=1)
        one.post("/v1/completions", json={"prompt": ""})
    answered, refused = caplog.messages
    assert "200 length prompt=" in answered and refused == "/v1/completions 400 prompt is empty"
    assert "secret" not in caplog.text
    with caplog.at_level("INFO", "ftp_lightning.serving"), client(log_prompts=True) as one:
        complete(one, "secret words", max_tokens=1)
    assert "secret words" in caplog.text


def test_a_model_that_fails_is_told_and_the_server_goes_on(monkeypatch, caplog):
    with client() as one:
        model = embedded()[0]
        with monkeypatch.context() as patch:
            patch.setitem(model.__dict__, "generate", lambda *args, **kwargs: 1 / 0)
            failed = one.post("/v1/completions", json={"prompt": "a"})
        assert failed.status_code == 500 and "log says why" in failed.json()["error"]["message"]
        assert complete(one, "a", max_tokens=1)["choices"][0]["finish_reason"] == "length"
    assert "division by zero" in caplog.text


def test_a_client_that_leaves_a_stream_stops_the_computation():
    import httpx

    with address(max_new_tokens=1500) as url:
        body = {"prompt": "Once upon a time", "temperature": 1, "seed": 1, "stream": True, "max_tokens": 1500}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())
        begin = time.monotonic()
        found = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60).json()
        metrics = httpx.get(f"{url}/metrics").text
    assert found["ftp"]["time_to_first_token_ms"] < 3000 and time.monotonic() - begin < 5
    assert "ftp_clients_gone_total 1.0" in metrics


def test_a_worker_gives_back_freed_memory_once_when_nothing_waits(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr("ftp_lightning.serving.worker.give_back", lambda: calls.append(1))
    monkeypatch.setattr("ftp_lightning.serving.worker.IDLE", 0.01)
    monkeypatch.setattr("ftp_lightning.serving.worker.RESTS", 3)
    with client() as one:
        for number in (1, 2):  # after the start, and after an answer
            while len(calls) < number:
                time.sleep(0.01)
            time.sleep(0.1)
            assert len(calls) == number
            complete(one, "a", max_tokens=1)
