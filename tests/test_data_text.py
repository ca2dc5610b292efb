"""Stories, sources, splits and records: what is read is what was written."""

import json

import pytest

from ftp_lightning.data.records import alpaca_prompt, record_text
from ftp_lightning.data.sources import load_documents, split_documents, split_of
from ftp_lightning.data.stories import SPLITS, Story, load_stories, parse_stories
from ftp_lightning.data.text import normalise_book, sentences_of
from ftp_lightning.errors import UserError

WORDS = " ".join(["word"] * 60)


def test_story_format():
    stories = parse_stories("# One\n\nA first\nline.\n\nA second.\n\n\n# Two\n\nThe end.\n")
    assert stories == [Story("One", ("A first line.", "A second.")), Story("Two", ("The end.",))]
    assert stories[0].text == "A first line.\n\nA second."


@pytest.mark.parametrize("text", ["no title\n\n# One\n\nText.", "# One\n\n", "# \n\nText."])
def test_story_format_errors(text):
    with pytest.raises(ValueError, match="story"):
        parse_stories(text)


def test_every_split_of_stories():
    stories = [load_stories(split) for split in SPLITS]
    everything = [story for split in stories for story in split]
    assert all(len(split) >= 4 for split in stories)
    assert len(everything) >= 100
    assert sum(len(story.text.split()) for story in everything) >= 20_000
    assert len({story.text for story in everything}) == len(everything)
    assert load_documents("embedded", "all") == [story.text for story in everything]


def test_unknown_split():
    with pytest.raises(UserError, match="calibration, training, validation, test"):
        load_stories("dev")
    with pytest.raises(UserError, match="unknown split 'dev'"):
        load_documents("embedded", "dev")


def test_normalise_book():
    body = "\n\n\n\nOne\r\n  line.\n \n\n\nTwo.\n"
    raw = f"Licence\n*** START OF THE PROJECT GUTENBERG EBOOK X ***{body}*** END OF THE PROJECT GUTENBERG EBOOK\nx"
    assert normalise_book(raw) == "One line.\n\nTwo."
    assert normalise_book(normalise_book(raw)) == "One line.\n\nTwo."


def test_sentences_lose_nothing():
    text = 'Mr. Fox ran. "Stop!" cried Ann. He did not\n\nstop'
    assert sentences_of(text) == ("Mr. Fox ran.", '"Stop!" cried Ann.', "He did not", "stop")
    for story in load_stories("test"):
        assert " ".join(sentences_of(story.text)) == " ".join(story.text.split())


def test_many_documents_go_whole_by_their_hash():
    documents = [f"Document {i}." for i in range(400)]
    parts = {split: split_documents(documents, split) for split in SPLITS}
    assert sorted(text for part in parts.values() for text in part) == sorted(documents)
    assert [len(parts[split]) / 400 for split in SPLITS] == pytest.approx([0.3, 0.4, 0.1, 0.2], abs=0.06)
    assert all(split_of(text) == split for split, part in parts.items() for text in part)
    assert split_documents(documents + ["One more."], "test")[: len(parts["test"])] == parts["test"]


def test_few_documents_are_cut_into_contiguous_parts():
    text = "\n\n".join(f"Paragraph {i:02}." for i in range(100))
    parts = [split_documents([text], split) for split in SPLITS]
    assert "\n\n".join(part[0] for part in parts) == text
    assert [part[0].count(".") for part in parts] == [30, 40, 10, 20]


def test_text_file_folder_and_form_feed(tmp_path):
    (tmp_path / "b.txt").write_text(f"{WORDS}\f{WORDS} b")
    (tmp_path / "a.txt").write_text(f"{WORDS} a")
    assert load_documents(str(tmp_path / "b.txt"), "all") == [WORDS, f"{WORDS} b"]
    assert load_documents(str(tmp_path), "all") == [f"{WORDS} a", WORDS, f"{WORDS} b"]


def test_jsonl_forms_and_alpaca(tmp_path):
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    records = [{"text": WORDS}, chat, alpaca, {**alpaca, "input": ""}]
    lines, array = tmp_path / "d.jsonl", tmp_path / "d.json"
    lines.write_text("\n\n".join(map(json.dumps, records)))
    array.write_text(json.dumps(records))
    documents = load_documents(str(lines), "all")
    assert documents == load_documents(str(array), "all")
    assert documents[:2] == [WORDS, "user: Hi\n\nassistant: Ho"]
    assert documents[2] == alpaca_prompt(alpaca) + "3"
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3" in documents[2]
    assert "### Input" not in documents[3]


@pytest.mark.parametrize("line", ['{"text": ', '{"txt": "x"}', '["x"]', '{"text": 3}', '{"messages": 3}', "\xff"])
def test_broken_jsonl_names_file_and_line(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"d\.jsonl, line 3: ") as caught:
        load_documents(str(path), "all")
    assert len(str(caught.value).splitlines()) <= 3


def test_braces_in_an_instruction_are_text():
    record = {"instruction": "Explain {x}.", "input": "{0}", "output": "{y}"}
    assert record_text(record).count("{") == 3


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "~/nothing/there.jsonl"])
def test_missing_source(name):
    with pytest.raises(UserError, match="does not exist"):
        load_documents(name, "all")


def test_too_little_text_says_how_much(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Three words only.")
    with pytest.raises(UserError, match="3 words, at least 50"):
        load_documents(str(path), "all")


def test_bad_files_are_user_errors(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.json").write_text('[{"text": "x"}, 3]')
    (tmp_path / "d.txt").write_bytes(b"ok \xff")
    empty = tmp_path / "empty"
    empty.mkdir()
    expected = {"a.json": "is not JSON", "b.json": "array", "c.json": "record 2", "d.txt": "byte 3", "empty": "no .txt"}
    for name, message in expected.items():
        with pytest.raises(UserError, match=message):
            load_documents(str(tmp_path / name), "all")


@pytest.mark.parametrize(("name", "place"), [("d.jsonl", "line 2"), ("d.json", "record 2")])
def test_half_a_character_is_named_with_its_place(tmp_path, name, place):
    rows = [json.dumps({"text": WORDS}), '{"text": "half \\ud800 a character"}']
    (tmp_path / name).write_text("\n".join(rows) if name.endswith("l") else f"[{', '.join(rows)}]")
    with pytest.raises(UserError, match=f"{name}, {place}: the text holds half a character"):
        load_documents(str(tmp_path / name), "all")


def test_hub_data_set_offline(monkeypatch):
    import datasets

    def refuse(*_args):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="prefetch --data a/b:c"):
        load_documents("a/b:c", "all")
