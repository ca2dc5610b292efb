"""lm-eval's own tasks from local files: data in the Hub's schema, declared metrics, generation, resumption, leaks."""

import json
from types import SimpleNamespace

import pytest
import torch
from ftp_models import ftp_models
from lm_eval.models.huggingface import HFLM
from tiny import random_llama

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits, nll_per_token, sequence_logits
from ftp_lightning.evaluation.harness import task_data, tasks
from ftp_lightning.evaluation.harness.accounts import Answer
from ftp_lightning.evaluation.harness.answers import AnswerBook
from ftp_lightning.evaluation.harness.model import FtpLM
from ftp_lightning.models import load_tokenizer
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import RandomRouter, StaticRouter
from ftp_lightning.schedule import Schedule

SCHEDULE = Schedule([0.0, 0.5, 0.7])
WORDS = "the old man walked to river and looked for his boat it was gone so little dog that ran away".split()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_llama(len(tokenizer), num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=256)


@pytest.fixture
def ftp(model, tokenizer):
    with ftp_models(model, tokenizer) as make:
        yield make


def text(i, n):
    return " ".join(WORDS[(i * 7 + k * (1 + i % 3)) % len(WORDS)] for k in range(n))


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    """Five tasks in the Hub's schema, in all the layouts that are understood."""
    arc = [
        {
            "id": f"q{i}",
            "question": text(i, 6),
            "choices": {"text": [text(i + k, 2) for k in range(4)], "label": list("1234")},
            "answerKey": "1234"[i % 4],
        }
        for i in range(5)
    ]
    write(tmp_path / "arc_easy.jsonl", arc)
    write(tmp_path / "arc" / "arc_challenge_test.jsonl", arc)
    parts = {"activity_label": "Cooking", "ctx": "x"}
    hella = [
        parts
        | {"ind": i, "ctx_a": text(i, 5), "ctx_b": "then he", "endings": [text(k, 3) for k in range(4)], "label": "1"}
        for i in range(4)
    ]
    write(tmp_path / "hellaswag" / "validation.jsonl", hella)
    wino = [
        {"sentence": f"{text(i, 4)} because _ was big.", "option1": "dog", "option2": "man", "answer": "1"}
        for i in (1, 2)
    ]
    write(tmp_path / "winogrande_validation.jsonl", wino)
    for split, count in (("test", 3), ("dev", 5)):
        rows = [
            {"subject": s, "question": text(i, 9), "choices": ["w\u2028", "x", "y", "z"], "answer": i % 4}
            for s in ("anatomy", "virology")
            for i in range(count)
        ]
        write(tmp_path / "mmlu" / f"mmlu_{split}.jsonl", rows)
    return tmp_path


FIVE = ("arc_challenge", "arc_easy", "hellaswag", "mmlu", "winogrande")


def test_five_official_tasks_on_local_files_equal_hf_on_every_item(ftp, model, tokenizer, data):
    files = {task: task_data.find_files(task, data) for task in FIVE}
    ours = tasks.run_tasks(ftp(), files)
    theirs = tasks.run_tasks(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), files)
    assert [ours[task]["n"] for task in FIVE] == [5, 5, 4, 6, 2]
    assert [ours[task]["metric"] for task in FIVE] == ["acc_norm", "acc_norm", "acc_norm", "acc", "acc"]
    assert {"mmlu_anatomy", "mmlu_virology"} < set(ours)
    for task in FIVE:
        for a, b in zip(ours[task]["items"], theirs[task]["items"], strict=True):
            assert a["answers"] == pytest.approx(b["answers"], abs=1e-4)
            assert (a["score"], a["hash"]) == (b["score"], b["hash"])
    assert ours["mmlu"]["prompt_tokens"] > 4 * ours["arc_easy"]["prompt_tokens"]  # five examples before each item
    assert (ours["mmlu"]["truncated"], ours["mmlu"]["chance"]) == (0, 0.25)


def test_files_that_are_missing_or_wrong_are_told_of(ftp, data):
    with pytest.raises(UserError, match=r"holds no piqa.jsonl\n.*TASK_SPLIT.jsonl"):
        task_data.find_files("piqa", data)
    with pytest.raises(UserError, match="no subject 'history'\nThey hold anatomy, virology"):
        tasks.local_task("mmlu_history", task_data.find_files("mmlu_history", data))
    with pytest.raises(UserError, match="takes its 2 examples from the split train, which has no file"):
        tasks.run_tasks(ftp(), {"hellaswag": task_data.find_files("hellaswag", data)}, num_fewshot=2)
    with pytest.raises(UserError, match="mmlu_anatomy: .*exceeds the 5 that are available\nGive a smaller"):
        tasks.run_tasks(ftp(), {"mmlu_anatomy": task_data.find_files("mmlu_anatomy", data)}, num_fewshot=6)
    with pytest.raises(UserError, match="Did you mean .*arc_easy"):
        tasks.run_tasks(ftp(), {"arc_eazy": None})
    with pytest.raises(UserError, match=r"out of reach for the tasks piqa(.|\n)*--task_data DIR"):
        tasks.run_tasks(ftp(), {"piqa": None})


# ---------------------------------------------------------------- generation


def generations(count=4):
    options = {"until": ["."], "do_sample": False, "max_gen_toks": 6}
    return [SimpleNamespace(args=(text(i % 3, 5 + 4 * (i % 3)), dict(options))) for i in range(count)]


def test_dense_generation_equals_hflm_and_asks_the_same_only_once(ftp, model, tokenizer, monkeypatch):
    hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    lm, rows = ftp(batch_size=2), []
    generate = lm._model_generate
    monkeypatch.setattr(lm, "_model_generate", lambda context, **k: rows.append(len(context)) or generate(context, **k))
    assert lm.generate_until(generations(), True) == hflm.generate_until(generations(), True)
    assert sum(rows) == 3 and len(lm.accounts) == 4


