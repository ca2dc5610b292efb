"""The examples of docs/serve.md, run as they stand but for the server's address."""

import json
import os
import re
from pathlib import Path

import pytest
from served import address, embedded
from test_docs import DOCS, blocks, commands

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.__main__ import parse

EXAMPLES = blocks(DOCS / "serve.md", "python")
OFFERED = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server():
    with address() as url:
        yield url


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place where `exported` is what the page's command has made."""
    from ftp_lightning.serving.export import export

    place = tmp_path_factory.mktemp("place")
    os.environ["HF_MODULES_CACHE"] = str(place / "modules")
    pruner = TokenPruner(StaticRouter(), Schedule.default(12, 0.3))
    pruner.save(place / "pruned", base="embedded", model=embedded()[0])
    export(str(place / "pruned"), str(place / "exported"))
    return place


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=[code.splitlines()[0].split()[1] for code in EXAMPLES])
def test_the_python_examples_run(number, server, folder, monkeypatch, capsys):
    code = EXAMPLES[number]
    for module in set(re.findall(r"^(?:from|import) (\w+)", code, re.M)):
        pytest.importorskip(module)
    monkeypatch.chdir(folder)
    exec(compile(code.replace(OFFERED, server), "serve.md", "exec"), {})
    said = capsys.readouterr().out
    assert len(said.strip()) > 10
    assert "openai" not in code or re.search(r" [1-9]\d*$", said.strip()), "no token was skipped"


def test_the_server_of_the_page_answers_chats():
    """The embedded model has no chat template: a server without a plain one refuses the page's own client."""
    words = next(words for block in blocks(DOCS / "serve.md", "bash") for words in commands(block))
    assert words[:2] == ["ftp-lightning", "serve"] and parse("serve", words[2:]).chat_template == "plain"


def test_curl_is_answered(server):
    """What curl sends without a content type."""
    import httpx

    (line,) = (words for block in blocks(DOCS / "serve.md", "bash") for words in commands(block) if words[0] == "curl")
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = httpx.post(line[1].replace(OFFERED, server), content=line[3], headers=headers, timeout=60)
    assert answer.status_code == 200 and json.loads(answer.text)["usage"]["completion_tokens"] == 20


def test_the_openai_client_streams_what_it_gets_whole_and_reads_errors(server):
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    asked = {"model": "embedded", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    pieces = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    events = list(pieces)
    assert (
        "".join(event.choices[0].text for event in events if event.choices)
        == client.completions.create(**asked).choices[0].text
    )
    assert events[-1].usage.completion_tokens == 8
    assert [model.id for model in client.models.list()] == ["embedded"]
    with pytest.raises(BadRequestError, match="log-probabilities") as refused:
        client.completions.create(**asked, logprobs=1)
    assert refused.value.param == "logprobs"


def test_lm_eval_asks_the_running_server(server, tmp_path: Path):
    for module in ("aiohttp", "tenacity"):
        pytest.importorskip(module)
    import lm_eval
    from lm_eval.tasks import TaskManager

    text = (DOCS / "serve.md").read_text()
    arguments = re.search(r"--model_args (\S+)", text).group(1).replace(OFFERED, server)
    rows = [{"question": f"Who saw the house {number}?", "answer": "the boy"} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "who", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "output_type": "generate_until",
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["@"], "max_gen_toks": 6, "temperature": 0, "ftp_mode": "always"},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="local-chat-completions", model_args=arguments, tasks=[task], task_manager=manager,
        apply_chat_template=True, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    assert len(found["samples"]["who"]) == 3 and all(sample["resps"][0][0] for sample in found["samples"]["who"])
