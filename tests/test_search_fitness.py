"""The fitness is a loss on continuation positions, measured once per schedule and chunk of windows."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.routing import DynamicRouter, StaticRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.search import fitness as fitness_module
from ftp_lightning.search.criteria import CRITERIA, CrossEntropy, HiddenError, KLDivergence, TotalVariation
from ftp_lightning.search.fitness import ContinuationFitness, MemoFitness

torch.set_num_threads(1)
ROWS, PROMPT, CONTINUATION, BLOCKS, WORDS = 5, 16, 4, 3, 300
HALF = Schedule([0.0, 0.5, 0.5])


def make_pruner(schedule):
    return TokenPruner(StaticRouter(), schedule, kv="keep")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windows():
    ids = torch.randint(3, WORDS, (ROWS, PROMPT + CONTINUATION), generator=torch.Generator().manual_seed(1))
    return Rows.even(ids, PROMPT, ["plain", "recall", "plain", "recall", "plain"], [0] * ROWS)


@pytest.fixture()
def measured(model, windows):
    return ContinuationFitness(model, windows, make_pruner, chunk=2)


def both(model, windows, schedule, rows=slice(None), pruner=None):
    """Dense and pruned log-probabilities, by hand."""
    with torch.no_grad():
        dense = continuation_logits(model, windows.input_ids[rows], PROMPT).double().log_softmax(-1)
        with (pruner or make_pruner)(schedule)(model):
            pruned = continuation_logits(model, windows.input_ids[rows], PROMPT).double().log_softmax(-1)
    return dense, pruned


def kl(dense, pruned):
    return (dense.exp() * (dense - pruned)).sum(-1).mean().item()


def test_it_is_the_mean_kl_of_the_chosen_chunks(model, windows):
    full = ContinuationFitness(model, windows, make_pruner, chunk=2, criterion=KLDivergence(top=WORDS))
    assert full.sizes == (2, 2, 1)
    assert full(HALF) == pytest.approx(kl(*both(model, windows, HALF)), rel=2e-3)
    assert full(HALF, [0, 2]) == pytest.approx(kl(*both(model, windows, HALF, [0, 1, 4])), rel=2e-3)
    assert full(HALF) > 1e-3


@pytest.mark.parametrize("top", [8, 64, 128])
def test_the_rest_bucket_keeps_it_a_divergence(model, windows, top):
    """KL of both distributions after all words but the dense model's `top` are put together."""
    dense, pruned = both(model, windows, HALF)
    best = dense.topk(top, -1).indices

    def together(x):
        x = x.exp()
        chosen = x.gather(-1, best)
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1).log()

    found = ContinuationFitness(model, windows, make_pruner, 2, KLDivergence(top))(HALF)
    assert found == pytest.approx(kl(together(dense), together(pruned)), rel=5e-3)
    assert 0 < found <= kl(dense, pruned) * 1.005


def test_the_dense_schedule_loses_nothing(model, windows, measured):
    assert 0 <= measured(Schedule.uniform(BLOCKS, 0.0)) < 1e-6
    mse = ContinuationFitness(model, windows, make_pruner, 2, HiddenError())
    assert 0 <= mse(Schedule.uniform(BLOCKS, 0.0)) < 1e-6


def test_total_variation_is_half_the_distance(model, windows):
    dense, pruned = both(model, windows, HALF)
    expected = ((dense.exp() - pruned.exp()).abs().sum(-1) / 2).mean().item()
    found = ContinuationFitness(model, windows, make_pruner, 2, TotalVariation(top=WORDS))(HALF)
    assert found == pytest.approx(expected, rel=2e-3)
    assert 0 < ContinuationFitness(model, windows, make_pruner, 2, TotalVariation(16))(HALF) <= expected * 1.002


def test_cross_entropy_and_hidden_error_are_what_they_say(model, windows):
    _, pruned = both(model, windows, HALF)
    targets = windows.input_ids[:, PROMPT:]
    expected = -pruned.gather(-1, targets[..., None]).mean().item()
    assert ContinuationFitness(model, windows, make_pruner, 2, CrossEntropy())(HALF) == pytest.approx(expected)

    def last_states():
        with torch.no_grad():
            prefill = model.model(windows.input_ids[:, :PROMPT], use_cache=True)
            rest = model.model(windows.input_ids[:, PROMPT:-1], past_key_values=prefill.past_key_values)
        return torch.cat([prefill.last_hidden_state[:, -1:], rest.last_hidden_state], 1)

    dense = last_states()
    with make_pruner(HALF)(model):
        lost = last_states() - dense
    expected = (lost.square().sum(-1) / dense.square().sum(-1)).mean().item()
    found = ContinuationFitness(model, windows, make_pruner, 2, HiddenError())(HALF)
    assert found == pytest.approx(expected, rel=2e-3)


def test_the_last_block_is_free_under_keep(measured):
    """Nobody reads what it makes of the prompt (method.md, lead 0)."""
    assert measured(Schedule([0.0, 0.0, 1.0])) == pytest.approx(0.0, abs=1e-6)
    assert measured(Schedule([0.0, 1.0, 0.0])) > 1e-3