def test_what_is_sampled_is_drawn_for_every_request(ftp):
    options = {"until": [], "do_sample": True, "temperature": 3.0, "max_gen_toks": 12}
    requests = [SimpleNamespace(args=(text(0, 5), dict(options))) for _ in range(3)]
    assert len(set(ftp().generate_until(requests, True))) == 3


def test_pruned_generation_is_the_same_in_any_batch_and_has_accounts(ftp):
    lm = ftp(pruner=TokenPruner(StaticRouter(), SCHEDULE, kv="keep"))
    together = lm.generate_until(generations(), True)
    assert together == [lm.generate_until([request], True)[0] for request in generations()]
    assert all(account.sparsity > 0.2 and 0 < account.flops_cut < account.sparsity for account in lm.accounts)
    with pytest.raises(UserError, match="300 tokens are to be generated, the model takes 256"):
        lm.generate_until([SimpleNamespace(args=("a", {"max_gen_toks": 300}))], True)


def test_a_tokenizer_without_pad_and_an_empty_continuation(model):
    bare = load_tokenizer("embedded")
    bare.pad_token = None
    lm = FtpLM(model, tokenizer=bare, batch_size=3)
    assert len(lm.generate_until(generations(), True)) == 4
    for context in ("Once", ""):
        with pytest.raises(UserError, match="an empty continuation cannot be scored"):
            lm.loglikelihood([SimpleNamespace(args=(context, ""))], True)


# ---------------------------------------------------------------- accounts, answers, windows


def choices():
    return [SimpleNamespace(args=(text(i // 2, 30), " " + text(i, 3))) for i in range(6)]


def test_accounts_tell_what_a_decode_policy_skipped(ftp):
    shares = {}
    for decode in ("dense", "threshold"):
        lm = ftp(pruner=TokenPruner(RandomRouter(1), SCHEDULE, decode=decode))
        lm.loglikelihood(choices(), True)
        shares[decode] = [account.skipped for account in lm.accounts]
        lm.close()
    assert set(shares["dense"]) == {0.0} and 0.1 < sum(shares["threshold"]) / 6 < 0.9


def test_flops_cut_falls_with_the_continuation(ftp):
    lm = ftp(pruner=TokenPruner(StaticRouter(), SCHEDULE))
    lm.loglikelihood([SimpleNamespace(args=(text(0, 30), " " + text(1, n))) for n in (1, 20)], True)
    short, long = (account.flops_cut for account in lm.accounts)
    assert 0 < long < short < SCHEDULE.budget + 0.1


def test_answers_are_kept_by_content_and_not_asked_again(ftp, model, tmp_path, monkeypatch):
    lm = ftp(pruner=TokenPruner(StaticRouter(), SCHEDULE), answers=tmp_path)
    found = lm.loglikelihood(choices(), True)
    lm.close()
    (book,) = tmp_path.iterdir()
    book.write_bytes(book.read_bytes() + b'\n["0123", [-1.0, fal')  # a kill in the middle of a line
    other = ftp(pruner=TokenPruner(StaticRouter(), SCHEDULE), answers=tmp_path)
    monkeypatch.setattr(other, "_scored", None)
    assert other.loglikelihood(choices(), True) == found
    assert other.accounts == lm.accounts
    other.close()
    third = ftp(pruner=TokenPruner(StaticRouter(), Schedule([0.0, 0.5, 0.6])), answers=tmp_path)
    assert len(third.book) == 0  # another schedule is another pruner


def test_a_line_cut_by_a_kill_spoils_no_later_one(tmp_path):
    (tmp_path / "id.0.jsonl").write_bytes(b'["a", [1.0, true], 0.0, null, 0.0]\n["b", [2.')
    AnswerBook(tmp_path, "id").add({"c": Answer("text")})
    book = AnswerBook(tmp_path, "id", rank=1)
    assert (book.get("a").value, book.get("b"), book.get("c").value) == ((1.0, True), None, "text")


def test_a_long_chat_suffix_does_not_fill_the_attention_window(ftp, model, tokenizer):
    suffix = " so it was gone and so was the little dog that ran away" * 3
    tokenizer.chat_template = "{{ messages[-1]['content'] }}" + suffix
    try:
        lm = ftp(pruner=TokenPruner(StaticRouter(), SCHEDULE, window=8))
        templated = lm.apply_chat_template([{"role": "user", "content": text(1, 20)}])
    finally:
        tokenizer.chat_template = None
    assert templated.endswith(suffix)
    after = len(lm.tok_encode(suffix, add_special_tokens=False))
    assert after > 8 and lm.pruner.window == 8 + after
    assert len(lm.loglikelihood(choices(), True)) == 6 and lm.accounts[0].sparsity > 0.2  # in force, widened


@pytest.mark.parametrize(("mode", "leaks"), [("prompt", False), ("sequence", True)])
def test_later_tokens_move_earlier_ones_in_sequence_but_not_in_prompt(model, mode, leaks):
    """The leak: the same pruner and context, and choices that begin alike; what follows moves their first token."""
    score = continuation_logits if mode == "prompt" else sequence_logits
    context, endings = torch.arange(40) % 48, (torch.arange(5) + 50, torch.arange(20) + 100)
    with TokenPruner(StaticRouter(), SCHEDULE)(model), torch.no_grad():
        texts = [torch.cat([context, torch.tensor([7]), end])[None] for end in endings]
        one, two = (nll_per_token(score(model, ids, 40), ids[:, 40:])[0, 0].item() for ids in texts)
    assert (abs(one - two) > 1e-3) is leaks
