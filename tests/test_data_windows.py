"""Windows: exact lengths, no overlap within a pass, balance, determinism; the data module's order."""

import itertools
import random

import pytest
import torch

from ftp_lightning.data.module import RowsData
from ftp_lightning.data.recall import draw_facts
from ftp_lightning.data.rows import Rows
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.windows import calibration_windows, plain_windows, recall_windows
from ftp_lightning.errors import UserError
from ftp_lightning.models import load_tokenizer

TOKENIZER = load_tokenizer("embedded")
STORIES = load_documents("embedded", "calibration")[:8]
TOKENS = [TOKENIZER.encode(text, add_special_tokens=False) for text in STORIES]


def plain(count, seed=0, prompt=48, continuation=16, documents=STORIES):
    return plain_windows(TOKENIZER, documents, prompt, continuation, count, random.Random(seed))


def place(row, document):
    """Where the row (without BOS) begins in its document's tokens."""
    ids, tokens = row.tolist()[1:], TOKENS[document]
    found = [start for start in range(len(tokens)) if tokens[start : start + len(ids)] == ids]
    assert len(found) == 1
    return found[0]


def test_plain_windows_do_not_overlap_nor_cross():
    per_pass = sum(len(ids) // 63 for ids in TOKENS) - len(TOKENS)
    windows = plain(per_pass)
    assert windows.input_ids.shape == (per_pass, 64) and (windows.input_ids[:, 0] == TOKENIZER.bos_token_id).all()
    used = set()
    for row, document in zip(windows.input_ids, windows.documents, strict=True):
        start = place(row, document)
        span = {(document, at) for at in range(start, start + 63)}
        assert not used & span
        used |= span


def test_all_windows_are_consecutive():
    windows = plain(None)
    expected = [(i, 63 * k) for i, ids in enumerate(TOKENS) for k in range(len(ids) // 63)]
    assert [(d, place(row, d)) for row, d in zip(windows.input_ids, windows.documents, strict=True)] == expected


def test_a_used_up_pass_is_followed_by_another():
    windows = plain(200)
    assert len(windows) == 200 and len({tuple(row.tolist()) for row in windows.input_ids}) > 150


def test_short_documents_are_packed_with_eos():
    short = ["One day.", "Two days after.", "Three."]
    windows = plain(None, prompt=4, continuation=7, documents=short)
    stream = [t for text in short for t in [*TOKENIZER.encode(text, add_special_tokens=False), TOKENIZER.eos_token_id]]
    assert windows.input_ids[0].tolist() == [TOKENIZER.bos_token_id, *stream[:10]]
    assert windows.documents == [0]
    many = plain(None, prompt=4, continuation=7, documents=short * 4)
    owners = [i for i, text in enumerate(short * 4) for _ in [*TOKENIZER.encode(text, add_special_tokens=False), "eos"]]
    assert many.documents == owners[: len(owners) // 10 * 10 : 10] and len(set(many.documents)) > 2


def test_too_little_text_says_how_much():
    with pytest.raises(UserError, match="has 3 tokens, one window needs 63"):
        plain(1, documents=["One day."])
    with pytest.raises(UserError, match="tokens are needed|are needed"):
        recall_windows(TOKENIZER, ["One day."], 192, 64, 1, random.Random(0))


def test_recall_windows_ask_for_their_own_facts():
    windows = recall_windows(TOKENIZER, STORIES, 192, 64, 20, random.Random(0))
    assert windows.input_ids.shape == (20, 256) and windows.continuation_tokens == 64
    for row in windows.input_ids:
        prompt, continuation = TOKENIZER.decode(row[:192]), TOKENIZER.decode(row[192:])
        passage, question = prompt.rsplit("\n", 1)
        lines = (question + continuation).split("\n")
        assert continuation.startswith(" ") and len(lines) >= 3
        assert len(set(lines[:3])) == 3  # what the prompt asked is not asked again at once
        for line in lines[:-1]:
            answer = line.rsplit(" ", 1)[1]
            name = next(word for word in line.replace("?", "").split()[2:] if word.istitle())
            assert any(answer.rstrip(".") in s and name in s for s in passage.split(". "))


def test_windows_with_facts_of_given_kinds_alone():
    windows = calibration_windows(TOKENIZER, STORIES, 192, 64, 12, seed=0, kinds=("trade", "town"))
    texts = [TOKENIZER.decode(row) for row, kind in zip(windows.input_ids, windows.kinds) if kind == "recall"]
    assert len(texts) == 6 and all(" by trade" in text and " come from" in text.lower() for text in texts)
    assert not any(words in text for words in (" kept the ", " What colour ", " called the ") for text in texts)


def test_recall_continuation_asks_again_when_short():
    row = recall_windows(TOKENIZER, STORIES, 96, 300, 1, random.Random(0)).input_ids[0]
    lines = TOKENIZER.decode(row[96:]).strip("\n").split("\n")
    assert len(row) == 396 and len(lines) > len(set(lines[:-1]))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_every_prefix_is_balanced(share):
    kinds = calibration_windows(TOKENIZER, STORIES, 96, 32, 12, seed=1, recall_share=share).kinds
    assert [kinds[:n].count("recall") for n in range(13)] == [int(n * share) for n in range(13)]


def test_calibration_windows_follow_seed_and_keep_their_prefix():
    def make(count, seed):
        return calibration_windows(TOKENIZER, STORIES, 96, 32, count, seed)

    assert make(10, 0).hash() == make(10, 0).hash() != make(10, 1).hash()
    assert make(10, 0).subset(range(6)).hash() == make(6, 0).hash()
    with pytest.raises(ValueError, match="recall_share"):
        calibration_windows(TOKENIZER, STORIES, 96, 32, 4, 0, recall_share=1.5)


def test_windows_are_checked_and_hashed():
    ids = torch.arange(12).reshape(2, 6)
    windows = Rows.even(ids, 4, ["plain", "recall"], [3, 5])
    assert len(windows) == 2 and windows.continuation_tokens == 2
    swapped = windows.subset([1, 0])
    assert swapped.input_ids.tolist() == ids.flip(0).tolist()
    assert (swapped.kinds, swapped.documents) == (["recall", "plain"], [5, 3])
    assert len({windows.hash(), swapped.hash(), Rows.even(ids, 3, windows.kinds, windows.documents).hash()}) == 3
    for bad in ((ids.int(), 4, windows.kinds, [3, 5]), (ids, 6, windows.kinds, [3, 5]), (ids, 4, ["plain"], [3, 5])):
        with pytest.raises(ValueError):
            Rows.even(*bad)


def rows_of(loader):
    return [row.tolist() for batch in loader for row in batch["input_ids"]]


def test_module_shuffles_by_seed_and_pass_and_keeps_order_elsewhere():
    windows = Rows.even(torch.arange(60).reshape(10, 6), 4, ["plain"] * 10, list(range(10)))
    data = RowsData(windows, windows.subset([2, 1]), batch_size=4, seed=7)
    rows = rows_of(itertools.islice(data.train_dataloader(), 5))  # two passes over ten rows
    assert sorted(rows[:10]) == sorted(rows[10:]) == windows.input_ids.tolist()
    assert rows[:10] != rows[10:]
    assert rows_of(data.val_dataloader()) == windows.input_ids[[2, 1]].tolist()
    assert rows_of(data.predict_dataloader()) == windows.input_ids.tolist()
    batches = list(data.predict_dataloader())
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 6), (4, 6), (2, 6)]
    assert all(batch["prompt_tokens"] == 4 for batch in batches)
    assert RowsData(windows).val_dataloader() == []
    with pytest.raises(ValueError, match="batch_size 0"):
        RowsData(windows, batch_size=0)


def test_a_trainer_sees_pass_after_pass():
    from lightning import LightningModule, Trainer

    class Watch(LightningModule):
        def __init__(self):
            super().__init__()
            self.seen, self.weight = [], torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch, _):
            self.seen.append(batch["input_ids"][0, 0].item())
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    windows = Rows.even(torch.arange(60).reshape(10, 6), 4, ["plain"] * 10, list(range(10)))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    watch = Watch()
    Trainer(max_steps=20, accelerator="cpu", **quiet).fit(watch, RowsData(windows, seed=3))
    assert sorted(watch.seen[:10]) == sorted(watch.seen[10:]) and watch.seen[:10] != watch.seen[10:]


def test_processes_and_a_resumed_training_see_the_batches_of_one():
    windows = Rows.even(torch.arange(60).reshape(10, 6), 4, ["plain"] * 10, list(range(10)))

    def batches(count, **changes):
        loader = RowsData(windows, batch_size=3, seed=7, random_prompt=(2, 5)).train_dataloader()
        loader.__dict__.update(changes)
        found = itertools.islice(loader, count)
        return [(batch["number"], batch["prompt_tokens"], batch["input_ids"].tolist()) for batch in found]

    whole = batches(8)
    assert [number for number, _, _ in whole] == list(range(8))
    assert {prompt for _, prompt, _ in whole} <= {2, 3, 4, 5} and len({prompt for _, prompt, _ in whole}) > 1
    assert batches(5, done=3) == whole[3:]
    assert batches(4, rank=0, world=2) == whole[::2] and batches(4, rank=1, world=2) == whole[1::2]


def test_facts_of_windows_have_company():
    for seed in range(10):
        facts = draw_facts(random.Random(seed), 4)
        assert all(sum(other.kind == fact.kind for other in facts) >= 2 for fact in facts)
