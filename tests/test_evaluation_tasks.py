"""lm-eval's own tasks from local files: data in the Hub's schema, declared metrics, generation, resumption, leaks."""

import json
from types import SimpleNamespace

import pytest
import torch
from ftp_models import ftp_models
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tiny import random_llama

from ftp_lightning.costs.flops import block_costs, continuation_flops, head_flops
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits, nll_per_token, sequence_logits
from ftp_lightning.evaluation.harness import accounts, results, task_data, tasks
from ftp_lightning.evaluation.harness.accounts import Answer
from ftp_lightning.evaluation.harness.answers import AnswerBook
from ftp_lightning.evaluation.harness.index import task_manager
from ftp_lightning.evaluation.harness.model import FtpLM
from ftp_lightning.models import load_tokenizer
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.routing import RandomRouter, StaticRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.search.accuracy import task_items

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
            {"subject": s, "question": f"{split} {text(i, 9)}", "choices": ["w\u2028", "x", "y", "z"], "answer": i % 4}
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
    assert [len(ours[task]["items"]) for task in FIVE] == [5, 5, 4, 6, 2]
    metrics = ["acc_norm", "acc_norm", "acc_norm", "acc", "acc"]
    assert [{item["metric"] for item in ours[task]["items"]} for task in FIVE] == [{metric} for metric in metrics]
    assert {"mmlu_anatomy", "mmlu_virology"} < set(ours)
    for task in FIVE:
        for a, b in zip(ours[task]["items"], theirs[task]["items"], strict=True):
            assert a["answers"] == pytest.approx(b["answers"], abs=1e-4)
            assert (a["score"], a["hash"]) == (b["score"], b["hash"])
    mmlu, easy = ([item["prompt_tokens"] for item in ours[task]["items"]] for task in ("mmlu", "arc_easy"))
    assert sum(mmlu) / len(mmlu) > 4 * sum(easy) / len(easy)  # five examples before each item
    assert ours["mmlu"]["chance"] == 1 / 4  # few items show no favourite letter
    assert not any(item["truncated"] for item in ours["mmlu"]["items"])


def test_files_that_are_missing_or_wrong_are_told_of(ftp, data):
    with pytest.raises(UserError, match=r"holds no piqa.jsonl\n.*TASK_SPLIT.jsonl"):
        task_data.find_files("piqa", data)
    with pytest.raises(UserError, match="no subject 'history'\nThey hold anatomy, virology"):
        tasks.local_task("mmlu_history", task_data.find_files("mmlu_history", data))
    with pytest.raises(UserError, match="takes its 2 examples from the split train, which has no file"):
        tasks.run_tasks(ftp(), {"hellaswag": task_data.find_files("hellaswag", data)}, num_fewshot=2)
    with pytest.raises(
        UserError, match="mmlu_anatomy: 6 examples are asked for, and 5 rows differ from the asked one\nGive"
    ):
        tasks.run_tasks(ftp(), {"mmlu_anatomy": task_data.find_files("mmlu_anatomy", data)}, num_fewshot=6)
    with pytest.raises(UserError, match="Did you mean .*arc_easy"):
        tasks.run_tasks(ftp(), {"arc_eazy": None})
    with pytest.raises(UserError, match=r"out of reach for the tasks piqa(.|\n)*--task_data DIR"):
        tasks.run_tasks(ftp(), {"piqa": None})


# ---------------------------------------------------------------- few-shot examples


def contexts(files, count=None):
    """Per request of each task: the asked question, and the text before it."""
    found = []
    for task in tasks.load_tasks(files, count):
        task.build_all_requests()
        found += [(i.doc["question"], i.args[0]) for i in task.instances]
    return found


def test_examples_never_hold_the_asked_row_where_one_file_serves_all_splits(tmp_path):
    rows = [
        {"question": f"Is {i} odd?", "subject": "anatomy", "choices": list("wxyz"), "answer": i % 4} for i in range(8)
    ]
    write(tmp_path / "mmlu.jsonl", rows)
    arc = [
        {
            "id": str(i),
            "question": f"What is ball {i}?",
            "choices": {"text": list("wxyz"), "label": list("ABCD")},
            "answerKey": "A",
        }
        for i in range(8)
    ]
    write(tmp_path / "arc_easy.jsonl", arc)
    for name, count in (("mmlu", None), ("arc_easy", 5)):
        asked = contexts({name: task_data.find_files(name, tmp_path)}, count)
        assert len(asked) == 32
        for question, text_before in asked:
            assert text_before.count("Answer:") == 6 and text_before.count(question) == 1
    with pytest.raises(UserError, match="arc_easy: 8 examples are asked for, and 7 rows differ"):
        contexts({"arc_easy": task_data.find_files("arc_easy", tmp_path)}, 8)


