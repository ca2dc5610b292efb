"""Prompts: prompt and answer of a record, its split, what is left out; random prompt lengths."""

import copy
import itertools
import json
import random

import pytest
import torch

from ftp_lightning.data.module import RowsData, random_split
from ftp_lightning.data.prompts import load_prompts, sampled_prompts
from ftp_lightning.data.records import alpaca_prompt, record_text
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.data.sources import load_documents, split_of
from ftp_lightning.data.stories import SPLITS
from ftp_lightning.errors import UserError
from ftp_lightning.models import load_tokenizer

TOKENIZER = load_tokenizer("embedded")
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def templated(template=TEMPLATE):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def alpaca(number=0, **changes):
    return {"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} | changes


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def written(folder, records, name="d.jsonl"):
    lines = name.endswith("l")
    (folder / name).write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return str(folder / name)


def read(folder, records, tokenizer=TOKENIZER, split="all", **limits):
    return load_prompts(written(folder, records), split, tokenizer, **limits)


def words(ids):
    return TOKENIZER.decode(ids)


def encoded(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("given", ["", "1 2"])
def test_an_instruction_is_prompt_and_response(tmp_path, given):
    record = alpaca(input=given)
    (row,) = read(tmp_path, [record]).rows
    assert row.prompt == [BOS, *encoded(alpaca_prompt(record))]
    assert words(row.prompt[1:]).endswith("### Response:\n")
    assert row.continuation == [*encoded("It is 0."), EOS]


def test_a_field_text_beside_an_instruction_gives_the_split_alone(tmp_path):
    record = alpaca(text="All of it as one text, which is what a document reads.")
    (row,) = read(tmp_path, [record]).rows
    assert words(row.continuation[:-1]) == record["output"]
    twenty = [alpaca(i, text=f"Text {i % 25}") for i in range(50)]  # each text twice: as documents they count once
    assert len(read(tmp_path, twenty)) == 25


CHAT = chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "And now?"), ("assistant", "Bye."))


def test_a_chat_without_template_is_its_document_cut_after_the_answering_role(tmp_path):
    (row,) = read(tmp_path, [CHAT]).rows
    prompt, response = words(row.prompt[1:]), words(row.continuation[:-1])
    assert prompt + response == record_text(CHAT)
    assert prompt.endswith("user: And now?\n\nassistant:") and response == " Bye."
    assert (row.prompt[0], row.continuation[-1]) == (BOS, EOS)


def test_a_chat_goes_through_the_template(tmp_path):
    tokenizer = templated()
    (row,) = read(tmp_path, [CHAT], tokenizer).rows
    whole = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    asked = tokenizer.apply_chat_template(CHAT["messages"][:4], tokenize=False, add_generation_prompt=True)
    assert row.prompt == encoded(asked) and row.continuation == encoded("Bye.[end]")
    assert whole == asked + "Bye.[end]"


def test_all_that_follows_the_last_user_turn_is_the_response(tmp_path):
    record = chat(("user", "Add."), ("assistant", "I call."), ("tool", "3"), ("assistant", "Three."))
    (row,) = read(tmp_path, [record]).rows
    assert words(row.continuation[:-1]) == " I call.\n\ntool: 3\n\nassistant: Three."


