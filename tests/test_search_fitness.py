"""The fitness is the KL on continuation positions, measured once per schedule and set of windows."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.routing.static import StaticRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.search import fitness as fitness_module
from ftp_lightning.search.fitness import ContinuationFitness, MemoFitness

torch.set_num_threads(1)
ROWS, PROMPT, CONTINUATION, BLOCKS = 5, 16, 4, 3
HALF = Schedule([0.0, 0.5, 0.5])


def make_pruner(schedule):
    return TokenPruner(StaticRouter(), schedule, kv="keep")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windows():
    ids = torch.randint(3, 50, (ROWS, PROMPT + CONTINUATION), generator=torch.Generator().manual_seed(1))
    kinds = ["plain", "recall", "plain", "recall", "plain"]
    return Rows(input_ids=ids, prompt_tokens=PROMPT, kinds=kinds)


class Rows(SimpleNamespace):
    def __len__(self):
        return len(self.input_ids)


@pytest.fixture()
def measured(model, windows):
    return ContinuationFitness(model, windows, make_pruner, batch_size=2)


def by_hand(model, windows, schedule, rows):
    """KL(dense || pruned) from probabilities, row by row."""
    with torch.no_grad():
        dense = continuation_logits(model, windows.input_ids[rows], PROMPT).double().softmax(-1)
        with make_pruner(schedule)(model):
            pruned = continuation_logits(model, windows.input_ids[rows], PROMPT).double().softmax(-1)
    return (dense * (dense / pruned).log()).sum(-1).mean().item()


def test_it_is_the_mean_kl_of_the_chosen_windows(model, windows, measured):
    assert measured(HALF) == pytest.approx(by_hand(model, windows, HALF, list(range(ROWS))), rel=1e-4)
    assert measured(HALF, (1, 4)) == pytest.approx(by_hand(model, windows, HALF, [1, 4]), rel=1e-4)
    assert measured(HALF) > 1e-3


def test_the_dense_schedule_loses_nothing(measured):
    assert measured(Schedule.uniform(BLOCKS, 0.0)) == 0.0


def test_the_last_block_is_free_under_keep(measured):
    """Nobody reads what it makes of the prompt (method.md, lead 0)."""
    assert measured(Schedule([0.0, 0.0, 1.0])) == pytest.approx(0.0, abs=1e-6)
    assert measured(Schedule([0.0, 1.0, 0.0])) > 1e-3


def test_nothing_is_measured_twice_and_tokens_are_counted(measured):
    window = PROMPT + CONTINUATION
    assert measured.forward_tokens == ROWS * window  # the dense teacher
    first = measured(HALF, (0, 2))
    assert measured.forward_tokens == (ROWS + 2) * window
    assert measured(HALF, [0, 2]) == first
    assert (measured.evaluations, measured.memo_hits) == (1, 1)
    measured(HALF, (0, 3))
    measured(Schedule([0.5, 0.5, 0.0]), (0, 2))
    assert (measured.evaluations, measured.memo_hits, measured.forward_tokens) == (3, 1, (ROWS + 6) * window)


def test_another_instance_gives_the_same_bits(model, windows, measured):
    other = ContinuationFitness(model, windows, make_pruner, batch_size=2)
    assert other(HALF) == measured(HALF)


def test_a_large_teacher_is_kept_in_half_precision(model, windows, measured, monkeypatch):
    assert measured.teacher.dtype == torch.float32
    monkeypatch.setattr(fitness_module, "FLOAT32_LIMIT", 100)
    half = ContinuationFitness(model, windows, make_pruner, batch_size=2)
    assert half.teacher.dtype == torch.float16
    assert half(HALF) == pytest.approx(measured(HALF), rel=0.01)


def test_the_state_passes_through_json(model, windows, measured):
    value = measured(HALF, (1, 2))
    other = ContinuationFitness(model, windows, make_pruner, batch_size=2)
    other.load_state_dict(json.loads(json.dumps(measured.state_dict())))
    assert other(HALF, (1, 2)) == value
    assert (other.evaluations, other.memo_hits) == (1, 1)
    assert other.forward_tokens == measured.forward_tokens


def test_a_loss_without_rank_is_refused():
    class Broken(MemoFitness):
        def measure(self, schedule, indices):
            return float("nan")

    with pytest.raises(UserError, match="nan"):
        Broken(["plain"])(HALF)
