"""The training recipe: windows of every kind, phases, and a run of a few steps from text to a model folder."""

import json
import random
from pathlib import Path

import pytest
import torch

from ftp_lightning.data.sources import load_documents
from ftp_lightning.errors import UserError
from ftp_lightning.models import load, load_tokenizer

RECIPE = Path(__file__).resolve().parent.parent / "experiments" / "pretrain"
STORIES = load_documents("embedded", "training")


@pytest.fixture
def mixture(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    import mixture

    return mixture


@pytest.fixture
def mixer(mixture):
    return mixture.Mixer(load_tokenizer(), STORIES, 256, random.Random(0))


def test_every_kind_of_window_has_its_length(mixer):
    for kind in (mixer.prose, mixer.repetition, mixer.dense, mixer.passage):
        for _ in range(10):
            ids = kind()
            assert len(ids) == 256 and ids[0] == mixer.bos


def test_passages_hold_questions_and_their_answers(mixer):
    texts = [mixer.tokenizer.decode(mixer.passage()) for _ in range(20)]
    asked = [text for text in texts if "? " in text and any(q in text for q in ("\nWhere", "\nWhat", "\nFrom"))]
    assert len(asked) >= 18


def test_repetition_repeats(mixer):
    ids = mixer.repetition()
    assert any(ids[1 : 1 + n] == ids[1 + n : 1 + 2 * n] for n in range(8, 121))


def test_batches_follow_phase_and_seed(mixture):
    tokenizer, recipe = load_tokenizer(), mixture.PLANS["recipe"]
    a, b = (mixture.Mixer(tokenizer, STORIES, 128, random.Random(3)).batch(recipe[3], 4) for _ in range(2))
    assert a.shape == (4, 128) and torch.equal(a, b)
    assert [recipe.index(mixture.phase_at(recipe, done)) for done in (0, 0.3, 0.4, 0.9, 1.0)] == [0, 1, 2, 3, 3]
    for plan in mixture.PLANS.values():
        assert sum(phase.time for phase in plan) == pytest.approx(1)


def test_too_little_text(mixture):
    with pytest.raises(UserError, match="512 are needed"):
        mixture.Mixer(load_tokenizer(), ["One day."], 256, random.Random(0))


def test_run_from_text_to_model(mixture, tmp_path):
    import train

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "stories.txt").write_text("\f".join(STORIES))
    output = tmp_path / "model"
    options = "--tokenizer train --vocab 400 --steps 12 --blocks 2 --hidden 64 --window 64 --batch_size 4 --device cpu"
    train.main(["--text", str(tmp_path / "text"), "--output", str(output), *options.split()])
    losses = json.loads((output / "losses.json").read_text())
    assert len(losses) == 12 and losses[-1] < losses[0]
    model, tokenizer = load(str(output))
    assert len(tokenizer) == model.config.vocab_size == 400 and model.config.num_hidden_layers == 2
    text = 'He said: "Twelve o\'clock?"\n\nYes.'
    assert tokenizer.encode(text)[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