REFUSING = "{{ raise_exception('roles must alternate') }}"
REWRITING = "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"), [(REFUSING, "refuses it .roles must alternate"), (REWRITING, "words the prompt differently")]
)
def test_a_template_that_cannot_be_used_is_told_with_the_line(tmp_path, template, said):
    with pytest.raises(UserError, match=rf"d\.jsonl, line 2: .*{said}"):
        read(tmp_path, [alpaca(), CHAT], templated(template))


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_text_has_no_prompt_and_the_remedy_is_named(tmp_path, name):
    source = written(tmp_path, [alpaca(), {"text": "Prose."}], name)
    with pytest.raises(UserError, match=r"(line|record) 2: plain 'text' has no prompt: take --rows windows"):
        load_prompts(source, "all", TOKENIZER)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (alpaca(output=3), "'output' must be a string"),
        (alpaca(output=3, text="fine"), "'output' must be a string"),
        (alpaca(output="half \ud800", text="fine"), "half a character"),
        ({"messages": 3}, "'messages' must be a list"),
        ({"question": "?"}, "a record needs"),
    ],
)
def test_broken_records_are_told_with_their_line(tmp_path, record, said):
    with pytest.raises(UserError, match=rf"line 2: .*{said}"):
        read(tmp_path, [alpaca(), record])
    with pytest.raises(UserError, match="unknown split"):
        read(tmp_path, [alpaca()], split="dev")
    with pytest.raises(UserError, match="does not exist"):
        load_prompts(str(tmp_path / "none.jsonl"), "all", TOKENIZER)


def test_a_hub_data_set_gives_the_same_rows(tmp_path, monkeypatch):
    import datasets

    records = [alpaca(i) for i in range(30)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"test": [], "train": records})
    assert load_prompts("a/b", "training", TOKENIZER).hash() == read(tmp_path, records, split="training").hash()


@pytest.mark.parametrize("tokenizer", [TOKENIZER, templated()], ids=["plain", "templated"])
def test_a_record_keeps_its_split_as_document_and_as_row(tmp_path, tokenizer):
    long = " ".join(["word"] * 20)
    records = [alpaca(i, output=long) if i % 2 else chat(("user", f"{i}?"), ("assistant", long)) for i in range(60)]
    source, seen = written(tmp_path, [*records, records[3]]), []
    for split in SPLITS:
        documents, rows = load_documents(source, split), load_prompts(source, split, tokenizer)
        assert [row.document for row in rows.rows] == list(range(len(documents)))
        assert all(split_of(text) == split for text in documents)
        assert all(long in words(row.continuation) for row in rows.rows)
        seen += documents
    assert sorted(seen) == sorted(map(record_text, records))


def test_answers_to_one_prompt_share_its_split_and_are_one_document(tmp_path):
    records = [alpaca(i, output=f"{answer} it is.") for answer in ("One", "Two", "Three") for i in range(40)]
    source = written(tmp_path, records)
    found = {split: load_prompts(source, split, TOKENIZER).rows for split in SPLITS}
    prompts = [{tuple(row.prompt) for row in rows} for rows in found.values()]
    assert sum(map(len, prompts)) == 40 and sum(map(len, found.values())) == 120
    for rows, own in zip(found.values(), prompts):
        assert len({row.document for row in rows}) == len(own)
        assert len({(tuple(row.prompt), row.document) for row in rows}) == len(own)


def test_records_of_a_named_document_share_its_split_and_are_one_document(tmp_path):
    records = [{"prompt": f"Question {i} of {book}?", "document": book} for i in range(4) for book in range(40)]
    source = written(tmp_path, records)
    found = {split: load_prompts(source, split, TOKENIZER).rows for split in SPLITS}
    assert sum(map(len, found.values())) == 160
    for rows in found.values():
        books = {(words(row.prompt).split()[-1], row.document) for row in rows}
        assert len(books) == len({book for book, _ in books}) == len({document for _, document in books})
        assert len(rows) == 4 * len(books)


def test_documents_that_share_a_prompt_are_one(tmp_path):
    chain = [{"prompt": "a", "document": "A"}, {"prompt": "b", "document": "B"}, {"prompt": "c", "document": "C"}]
    chain += [{"prompt": "a", "completion": "x", "document": "B"}, {"prompt": "b", "completion": "y", "document": "D"}]
    rows = load_prompts(written(tmp_path, chain), "all", TOKENIZER).rows
    assert [row.document for row in rows] == [0, 0, 2, 0, 0]


def test_a_document_is_a_name(tmp_path):
    with pytest.raises(UserError, match="line 1: 'document' must be a name, not list"):
        read(tmp_path, [{"prompt": "a", "document": ["A"]}])


