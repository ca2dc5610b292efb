"""Own answers: what the dense model says greedily, kept on disk, and whether a pruned model still says it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import random_llama

from ftp_lightning import Schedule, StaticRouter, TokenPruner, UserError
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.text import prompt_ids
from ftp_lightning.evaluation import own_answers as module
from ftp_lightning.evaluation.continuation import evaluate_rows
from ftp_lightning.evaluation.own_answers import end_tokens, own_answers
from ftp_lightning.lock import locked
from ftp_lightning.models import load

NEW = 6


@pytest.fixture(scope="module")
def embedded():
    return load("embedded")


@pytest.fixture(scope="module")
def prompts(embedded):
    """Beginnings of stories, of several lengths, two of them alike in length."""
    texts = load_documents("embedded", "test")
    ids = [prompt_ids(embedded[1], text) for text in texts[:6]]
    return Rows([Row(row[:n], [], "plain", i) for i, (row, n) in enumerate(zip(ids, (40, 17, 64, 40, 25, 9)))])


def said(model, row, new=NEW):
    """What `generate` says after a prompt alone."""
    ids = torch.tensor([row.prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kv", ["keep", "evict"])
def test_the_agreement_is_that_of_two_generations(embedded, prompts, kv):
    model, _ = embedded
    rows = own_answers(model, prompts, NEW)
    assert [row.continuation for row in rows.rows] == [said(model, row) for row in prompts.rows]
    pruner = TokenPruner(StaticRouter(), Schedule.uniform(12, 0.3), kv=kv)
    scores = evaluate_rows(model, rows, pruner, batch_size=4)
    with pruner(model):
        pruned = [said(model, row) for row in rows.rows]
    assert scores.right_rows == [row.continuation == again for row, again in zip(rows.rows, pruned)]
    assert scores.first_rows == [row.continuation[0] == again[0] for row, again in zip(rows.rows, pruned)]
    assert set(scores.right_rows) == {True, False}
    assert all(evaluate_rows(model, rows).right_rows)  # the dense model agrees with itself


@pytest.fixture
def tiny():
    """A random model and prompts whose first greedy tokens differ."""
    model = random_llama(48, num_key_value_heads=2, initializer_range=0.2)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 48, (n,), generator=generator).tolist() for n in (5, 9, 5, 12)]
    return model, Rows([Row(row, [], "chat", i) for i, row in enumerate(ids)], {"long_prompt": 2})


def ending(model, monkeypatch, *tokens):
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(tokens))


def test_an_end_token_ends_an_answer_and_alone_it_is_none(tiny, monkeypatch):
    model, rows = tiny
    ending(model, monkeypatch, 999)
    free = [row.continuation for row in own_answers(model, rows, 5).rows]
    stops = {free[1][2], free[0][0]}
    ending(model, monkeypatch, *stops)
    assert end_tokens(model) == stops
    found = own_answers(model, rows, 5)
    kept = [i for i, answer in enumerate(free) if answer[0] not in stops]
    assert 0 < len(kept) < 4 and [row.document for row in found.rows] == kept
    assert found.counts() == {"rows": len(kept), "cut": 0, "long_prompt": 2, "empty_answer": 4 - len(kept)}
    for row in found.rows:
        end = next((n for n, token in enumerate(free[row.document]) if token in stops), 4)
        assert row.continuation == free[row.document][: end + 1]
    ending(model, monkeypatch, *{answer[0] for answer in free})
    with pytest.raises(UserError, match="answers none of the 4 prompts"):
        own_answers(model, rows, 5)


def test_answers_are_asked_once_and_go_on_after_a_kill(tiny, monkeypatch, tmp_path):
    model, rows = tiny
    ending(model, monkeypatch, 999)
    monkeypatch.setattr(module, "BATCH", 1)
    asked, real, killed = [], module.greedy, []

    def greedy(model, batch, *rest):
        if len(asked) == 2 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        asked.append(batch["input_ids"].tolist())
        return real(model, batch, *rest)

    monkeypatch.setattr(module, "greedy", greedy)
    with pytest.raises(KeyboardInterrupt):
        own_answers(model, rows, 4, tmp_path)
    found = own_answers(model, rows, 4, tmp_path)
    assert len(asked) == 4 and own_answers(model, rows, 4, tmp_path).hash() == found.hash() and len(asked) == 4
    assert found.hash() == own_answers(model, rows, 4).hash() and len(asked) == 8
    own_answers(model, rows, 3, tmp_path)  # another length is another question
    model.lm_head.weight.data[0, 0] += 1.0  # and so is another model
    own_answers(model, rows, 4, tmp_path)
    assert len(asked) == 16


def test_rows_with_an_answer_may_keep_it(tiny, monkeypatch):
    model, rows = tiny
    ending(model, monkeypatch, 999)
    given = Rows([Row(rows.rows[0].prompt, [7, 8]), *rows.rows[1:]])
    own = [row.continuation for row in own_answers(model, rows, 4).rows]
    assert [row.continuation for row in own_answers(model, given, 4).rows] == own
    found = own_answers(model, given, 4, only_missing=True)
    assert [row.continuation for row in found.rows] == [[7, 8], *own[1:]]


def test_a_prompt_longer_than_the_model_is_told(tiny):
    model, rows = tiny
    model.config.max_position_embeddings = 511
    with pytest.raises(UserError, match="have 512 tokens, the model takes 511"):
        own_answers(model, rows, 500)


def side_by_side(work):
    """The results of `work` in two threads that run at once."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(work), pool.submit(work)]]


@pytest.mark.parametrize("rows,new_tokens", [([], 3), ([Row([3, 4], [], "chat", 0)], 0)])
def test_nothing_asked_is_an_error_and_not_endless(tiny, rows, new_tokens):
    with pytest.raises(ValueError, match="at least 1"):
        own_answers(tiny, Rows(rows), new_tokens)


def test_of_several_processes_one_asks_and_the_others_read(tiny, monkeypatch, tmp_path):
    model, rows = tiny
    asked, real, both = [], module.greedy, threading.Event()

    def greedy(model, batch, *rest):
        asked.append(threading.get_ident())
        if len(asked) > 1:
            both.set()
        both.wait(0.3)  # the other one would ask now
        return real(model, batch, *rest)

    monkeypatch.setattr(module, "greedy", greedy)
    one, two = side_by_side(lambda: own_answers(model, rows, 4, tmp_path).hash())
    assert one == two == own_answers(model, rows, 4).hash()
    assert len(set(asked)) == 2  # one of the two threads, and this one, which was given no folder
    assert not list(tmp_path.glob(".*.lock"))


def test_one_that_waits_for_anothers_answers_may_give_up(tiny, tmp_path):
    model, rows = tiny
    told = []

    def tell(done, of):
        told.append((done, of))
        if len(told) == 2:
            raise TimeoutError

    with locked(tmp_path / module._identity(model, 4)), pytest.raises(TimeoutError):
        own_answers(model, rows, 4, tmp_path, tell=tell)
    assert told == [(0, len(rows))] * 2
    own_answers(model, rows, 4, tmp_path)  # and nothing is locked any more


def test_processes_that_share_a_sharded_model_ask_together(tiny, monkeypatch, tmp_path):
    """Its forward needs all of them: who waited for the first would wait for ever."""
    model, rows = tiny
    together, real = threading.Barrier(2, timeout=20), module.greedy
    monkeypatch.setattr(module, "is_sharded", lambda model: True)
    monkeypatch.setattr(module, "greedy", lambda *about: (together.wait(), real(*about))[1])
    assert len(set(side_by_side(lambda: own_answers(model, rows, 4, tmp_path).hash()))) == 1