@pytest.mark.parametrize("router", [StaticRouter, DynamicRouter])
@pytest.mark.parametrize("limit", [None, 1, 2], ids=["all states", "none", "one boundary"])
def test_dense_first_blocks_are_computed_once_and_change_no_bit(model, windows, monkeypatch, router, limit):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        one = router()
    make = lambda schedule: TokenPruner(one, schedule, kv="keep")  # noqa: E731
    size = windows.input_ids.numel() * 32 * 4
    if limit is not None:
        monkeypatch.setattr(fitness_module, "STATES_LIMIT", size * (limit - 1))
    plain = ContinuationFitness(model, windows, make, 2, share_prefix=False)
    shared = ContinuationFitness(model, windows, make, 2)
    for schedule in (HALF, Schedule([0.0, 0.0, 0.7]), Schedule([0.3, 0.3, 0.3])):
        assert shared(schedule) == plain(schedule)
    spared = shared.forward_tokens < plain.forward_tokens  # a router of scores needs the dense block before
    assert spared == (limit is None or (limit == 2 and router is StaticRouter))
    if router is StaticRouter and limit is None:
        window, teacher = PROMPT + CONTINUATION, ROWS * (PROMPT + CONTINUATION)
        sizes = [2 * window, 2 * window, window]
        expected = sum(round(n * (1 - first / BLOCKS)) for n in sizes for first in (1, 2, 0))
        assert shared.forward_tokens - teacher == expected


def test_nothing_is_measured_twice_and_tokens_are_counted(model, windows):
    measured, window = ContinuationFitness(model, windows, make_pruner, 2, share_prefix=False), PROMPT + CONTINUATION
    assert measured.forward_tokens == ROWS * window  # the dense teacher
    first = measured(HALF, (0, 2))
    assert measured.forward_tokens == (ROWS + 3) * window
    assert measured(HALF, [0, 2]) == first
    assert (measured.evaluations, measured.memo_hits) == (2, 2)
    measured(HALF)
    assert (measured.evaluations, measured.memo_hits, measured.forward_tokens) == (3, 4, (ROWS + 5) * window)


def test_neighbours_in_a_population_change_no_bit(model, windows, measured):
    others = [Schedule([0.5, 0.5, 0.0]), HALF, Schedule([0.9, 0.0, 0.1])]
    together = measured.scores(others)
    alone = [ContinuationFitness(model, windows, make_pruner, 2)(schedule) for schedule in others]
    assert together == alone


def test_the_state_passes_through_json(model, windows, measured):
    value = measured(HALF, (1, 2))
    other = ContinuationFitness(model, windows, make_pruner, 2)
    other.load_state_dict(json.loads(json.dumps(measured.state_dict())))
    assert other(HALF, (1, 2)) == value
    assert (other.evaluations, other.memo_hits) == (2, 2)
    assert other.forward_tokens == measured.forward_tokens


def test_what_must_be_equal_is_told(model, windows, measured):
    identity = measured.identity()
    assert json.loads(json.dumps(identity)) == json.loads(json.dumps(measured.identity()))
    other = Rows.even(windows.input_ids.flip(0), PROMPT, windows.kinds, windows.documents)
    for different in (
        ContinuationFitness(model, other, make_pruner, 2),
        ContinuationFitness(model, windows, make_pruner, 3),
        ContinuationFitness(model, windows, make_pruner, 2, CrossEntropy()),
        ContinuationFitness(model, windows, lambda s: TokenPruner(StaticRouter(), s, kv="evict"), 2),
        ContinuationFitness(model, windows, lambda s: TokenPruner(DynamicRouter(), s, kv="keep"), 2),
    ):
        assert different.identity() != identity


def test_every_criterion_takes_its_defaults(model, windows):
    assert all(ContinuationFitness(model, windows, make_pruner, 8, kind())(HALF) > 0 for kind in CRITERIA.values())


def test_a_loss_without_rank_is_refused():
    class Broken(MemoFitness):
        def measure(self, schedule, chunk):
            return float("nan")

        def cost(self, schedule, chunk):
            return 1

    with pytest.raises(UserError, match="nan"):
        Broken([1])(HALF)


@pytest.fixture(scope="module")
def ragged():
    generator, lengths = torch.Generator().manual_seed(3), ((16, 4), (7, 2), (11, 1), (16, 4), (9, 3))
    ids = [(torch.randint(3, WORDS, (p + c,), generator=generator).tolist(), p) for p, c in lengths]
    return Rows([Row(row[:p], row[p:], "chat", i) for i, (row, p) in enumerate(ids)])


@pytest.mark.parametrize("kv", ["keep", "evict"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_rows_of_any_length_weigh_alike(model, ragged, criterion, kv):
    make = lambda schedule: TokenPruner(StaticRouter(), schedule, kv=kv)  # noqa: E731
    found = ContinuationFitness(model, ragged, make, 2, CRITERIA[criterion]())
    alone = [ContinuationFitness(model, ragged.subset([i]), make, 1, CRITERIA[criterion]())(HALF) for i in range(5)]
    assert found(HALF) == pytest.approx(sum(alone) / 5, rel=2e-3)  # what is stored of the dense model is in float16
    assert found(HALF, [1]) == pytest.approx(sum(alone[2:4]) / 2, rel=2e-3)


def test_of_rows_of_any_length_too_dense_blocks_are_computed_once(model, ragged):
    shared, plain = (ContinuationFitness(model, ragged, make_pruner, 2, share_prefix=on) for on in (True, False))
    for schedule in (HALF, Schedule([0.0, 0.0, 0.7]), Schedule([0.3, 0.3, 0.3])):
        assert shared(schedule) == plain(schedule)
    assert shared.forward_tokens < plain.forward_tokens
    assert plain.forward_tokens == 4 * sum(map(sum, ragged.shapes))