def test_few_records_cannot_be_split(tmp_path):
    records = [alpaca(i) for i in range(19)]
    assert len(read(tmp_path, records)) == 19
    with pytest.raises(UserError, match="holds 19 different prompts or documents, 20 are needed"):
        read(tmp_path, records + records, split="training")


def test_what_is_left_out_is_counted(tmp_path):
    records = [
        alpaca(output=" ".join(["yes"] * 50)),
        alpaca(1, instruction="Why? " * 200),
        alpaca(output=" \n"),
        alpaca(instruction=" "),
        chat(("assistant", "Hello.")),
        chat(("user", ""), ("assistant", "Hello.")),
        chat(("user", "Hello?"), ("assistant", None)),
        alpaca(2),
    ]
    for tokenizer in (TOKENIZER, templated()):
        rows = read(tmp_path, records, tokenizer, prompt_tokens=100, continuation_tokens=12)
        assert rows.counts() == {
            "rows": 2, "cut": 1, "long_prompt": 1, "empty_prompt": 3, "empty_response": 2
        }  # fmt: skip
        assert [(len(e.continuation), e.document) for e in rows.rows] == [
            (12, 0),
            (len(encoded("It is 2.")) + 1, 7),
        ]
        assert rows.rows[0].continuation[-1] != EOS
    limit = len(rows.rows[1].prompt)
    assert len(read(tmp_path, records[-1:], prompt_tokens=limit)) == 1
    with pytest.raises(UserError, match=r"holds no prompt to use \(long_prompt 1\)"):
        read(tmp_path, records[-1:], prompt_tokens=limit - 1)


def test_a_prompt_may_come_alone_or_with_its_completion(tmp_path):
    records = [{"prompt": "Say a.", "completion": " a"}, {"prompt": "Say b."}, {"prompt": "Say c.", "text": "more"}]
    first, second, third = read(tmp_path, records).rows
    assert (first.prompt, first.continuation) == ([BOS, *encoded("Say a.")], [*encoded(" a"), EOS])
    assert (second.prompt, second.continuation, second.kind) == ([BOS, *encoded("Say b.")], [], "prompt")
    assert third.prompt == [BOS, *encoded("Say c.")] and record_text(records[0]) == "Say a. a"


def test_a_prompt_is_a_user_turn_where_there_is_a_template(tmp_path):
    turn = [{"role": "user", "content": "Say a."}]
    answer = [{"role": "assistant", "content": "a"}]
    records = [{"prompt": "Say a.", "completion": "a"}, {"prompt": turn, "completion": answer}, {"messages": turn}]
    first, second, third = (read(tmp_path, [one], templated()).rows[0] for one in records)
    assert first.prompt == second.prompt == third.prompt == encoded("<s>[user]Say a.[end][assistant]")
    assert first.continuation == second.continuation == encoded("a[end]") and third.continuation == []


def test_a_chat_that_waits_for_its_answer_is_a_prompt_alone(tmp_path):
    (row,) = read(tmp_path, [chat(("system", "Be brief."), ("user", "Hi"))]).rows
    assert words(row.prompt[1:]) == "system: Be brief.\n\nuser: Hi\n\nassistant:" and row.continuation == []


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": 3}, "'prompt' must be a string or a list"),
        ({"prompt": "a", "completion": 3}, "'completion' must be a string"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "must be a string or a list"),
    ],
)
def test_broken_prompts_are_told_with_their_line(tmp_path, record, said):
    with pytest.raises(UserError, match=rf"line 2: .*{said}"):
        read(tmp_path, [alpaca(), record])


def test_prompts_without_words_are_told(tmp_path):
    with pytest.raises(UserError, match="holds no prompt to use .none has words"):
        read(tmp_path, [{"prompt": " "}])
    with pytest.raises(UserError, match="holds no prompt to use .empty_prompt 1"):
        read(tmp_path, [{"prompt": " ", "completion": "yes"}])