def test_a_row_that_differs_in_its_id_alone_is_no_example(tmp_path):
    row = {"question": "Is it odd?", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "A"}
    write(tmp_path / "arc_easy_test.jsonl", [row | {"id": "test"}])
    write(
        tmp_path / "arc_easy_train.jsonl",
        [row | {"id": f"train{i}"} for i in range(5)] + [row | {"question": "Why?", "id": "other"}],
    )
    for _, text_before in contexts({"arc_easy": task_data.find_files("arc_easy", tmp_path)}, 1):
        assert text_before.startswith("Question: Why?") and text_before.count("Is it odd?") == 1


def test_a_row_that_asks_the_same_in_other_words_order_is_no_example(tmp_path):
    """Choices in another order, hence another letter; another case and spacing."""
    row = {"question": "Is it odd?", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "A"}
    turned = row | {"choices": {"text": list("zyxw"), "label": list("ABCD")}, "answerKey": "D"}
    write(tmp_path / "arc_easy_test.jsonl", [row])
    write(
        tmp_path / "arc_easy_train.jsonl",
        [turned] * 20 + [turned | {"question": " is it  ODD?"}] * 20 + [row | {"question": "Why?"}],
    )
    for _, text_before in contexts({"arc_easy": task_data.find_files("arc_easy", tmp_path)}, 1):
        assert text_before.startswith("Question: Why?") and text_before.lower().count("odd?") == 1


def test_examples_are_those_that_lm_eval_draws_by_default(ftp, model, tokenizer, tmp_path):
    for split, count in (("test", 2), ("train", 40)):
        arc = [
            {
                "id": f"{split}{i}",
                "question": f"{split} {i}?",
                "choices": {"text": list("wxyz"), "label": list("ABCD")},
                "answerKey": "A",
            }
            for i in range(count)
        ]
        write(tmp_path / f"arc_easy_{split}.jsonl", arc)
    files = task_data.find_files("arc_easy", tmp_path)
    task, manager = tasks.local_task("arc_easy", files, tmp_path), task_manager(["arc_easy"])
    theirs = simple_evaluate(ftp(), tasks=[task], num_fewshot=3, bootstrap_iters=0, task_manager=manager)
    seen = [sample["arguments"][0][0] for sample in theirs["samples"]["arc_easy"]]
    assert [text_before for _, text_before in contexts({"arc_easy": files}, 3)][::4] == seen


def test_a_search_asks_with_the_examples_of_the_evaluation(data):
    items = task_items("mmlu", task_data.find_files("mmlu", data))
    assert items and all(item.requests[0].args[0].count("Answer:") == 6 for item in items)


# ---------------------------------------------------------------- what a score stands on


def sample(doc_id, choices, gold, right):
    arguments = [[f"question {doc_id}", choice] for choice in choices]
    answers = [[0.0, False]] * len(choices)
    return {
        "doc_id": doc_id,
        "doc": {},
        "arguments": arguments,
        "filtered_resps": answers,
        "target": gold,
        "acc": right,
    }


def test_chance_is_the_share_of_the_most_frequent_label_where_all_choose_between_the_same():
    same = [sample(i, [" no", " yes"], int(i < 30), 1.0) for i in range(40)]
    other = [sample(i, [f" a{i}", f" b{i}"], 0, 1.0) for i in range(40)]
    found = results.summaries({"samples": {"boolq": same, "piqa": other}, "results": {}}, ["boolq", "piqa"], [])
    assert (found["boolq"]["chance"], found["piqa"]["chance"]) == (0.75, 0.5)


def test_chance_is_that_of_all_documents_of_a_task_however_few_are_asked(ftp, tmp_path):
    rows = [{"passage": text(i, 4), "question": text(i, 3), "label": int(i % 4 > 0), "idx": i} for i in range(40)]
    write(tmp_path / "boolq_validation.jsonl", rows)
    found = tasks.run_tasks(ftp(), {"boolq": task_data.find_files("boolq", tmp_path)}, limit=3)["boolq"]
    assert (len(found["items"]), found["chance"]) == (3, 0.75)


def test_items_and_documents_of_a_group_have_ids_of_their_own():
    logs = {name: [sample(i, [" a", " b"], 0, 1.0) for i in range(3)] for name in ("mmlu_x", "mmlu_y")}
    for log in logs.values():
        log[0]["doc"] = {"document": 7}
    tree = {"samples": logs, "results": {}, "group_subtasks": {"mmlu": list(logs)}}
    items = results.summaries(tree, ["mmlu"], [])["mmlu"]["items"]
    assert [item["id"] for item in items] == [f"{name}/{i}" for name in logs for i in range(3)]
    assert [item["document"] for item in items] == ["mmlu_x/7", None, None, "mmlu_y/7", None, None]


