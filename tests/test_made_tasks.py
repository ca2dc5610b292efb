"""Tasks whose rows are made here, and lm-eval's on local files, run through lm-eval on a tiny model."""

import json
from types import SimpleNamespace

import pytest
from ftp_models import ftp_models
from pandas import DataFrame
from tiny import random_llama

from ftp_lightning.data.task_names import GENERATED, LAST_WORD, READING, TWINNED
from ftp_lightning.evaluation.harness import made, results, tasks
from ftp_lightning.evaluation.harness.task_data import find_files
from ftp_lightning.evaluation.outcome import kept_cell
from ftp_lightning.models import load_tokenizer
from ftp_lightning.stages.inputs import check_questions
from ftp_lightning.stages.task_files import MAKERS, TaskFiles

ITEMS = 2


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture
def ftp(tokenizer):
    model = random_llama(len(tokenizer), num_key_value_heads=2, max_position_embeddings=1024)
    with ftp_models(model, tokenizer) as make:
        yield make


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def files(tmp_path, tokenizer):
    """The rows of every task that is made here, but those with choices."""
    question = {"question": "Who keeps it?", "context": "A house stood there. " * 20}
    records = [question | {"id": i, "article": i, "answers": [f"Keeper{i}"]} for i in range(6)]
    write(tmp_path / "squad.jsonl", [row | {"context": row["context"] + row["answers"][0]} for row in records])
    settings = SimpleNamespace(
        data="embedded", chosen_split="all", seed=0, prompt_tokens=600, items=ITEMS, task_data=str(tmp_path),
        apply_chat_template=False, model="embedded", tasks=(*GENERATED, LAST_WORD),
    )  # fmt: skip
    return TaskFiles(settings, tokenizer)


def test_every_task_runs_with_its_twin_and_has_its_metrics(ftp, files):
    lm = ftp()
    with files.named(with_deleted=True) as named:
        found = tasks.run_tasks(lm, named)
    assert set(found) == {*GENERATED, LAST_WORD} | {f"{task}_deleted" for task in (*GENERATED, LAST_WORD)}
    for task, summary in found.items():
        base = task.removesuffix("_deleted")
        metric = "acc" if base == LAST_WORD else "f1" if base in READING else "string_match"
        told = [(item["metric"], item["truncated"]) for item in summary["items"]]
        assert told == [(metric, 0)] * ITEMS and summary["chance"] == 0.0
        field = "context_deleted" if task.endswith("_deleted") else "context"
        rows = files.rows[base]
        for row, item in zip(rows, summary["items"], strict=True):
            assert (item["id"], item["document"], item["distance"]) == (row["id"], row["document"], row["distance"])
            [asked] = [account for account in lm.accounts if account.request[0].startswith(row[field])][:1]
            assert asked.prompt_tokens <= row["tokens"] <= 600
            if base in GENERATED:
                assert asked.request[1]["max_gen_toks"] == max(row["new_tokens"] for row in rows)
        assert max(item["prompt_tokens"] for item in summary["items"]) <= max(row["tokens"] for row in rows)
    assert set(found["squad"]["metrics"]) == {"exact_match", "f1", "contains"}
    assert set(found["ruler_qa"]["metrics"]) == {"string_match", "contains"}
    assert set(found[LAST_WORD]["metrics"]) == {"acc", "perplexity"}


def test_the_longest_prompt_has_the_tokens_that_were_counted(ftp, files):
    lm = ftp()
    for task in ("ruler_niah_single", "ruler_cwe", "squad"):
        lm.accounts.clear()
        with files.named(with_deleted=True) as named:
            tasks.run_tasks(lm, {name: named[name] for name in (task, f"{task}_deleted")})
        found = {account.request[0]: account.prompt_tokens for account in lm.accounts}
        for row in files.rows[task]:
            counts = [
                max(n for text, n in found.items() if text.startswith(row[f])) for f in ("context", "context_deleted")
            ]
            assert max(counts) == row["tokens"]


def test_every_maker_has_a_definition_and_every_twin_a_field():
    assert {f"{name}_deleted" for name in TWINNED} | set(MAKERS) == set(made.CONTEXTS)


def test_rows_longer_than_the_model_are_refused(files, tokenizer):
    config = random_llama(len(tokenizer), max_position_embeddings=300).config
    with pytest.raises(made.UserError, match="passages with their question(.|\n)*--prompt_tokens"):
        check_questions(config, tokenizer, files.rows["ruler_niah_single"])


def test_generated_answers_are_scored_by_lm_evals_functions():
    doc = {"outputs": ["1234567", "7654321"]}
    assert made.all_scores(doc, ["1234567 and 999."]) == {"string_match": 0.5}
    assert made.part_scores({"outputs": ["The Nile"]}, ["the nile."]) == {"string_match": 1.0, "contains": 1.0}
    gold = {"outputs": ["the river Nile", "Nile"]}
    assert made.reading_scores(gold, [" The Nile."]) == {"exact_match": 1.0, "f1": 1.0, "contains": 1.0}
    assert made.reading_scores(gold, ["the blue nile"]) == {
        "exact_match": 0.0, "f1": pytest.approx(2 / 3), "contains": 1.0,
    }  # fmt: skip
    assert made.reading_scores(gold, ["a lake"]) == {"exact_match": 0.0, "f1": 0.0, "contains": 0.0}