def test_plain_text_is_cut_into_windows(tmp_path):
    (tmp_path / "a.txt").write_text("One two three four five six seven. " * 20)
    rows = sampled_prompts(str(tmp_path / "a.txt"), "all", TOKENIZER, 12, 4, 3, seed=0)
    assert rows.shapes == [(12, 4)] * 3 and rows.kinds == ["plain"] * 3


ROWS = Rows([Row([1, 5, 6], [7, 2]), Row([1, 8], [9, 9, 9], "plain", 1), Row([1, 4, 4], [4, 2], "plain", 3)])


def first(count, *rows, **changes):
    return list(itertools.islice(RowsData(*rows, **changes).train_dataloader(), count))


def test_the_module_serves_rows_in_the_order_of_seed_and_pass():
    rng = random.Random(0)
    rows = Rows([Row([i] * rng.randint(1, 9), [i] * rng.randint(1, 9), "plain", i) for i in range(1, 51)])

    def order(seed):
        batches = first(25, rows, batch_size=4, seed=seed)  # two passes
        assert all(batch["attention_mask"].shape == (4, batch["input_ids"].shape[1]) for batch in batches)
        return [row for batch in batches for row in batch["input_ids"].amax(1).tolist()]

    assert sorted(order(7)[:50]) == sorted(order(7)[50:]) == list(range(1, 51))
    assert order(7)[:50] != order(7)[50:] and order(7) != order(8)
    data = RowsData(rows, rows.subset([2, 1]), batch_size=4)
    held_out = sorted([2, 1], key=lambda i: rows.shapes[i])
    order = sorted(range(50), key=lambda i: rows.shapes[i])
    for (batch,), numbers in (
        (data.val_dataloader(), held_out),
        (itertools.islice(data.predict_dataloader(), 1), order[:4]),
    ):
        expected = rows.batch(numbers)
        assert batch["prompt_tokens"] == expected["prompt_tokens"]
        assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "attention_mask"))


def windows(count=40, tokens=24):
    return Rows.even(torch.arange(count * tokens).reshape(count, tokens), 18, ["plain"] * count, list(range(count)))


def test_random_prompts_follow_seed_and_batch():
    def prompts(seed):
        return [batch["prompt_tokens"] for batch in first(60, windows(), seed=seed, random_prompt=(6, 20))]

    assert prompts(3) == prompts(3) != prompts(4)
    assert set(prompts(3)) <= set(range(6, 21)) and len(set(prompts(3))) > 5
    batches = first(80, windows(), seed=3, random_prompt=(6, 20))
    passes = [{b["input_ids"][0, 0].item(): b["prompt_tokens"] for b in part} for part in (batches[:40], batches[40:])]
    assert passes[0].keys() == passes[1].keys() and passes[0] != passes[1]  # a row is cut elsewhere in another pass
    held_out = RowsData(windows(), windows(2), random_prompt=(6, 20)).val_dataloader()
    assert {batch["prompt_tokens"] for batch in held_out} == {18}


def test_random_split_is_uniform_and_leaves_something_to_follow():
    rng = random.Random(0)
    drawn = [random_split(10, rng, 3, 12) for _ in range(3000)]
    assert all(drawn.count(length) / 3000 == pytest.approx(1 / 7, abs=0.03) for length in range(3, 10))
    assert set(drawn) == set(range(3, 10))
    for tokens, least, most in ((10, 0, 5), (10, 6, 5), (10, 10, 12)):
        with pytest.raises(ValueError, match="no prompt of"):
            random_split(tokens, rng, least, most)


def test_the_module_refuses_what_does_not_go_together():
    for bounds in ((0, 5), (6, 5), (5, 24)):
        with pytest.raises(UserError, match="below the windows' 24 tokens"):
            RowsData(windows(), random_prompt=bounds)
    with pytest.raises(UserError, match="other rows have prompts of their own"):
        RowsData(ROWS, random_prompt=(1, 2))