def test_a_request_is_exercised_where_half_the_budget_was_realised(ftp):
    lm = ftp(pruner=TokenPruner(StaticRouter(), SCHEDULE))  # a budget of 0.4
    for sparsity in (0.0, 0.11, 0.19, 0.21, 0.4):
        lm._account(None, 10, 1, 0, Answer("x", sparsity))
    assert [account.exercised for account in lm.accounts] == [False, False, False, True, True]


def test_evict_is_charged_for_the_entries_it_keeps_in_the_cache(model):
    """Kept entries counted by hand: 6, 3 and 2 of 6 tokens; under `keep` all of them."""
    real = torch.ones(1, 6, dtype=torch.bool)
    masks = [torch.tensor([[True] * kept + [False] * (6 - kept)]) for kept in (6, 3, 2)]
    parts = {"keep": masks, "keep_attention": masks, "keep_mlp": masks, "real": real}
    costs = block_costs(model)
    for kv, held in (("evict", (6, 3, 2)), ("keep", (6, 6, 6))):
        pruner = TokenPruner(StaticRouter(), SCHEDULE, kv=kv)
        pruner.ambient.last = Trace(**parts, prompt=Trace(**parts)), []
        [prompt] = accounts.realised_rows(model, pruner, [[0, 5]])
        alone, longer = prompt.spent
        after = continuation_flops(costs, 6, 5, held, head_flops(model))
        assert longer.flops - alone.flops == pytest.approx(after) and longer.kv_bytes == alone.kv_bytes
        assert alone.kv_bytes / alone.dense_kv_bytes == pytest.approx(sum(held) / 18)


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


def test_an_answer_costs_the_same_alone_and_beside_a_longer_one(ftp):
    lm = ftp(pruner=TokenPruner(StaticRouter(), SCHEDULE))
    generate = lm._model_generate
    texts = [text(0, 30), text(1, 29)]
    first = lm.tok_decode(
        generate(context=torch.tensor([lm.tok_encode(texts[0])]), max_length=60, stop=[])[0, -20:].tolist()
    )
    options = {"until": [first.split()[1]], "do_sample": False, "max_gen_toks": 20}
    requests = [SimpleNamespace(args=(one, options)) for one in texts]
    for request in requests:
        lm.generate_until([request], True)
    lm.generate_until(requests, True)
    alone, together = lm.accounts[:2], lm.accounts[2:]
    assert [a.flops_cut for a in alone] == pytest.approx([a.flops_cut for a in together], abs=1e-12)
    assert alone[0].continuation_tokens < alone[1].continuation_tokens


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


def test_the_first_words_of_an_answer_do_not_widen_the_attention_window(ftp, tokenizer):
    after = " so it was gone so it was gone "
    between = f"{{% if not loop.last %}}{after}{{% endif %}}"
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ m['content'] }}}}{between}{{% endfor %}}"
    messages = [{"role": "user", "content": text(1, 20)}, {"role": "assistant", "content": "The answer is"}]
    try:
        lm = ftp(pruner=TokenPruner(StaticRouter(), SCHEDULE, window=8))
        lm.apply_chat_template(messages, add_generation_prompt=False)
    finally:
        tokenizer.chat_template = None
    assert lm.pruner.window == 8 + len(lm.tok_encode(after, add_special_tokens=False))


def test_a_chat_template_is_told_the_same_day_every_day(ftp, tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    try:
        templated = ftp().apply_chat_template([{"role": "user", "content": "hello"}])
    finally:
        tokenizer.chat_template = None
    assert templated == "26 Jul 2024 hello"


@pytest.mark.parametrize(("mode", "leaks"), [("prompt", False), ("sequence", True)])
def test_later_tokens_move_earlier_ones_in_sequence_but_not_in_prompt(model, mode, leaks):
    """The leak: the same pruner and context, and choices that begin alike; what follows moves their first token."""
    score = continuation_logits if mode == "prompt" else sequence_logits
    context, endings = torch.arange(40) % 48, (torch.arange(5) + 50, torch.arange(20) + 100)
    with TokenPruner(StaticRouter(), SCHEDULE)(model), torch.no_grad():
        texts = [torch.cat([context, torch.tensor([7]), end])[None] for end in endings]
        one, two = (nll_per_token(score(model, ids, 40), ids[:, 40:])[0, 0].item() for ids in texts)
    assert (abs(one - two) > 1e-3) is leaks