@pytest.mark.parametrize(
    ("task", "values", "right"),
    [
        ("ruler_niah_multivalue", {"string_match": 0.75}, False),
        ("ruler_niah_multivalue", {"string_match": 1.0}, True),
        ("squad", {"exact_match": 0.0, "f1": 0.4, "contains": 1.0}, True),
        ("squad_long_deleted", {"exact_match": 0.0, "f1": 0.9, "contains": 0.0}, False),
        ("ruler_qa", {"string_match": 0.5, "contains": 1.0}, True),
    ],
)
def test_what_makes_an_answer_right(task, values, right):
    sample = {"doc_id": 0, "doc": {}, "arguments": [["a", {}]], "filtered_resps": ["x"], "target": "x", **values}
    [item] = results.summaries({"samples": {task: [sample]}, "results": {}}, [task], [])[task]["items"]
    assert item["right"] is right


def test_kept_is_told_of_tasks_whose_answer_has_no_place():
    rows = {"right": [True, False, False], "dense_right": [True, True, False], "needed": [True, True, False]}
    about = {"document": [0, 1, 2], "seed": 0, "distance": None, "task": "x", "item": [0, 1, 2]}
    cell = kept_cell(DataFrame(rows | about))
    assert (cell["share"], cell["items"], "by_distance" in cell) == (0.5, 2, False)


# ---------------------------------------------------------------- lm-eval's own, on the Hub's schema

LETTERS = {"text": list("wxyz"), "label": list("ABCD")}
ARC = {"id": "a", "question": "What is it?", "choices": LETTERS, "answerKey": "A"}
HUB = {
    "boolq_validation": {"passage": "A dog ran.", "question": "did a dog run", "idx": 0, "label": 1},
    "piqa_validation": {"goal": "Eat soup", "sol1": "Use a spoon", "sol2": "Use a knife", "label": 0},
    "openbookqa_test": {"id": "7-980", "question_stem": "The sun is", "choices": LETTERS, "answerKey": "A"},
    "lambada_openai_test": {"text": "The old man saw the dog"},
    "lambada_standard_test": {"text": "the old man saw the dog"},
    "arc_easy_test": ARC | {"choices": {"text": list("wxyz"), "label": list("1234")}, "answerKey": "1"},
    "arc_challenge_test": ARC,
    "hellaswag_validation": {
        "ind": 3, "activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "then he", "ctx": "x",
        "endings": ["eats", "runs", "sits", "goes"], "label": "0",
    },
    "winogrande_validation": {"sentence": "A cat saw _ was big.", "option1": "cat", "option2": "dog", "answer": "1"},
}  # fmt: skip
ASKED = {
    "boolq": (("A dog ran.\nQuestion: did a dog run?\nAnswer:", " no"), "acc", 0.5),
    "piqa": (("Question: Eat soup\nAnswer:", " Use a spoon"), "acc_norm", 0.5),
    "openbookqa": (("The sun is", " w"), "acc_norm", 0.25),
    "lambada_openai": (("The old man saw the", " dog"), "acc", 0.0),
    "lambada_standard": (("the old man saw the", " dog"), "acc", 0.0),
    "arc_easy": (("Question: What is it?\nAnswer:", " w"), "acc_norm", 0.25),
    "arc_challenge": (("Question: What is it?\nAnswer:", " w"), "acc_norm", 0.25),
    "hellaswag": (("Cooking: A man cooks. Then he", " eats"), "acc_norm", 0.25),
    "winogrande": (("A cat saw cat", " was big."), "acc", 0.5),
}
"""Task -> its first request, the metric, and chance."""


def test_definitions_of_lm_eval_run_on_the_hubs_schema(ftp, tmp_path):
    for name, row in HUB.items():
        write(tmp_path / f"{name}.jsonl", [row, row])
    lm = ftp()
    found = tasks.run_tasks(lm, {task: find_files(task, tmp_path) for task in ASKED})
    requests = {account.request for account in lm.accounts}
    for task, (request, metric, chance) in ASKED.items():
        summary = found[task]
        assert request in requests
        assert ([item["metric"] for item in summary["items"]], summary["chance"]) == ([metric] * 2, chance)
    assert "perplexity" in found["lambada_openai"]["metrics"]


def test_a_row_without_a_field_of_the_hubs_schema_is_told_of(tmp_path):
    for name, row in HUB.items():
        task = name.rpartition("_")[0]
        needed = tasks.declared(task).needs
        assert needed and set(needed) <= set(row)
        write(tmp_path / f"{name}.jsonl", [{key: value for key, value in row.items() if key != needed[0]}])
        with pytest.raises(made.UserError, match=f"{task}: .*line 1 has no {needed[0]}"):
            tasks.local_task(task, find_files(task, tmp_path))
