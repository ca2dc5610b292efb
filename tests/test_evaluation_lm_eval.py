"""The lm-eval model `ftp` and its tasks: order, grouping, accounts, and errors a user can act on."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from ftp_models import ftp_models
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tiny import random_llama

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.harness import made, tasks
from ftp_lightning.evaluation.harness import results as task_results
from ftp_lightning.evaluation.harness.model import FtpLM
from ftp_lightning.evaluation.scoring import rolling_windows
from ftp_lightning.models import load_tokenizer
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing.static import StaticRouter
from ftp_lightning.schedule import Schedule

SCHEDULE = Schedule([0.0, 0.5, 0.7])
STORY = "The old man walked to the river and looked for his boat. It was gone, and so was the little dog that"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_llama(len(tokenizer), num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=512)


@pytest.fixture
def ftp(model, tokenizer):
    with ftp_models(model, tokenizer) as make:
        yield make


def pruner(**options):
    return TokenPruner(StaticRouter(), SCHEDULE, **options)


def request(*texts):
    return SimpleNamespace(args=texts)


def requests():
    contexts = (STORY, "Once", STORY[:40], "")
    return [
        request(context, choice) for choice in (" ran away.", " cat", " and then she smiled") for context in contexts
    ]


def answers(lm, items=None):
    return lm.loglikelihood(items or requests(), disable_tqdm=True)


def assert_same(one, other):
    assert [score for score, _ in one] == pytest.approx([score for score, _ in other], abs=1e-4)
    assert [greedy for _, greedy in one] == [greedy for _, greedy in other]


def test_importing_evaluation_registers_ftp_and_keeps_lm_evals_own():
    program = (
        "import sys, ftp_lightning.evaluation, ftp_lightning.evaluation.statistics\n"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules\n"
        "from lm_eval.api.registry import model_registry\n"
        "assert 'ftp' in model_registry and 'hf' in model_registry"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert get_model("ftp") is FtpLM


@pytest.mark.parametrize("mode", ["prompt", "sequence"])
def test_dense_equals_hflm(ftp, model, tokenizer, mode):
    assert_same(answers(ftp(mode=mode)), answers(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)))


@pytest.mark.parametrize("mode", ["prompt", "sequence"])
def test_pruned_grouping_and_order_equal_one_by_one(ftp, mode):
    lm = ftp(pruner=pruner(), mode=mode)
    together = answers(lm)
    assert_same(together, [answers(lm, [item])[0] for item in requests()])
    backwards = answers(lm, requests()[::-1])[::-1]
    assert_same(together, backwards)


def test_contexts_are_cut_from_the_left_as_lm_eval_does(ftp, model, tokenizer):
    hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=12)
    lm = ftp(max_length=12)
    assert_same(answers(lm), answers(hflm))
    for account in lm.accounts:
        whole = len(tokenizer(account.request[0] + account.request[1])["input_ids"]) if account.request[0] else 0
        assert account.truncated == max(0, whole - 13)
        assert account.prompt_tokens + account.continuation_tokens <= 13
    assert any(account.truncated for account in lm.accounts)
    with pytest.raises(UserError, match="the model takes 2"):
        answers(ftp(max_length=2))


def test_accounts_say_what_was_realised(ftp):
    lm = ftp(pruner=pruner())
    answers(lm)
    assert [account.request for account in lm.accounts] == [item.args for item in requests()]
    for account in lm.accounts:
        length = account.prompt_tokens
        kept = [max(min(2, length), length - round(s * length)) if s else length for s in SCHEDULE.sparsity]
        assert account.sparsity == pytest.approx(1 - sum(kept) / (3 * length))
        assert account.exercised is (account.sparsity >= SCHEDULE.budget / 2)
    assert {account.exercised for account in lm.accounts} == {True, False}  # "Once" is too short to be pruned


def test_answers_reach_lm_evals_cache(ftp):
    lm, seen = ftp(), []
    lm.cache_hook = SimpleNamespace(add_partial=lambda *entry: seen.append(entry))
    assert seen_answers(seen, answers(lm)) == [("loglikelihood", item.args) for item in requests()]


def seen_answers(seen, results):
    assert [entry[2] for entry in seen] == results
    return [entry[:2] for entry in seen]


def test_rolling_is_the_sum_over_its_windows(ftp):
    lm = ftp(prompt_tokens=9, continuation_tokens=4, pruner=pruner())
    total = lm.loglikelihood_rolling([request(STORY), request("Yes."), request("")], disable_tqdm=True)
    windows = rolling_windows(lm.tok_encode(STORY), lm.prefix_token_id, 9, 4)
    alone = [lm._loglikelihood_tokens([(None, *window)], True)[0][0] for window in windows]
    assert len(windows) > 3 and total[0] == pytest.approx(sum(alone), abs=1e-4)
    assert total[1] < 0 and total[2] == 0.0


def test_dense_rolling_within_one_prompt_is_the_likelihood_of_the_text(ftp, model):
    lm = ftp(prompt_tokens=500, continuation_tokens=6)
    text = [token for token in lm.tok_encode(STORY) if token != lm.prefix_token_id]
    tokens = torch.tensor([[lm.prefix_token_id, *text]])
    with torch.no_grad():
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
    whole = logprobs.gather(1, tokens[0, 1:, None]).sum().item()
    assert lm.loglikelihood_rolling([request(STORY)], disable_tqdm=True) == [pytest.approx(whole, abs=1e-3)]


def test_saved_pruner_by_folder_with_its_base(tmp_path, ftp):
    trained = TokenPruner(StaticRouter(), Schedule([0.0, *[0.5] * 11]))
    trained.save(tmp_path / "pruned", base="embedded")
    lm = FtpLM(pruned=tmp_path / "pruned", dtype="float32", device="cpu", batch_size=2)
    assert lm.pruner.schedule == trained.schedule and lm.model.dtype == torch.float32
    answers(lm, requests()[:2])
    assert lm.accounts[0].sparsity > 0.4


def test_impossible_options_are_refused(tmp_path, ftp):
    with pytest.raises(UserError, match="mode is 'both'"):
        ftp(mode="both")
    with pytest.raises(UserError, match="decode is 'backwards'"):
        ftp(pruner=pruner(), decode="backwards")
    with pytest.raises(UserError, match="both `pruned` and `pruner`"):
        ftp(pruner=pruner(), pruned=tmp_path)


# ---------------------------------------------------------------- tasks


@pytest.fixture
def recall(tmp_path):
    rows = [
        {
            "id": f"r{i}",
            "context": STORY + " ran" * i,
            "context_deleted": "It",
            "choices": [" away", " home"],
            "answer": i % 2,
            "kind": "name",
            "distance": i,
            "document": f"d{i // 2}",
        }
        for i in range(5)
    ]
    path = tmp_path / "recall.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_embedded_tasks_score_the_right_context(ftp, recall):
    lm = ftp(pruner=pruner())
    results = tasks.run_tasks(lm, {"story_recall": recall, "story_recall_deleted": recall})
    assert list(results) == ["story_recall", "story_recall_deleted"]
    contexts = {account.request[0] for account in lm.accounts}
    assert contexts == {"It", *(STORY + " ran" * i for i in range(5))}
    for result in results.values():
        items = result["items"]
        assert [item["id"] for item in items] == [f"r{i}" for i in range(5)]
        assert [item["distance"] for item in items] == list(range(5))
        assert result["chance"] == 0.0 and {item["metric"] for item in items} == {"exact_match"}
        assert sum(item["acc"] for item in items) / 5 == result["metrics"]["acc"]
        assert all(item["score"] == item["exact_match"] == item["right"] for item in items)
    exercised = {task: {item["exercised"] for item in result["items"]} for task, result in results.items()}
    assert exercised == {"story_recall": {True}, "story_recall_deleted": {False}}


def test_exact_match_is_the_greedy_gold(ftp, recall, model, tokenizer):
    with torch.no_grad():
        best = tokenizer.decode(model(torch.tensor([tokenizer(STORY)["input_ids"]])).logits[0, -1].argmax())
    row = {"id": "x", "context": STORY, "choices": [" zebra", best], "answer": 1}
    recall.write_text(json.dumps(row) + "\n" + json.dumps(row | {"answer": 0}) + "\n")
    if tokenizer(STORY + best)["input_ids"][: len(tokenizer(STORY)["input_ids"])] != tokenizer(STORY)["input_ids"]:
        pytest.skip("the greedy token merges with the context")
    results = tasks.run_tasks(ftp(), {"story_recall": recall, "story_ending": recall})
    right = {task: [item["right"] for item in summary["items"]] for task, summary in results.items()}
    likeliest = [bool(item["acc"]) for item in results["story_ending"]["items"]]
    assert right == {"story_recall": [True, False], "story_ending": likeliest}


def test_right_is_the_likeliest_choice_except_where_a_fact_is_asked_for():
    sample = {
        "doc_id": 0, "doc": {}, "arguments": [("c", " a")], "filtered_resps": [0] * 4, "filter": "none",
        "acc": 1.0, "exact_match": 0.0,
    }  # fmt: skip
    log = {task: [sample] for task in ("story_recall", "story_recall_deleted", "story_ending", "arc_easy")}
    summary = task_results.summaries({"results": {}, "samples": log}, list(log), accounts=[])
    assert [summary[task]["items"][0]["right"] for task in log] == [False, False, True, True]


def test_lm_eval_describes_neither_checkout_nor_machine(ftp, recall, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # outside a checkout git complains
    tasks.run_tasks(ftp(), {"story_recall": recall}, limit=1)
    assert "fatal" not in capfd.readouterr().err


def test_half_a_character_is_named_with_its_line(recall):
    recall.write_text(recall.read_text() + '{"context": "\\ud800", "choices": [], "answer": 0}\n')
    with pytest.raises(UserError, match="line 6 holds half a character"):
        made.made_task("story_recall", recall)


def test_limit(ftp, recall):
    assert tasks.run_tasks(ftp(), {"story_name": recall}, limit=2)["story_name"]["items"][2:] == []


def test_broken_rows_are_named(recall):
    recall.write_text(recall.read_text() + '{"context": "no choices", "answer": 0}\n')
    with pytest.raises(UserError, match="line 6 has no choices"):
        made.made_task("story_recall", recall)
    recall.write_text("[1]\nnonsense\n")
    with pytest.raises(UserError, match="line 1 is not a JSON object"):
        made.made_task("story_recall", recall)
    with pytest.raises(UserError, match="cannot be read"):
        made.made_task("story_recall", recall.with_name("absent"))
    with pytest.raises(UserError, match="Did you mean story_recall"):
        made.made_task("story_recal", recall)


def test_group_of_one_overrides_the_data_of_a_known_task(recall):
    with pytest.raises(UserError, match="line 1 has no question, answerKey"):
        tasks.local_task("arc_easy", recall)
    definition = tasks.local_task("arc_hard", recall)
    assert definition["group"] == "local_arc_hard"
    row = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"}
    recall.write_text(json.dumps(row))
    definition = tasks.local_task("arc_easy", recall)
    assert definition["task"][0]["task"] == "arc_easy"
    assert set(definition["task"][0]["dataset_kwargs"]["data_files"].values()) == {str(recall.resolve())}


def test_summaries_pool_a_group_and_leave_missing_metrics_blank():
    def sample(i, acc):
        return {
            "doc_id": i,
            "doc": {},
            "arguments": [("c", " a")],
            "filtered_resps": [0] * 4,
            "filter": "none",
            "acc": acc,
        }

    results = {
        "results": {"m_a": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "a"}, "m_b": {}, "m": {}},
        "samples": {"m_a": [sample(0, 1.0), sample(1, 0.0)], "m_b": [sample(0, 1.0)] * 2},
        "group_subtasks": {"m": ["m_part"], "m_part": ["m_a", "m_b"]},
    }
    summary = task_results.summaries(results, ["m"], accounts=[])
    pooled = summary["m"]["items"]
    assert [item["acc"] for item in pooled] == [1.0, 0.0, 1.0, 1.0] and summary["m"]["chance"] == 0.25
    assert summary["m_a"]["metrics"] == {"acc": 0.5}
    assert {item["exact_match"] for item in pooled} == {item["exercised"] for item in pooled} == {None}
