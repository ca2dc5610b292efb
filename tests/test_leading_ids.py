"""Texts begin as the tokenizer itself begins them: BOS where it adds one, nothing where it only has one."""

import random

import pytest
import torch
from real_models import needs_model
from tokenizers.processors import TemplateProcessing

from ftp_lightning.data.choices import recall_items
from ftp_lightning.data.long_tasks import long_items
from ftp_lightning.data.prompts import load_prompts
from ftp_lightning.data.stories import load_stories
from ftp_lightning.data.text import leading_ids, prompt_ids
from ftp_lightning.data.windows import calibration_windows
from ftp_lightning.evaluation.greedy import as_question
from ftp_lightning.models import load, load_tokenizer

STORIES = [story.text for story in load_stories("training")]
RECORD = '{"instruction": "Name a bird.", "output": "A wren."}\n'
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def tokenizer_of(kind: str):
    """The embedded tokenizer, which has BOS and EOS: one that adds nothing, BOS as it does, or both."""
    tokenizer = load_tokenizer("embedded")
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    single = {"nothing": "$A", "bos": f"{bos} $A", "both": f"{bos} $A {eos}"}[kind]
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("kind", ["nothing", "bos", "both"])
def test_a_prompt_is_what_the_tokenizer_makes_of_it_without_an_end(kind):
    tokenizer = tokenizer_of(kind)
    assert leading_ids(tokenizer) == ([] if kind == "nothing" else [tokenizer.bos_token_id])
    own = tokenizer("The old man.")["input_ids"]
    assert prompt_ids(tokenizer, "The old man.") == (own[:-1] if kind == "both" else own)


@pytest.mark.parametrize("kind", ["nothing", "bos"])
def test_rows_and_questions_have_bos_where_the_tokenizer_adds_it(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    bos, count = tokenizer.bos_token_id, int(kind == "bos")
    rows = calibration_windows(tokenizer, STORIES, 64, 16, 6, seed=0).input_ids.tolist()
    assert all(row[:1].count(bos) == row.count(bos) == count for row in rows)
    (tmp_path / "records.jsonl").write_text(RECORD)
    [example] = load_prompts(str(tmp_path / "records.jsonl"), "all", tokenizer).rows
    assert example.prompt.count(bos) == count and example.continuation[-1] == tokenizer.eos_token_id
    items = recall_items(tokenizer, STORIES, random.Random(0), 2, 64)
    items += long_items("multi_key_recall", tokenizer, STORIES, random.Random(0), 1, 96)
    for item in items:
        question, _ = as_question(tokenizer, item)
        assert question == tokenizer(item["context"])["input_ids"]
        assert tokenizer.bos_token not in item["context"]


def generated(command, tokenizer, monkeypatch, *flags) -> list[int]:
    """The prompt ids that `generate` gives the model."""
    model, _ = load("embedded")
    monkeypatch.setattr("ftp_lightning.models.load", lambda *_, **__: (model, tokenizer))
    given, forward = [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: given.append(k["input_ids"]) or forward(*a, **k))
    status, _, err = command("generate", "--prompt", "Where was the key?", "--max_new_tokens", 1, "--pairs", 1, *flags)
    assert status == 0, err
    return given[0][0].tolist()


@pytest.mark.parametrize("kind", ["nothing", "bos"])
def test_generate_feeds_what_transformers_feeds(kind, command, monkeypatch):
    tokenizer = tokenizer_of(kind)
    assert generated(command, tokenizer, monkeypatch) == tokenizer("Where was the key?")["input_ids"]


@pytest.mark.parametrize("kind", ["nothing", "bos"])
def test_special_tokens_of_a_template_come_once(kind, command, monkeypatch):
    tokenizer = tokenizer_of(kind)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE.replace("<s>", bos).replace("</s>", eos)
    ids = generated(command, tokenizer, monkeypatch, "--apply_chat_template=true")
    turns = [{"role": "user", "content": "Where was the key?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == text and ids.count(tokenizer.bos_token_id) == text.count(bos) == 2


@pytest.mark.parametrize(
    ("name", "adds"),
    [
        pytest.param("smollm2-135m-instruct", False, marks=needs_model("smollm2-135m-instruct")),
        pytest.param("gemma3-270m", True, marks=needs_model("gemma3-270m")),
    ],
)
def test_real_tokenizers(name, adds):
    tokenizer = load_tokenizer(name)
    assert leading_ids(tokenizer) == [tokenizer.bos_token_id][: int(adds)]
    assert prompt_ids(tokenizer, "The capital of France is") == tokenizer("The capital of France is")["input_ids"]
    rows = calibration_windows(tokenizer, STORIES, 128, 16, 4, seed=0).input_ids
    assert torch.equal(rows[:, 0] == tokenizer.bos_token_id, torch.full((4,), adds))
