"""The stopwatch: what it runs, in which order, and what it reports beside the time."""

import pytest
import torch

from ftp_lightning.costs.flops import realised_speedup_limit
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.speed import prefill as speed
from ftp_lightning.evaluation.speed import timing
from ftp_lightning.evaluation.speed.block_clock import BlockClock
from ftp_lightning.evaluation.speed.cell import Bench
from ftp_lightning.evaluation.speed.prompts import mixed_lengths, random_prompts
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import DynamicRouter, FixedRouter, RandomRouter, StaticRouter
from ftp_lightning.schedule import Schedule
from tests.tiny import random_llama


@pytest.fixture(scope="module")
def model(settled):
    return random_llama(48, max_position_embeddings=64)


@pytest.fixture
def pruner():
    return TokenPruner(StaticRouter(), Schedule([0.0, 0.5, 0.75]))


def generator():
    return torch.Generator().manual_seed(0)


def prompts(model, length=40, batch=2, mixed=False):
    return random_prompts(model, length, batch, mixed, generator=generator())


@pytest.fixture
def faked(monkeypatch, pruner):
    """A clock that says what is attached, and the order of the calls."""
    clock, order = {"dense": 9.0, "pruned": 9.0}, []

    def seconds(run, device, *_):
        kind = "pruned" if pruner._attached is not None else "dense"
        order.append(kind)
        run()
        return clock[kind]

    monkeypatch.setattr(speed, "seconds", seconds)
    return clock, order


def test_pairs_are_measured_in_turn_and_warm_up_is_left_out(model, pruner, faked, monkeypatch):
    clock, order = faked
    shapes, prefill = [], speed.prefill

    def after_the_warm_up(model, prompts):
        shapes.append(prompts.shape)
        if len(shapes) > 4:
            clock.update(dense=0.030, pruned=0.020)
        return prefill(model, prompts)

    monkeypatch.setattr(speed, "prefill", after_the_warm_up)
    result = speed.prefill_speed(model, pruner, prompts(model), pairs=4, warmup=2, generator=generator())
    assert order == ["dense", "pruned", "pruned", "dense"] * 3
    assert set(shapes) == {(2, 40)}
    assert (result.dense_ms, result.pruned_ms, result.pairs) == (30.0, 20.0, 4)
    assert result.ratio.value == result.ratio.low == result.ratio.high == pytest.approx(1.5)


def test_decoding_is_measured_in_turn_on_either_cache(model, pruner, faked):
    clock, order = faked
    clock.update(dense=0.003, pruned=0.002)
    result = speed.decode_speed(model, pruner, prompts(model), 4, generator=generator())
    assert order == ["dense", "pruned", "pruned", "dense"] * ((4 + speed.DECODE_WARMUP) // 2)
    assert (result.dense_ms, result.pruned_ms, result.pairs) == (3.0, 2.0, 4)
    assert result.ratio.value == pytest.approx(1.5)


@pytest.mark.parametrize("mixed", [False, True])
def test_decoding_steps_are_those_of_generate(model, pruner, mixed, monkeypatch):
    text = prompts(model, mixed=mixed)
    with pruner(model):
        said = model.generate(
            **text.arguments, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=47
        )
    tokens, greedy = [], speed._greedy
    monkeypatch.setattr(speed, "_greedy", lambda output: tokens.append(greedy(output)) or tokens[-1])
    decoding = speed.Decoding(model, text, lambda: pruner(model))
    decoding.step()
    decoding.step()
    chosen = torch.cat(tokens, 1)
    agrees = said[:, 40:] == chosen
    assert agrees[:, 0].all() and (agrees.all() or 47 in chosen)  # generate was forbidden the end of the text
    assert decoding.cache.get_seq_length() == 44


def test_overhead_replays_the_very_decisions(model, monkeypatch):
    routers, traces = [], []
    pruner = TokenPruner(RandomRouter(), Schedule([0.0, 0.5, 0.75]), kv=["keep", "evict", "keep"])

    def seconds(model, prompts):
        from ftp_lightning.pruning.calls import WrappedMethod

        owner = model.model.__dict__["forward"]
        assert isinstance(owner, WrappedMethod)
        routers.append(attached[-1])
        speed.prefill(model, prompts)
        traces.append(attached[-1].trace.prompt.keep)
        return 0.010 if isinstance(attached[-1].router, RandomRouter) else 0.008

    attached, attach = [], TokenPruner.attach
    monkeypatch.setattr(TokenPruner, "attach", lambda self, model: attached.append(self) or attach(self, model))
    monkeypatch.setattr(speed, "prefill_seconds", seconds)
    share = speed.router_overhead(model, pruner, prompts(model, mixed=True), 3, warmup=1, generator=generator())
    assert share.value == share.low == share.high == pytest.approx(0.2)
    replays = [one for one in routers if isinstance(one.router, FixedRouter)]
    assert len(replays) == 4 == len(routers) - 4 and replays[0].kv == pruner.kv
    assert replays[0].router.keep[0].all()  # a dense block stays dense, padding or not
    assert all(torch.equal(a, b) for keep in traces for a, b in zip(keep, traces[0], strict=True))


def test_real_times_are_positive_and_the_interval_holds_the_median(model, pruner):
    result = speed.prefill_speed(model, pruner, prompts(model), pairs=5, warmup=1, generator=generator())
    assert result.dense_ms > 0 and result.pruned_ms > 0
    assert result.ratio.low <= result.ratio.value <= result.ratio.high
    assert speed.one_token_ms(model, prompts(model)) > 0


def test_median_interval_narrows_with_the_spread():
    wide = timing.median_interval(torch.linspace(0, 2, 101, dtype=torch.float64), generator())
    narrow = timing.median_interval(torch.linspace(0.9, 1.1, 101, dtype=torch.float64), generator())
    assert wide.low < narrow.low < 1 < narrow.high < wide.high


def test_a_prompt_longer_than_the_positions_is_refused(model):
    with pytest.raises(UserError, match="length is 65, the model takes 64"):
        prompts(model, 65)


def test_mixed_rows_spread_from_a_quarter_and_are_padded_on_the_left(model):
    assert mixed_lengths(40, 4) == [40, 30, 20, 10] and mixed_lengths(41, 2) == [41, 11]
    text = prompts(model, 40, 4, mixed=True)
    assert text.mask.sum(1).tolist() == [40, 30, 20, 10]
    assert torch.equal(text.mask, text.mask.sort(dim=1).values) and not text.ids[text.mask == 0].any()
    assert text.last(10).mask.all() and text.last(10).shape == (4, 10)
    assert prompts(model, 40, 1, mixed=True).mask is None


@pytest.mark.parametrize("mixed", [False, True])
def test_a_cell_holds_time_limits_decoding_overhead_and_memory(model, mixed):
    pruner = TokenPruner(DynamicRouter(), Schedule.uniform(3, 0.5), kv="evict")
    text = prompts(model, 32, 4, mixed)
    bench = Bench(model, pairs=2, decode_tokens=2, generator=generator())
    row = bench.cell(pruner, text, BlockClock(model, text, repeats=2))
    assert row["flops_limit"] == realised_speedup_limit(model, pruner.trace.prompt, pruner.kv, last_only=True)
    assert row["limit_share"] == row["speedup"] / row["flops_limit"]
    assert row["shape_limit"] > 0 and row["realised_sparsity"] == pytest.approx(0.5, abs=0.02)
    assert row["launch_bound"] is (row["dense_ms"] < 5 * row["one_token_ms"])
    assert row["decode_low"] <= row["decode_speedup"] <= row["decode_high"]
    assert row["kv_bytes_dense"] == 3 * 2 * 4 * 32 * 32 * 4 == 2 * row["kv_bytes_pruned"]
    assert (row["padded_flops_limit"] is None) is not mixed
    assert (row["memory_dense_bytes"] is None) is bool(bench.notes)


def test_without_decoding_its_columns_are_empty(model, pruner):
    text = prompts(model)
    row = Bench(model, pairs=2, decode_tokens=0, generator=generator()).cell(pruner, text, BlockClock(model, text, 1))
    assert row["decode_tokens"] == 0 and row["decode_speedup"] is None is row["decode_dense_ms"]


def test_a_block_that_cannot_be_timed_alone_is_told_once(model, pruner):
    class Broken:
        def seconds(self, *_):
            raise TypeError("a block wants more")

    bench = Bench(model, pairs=2, decode_tokens=0, generator=generator())
    before = len(bench.notes)
    rows = [bench.cell(pruner, prompts(model), Broken()) for _ in range(2)]
    assert [row["shape_limit"] for row in rows] == [None, None]
    assert len(bench.notes) == before + 1 and "a block wants more" in bench.notes[-1]


def test_each_run_of_a_round_is_called_once_and_goes_first_in_turn():
    order = []
    runs = [lambda name=name: order.append(name) or float(ord(name)) for name in "abc"]
    times = timing.in_turn(runs, 3, warmup=1)
    assert times.tolist() == [[97.0, 98.0, 99.0]] * 3
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"


def test_several_pruners_share_the_dense_prefill_of_a_round(model, pruner, faked):
    clock, order = faked
    clock.update(pruned=3.0)
    pruners = [pruner.changed(kv="keep"), pruner]  # the clock knows the second
    one, two = speed.prefill_speeds(model, pruners, prompts(model), 4, 0, generator=generator())
    assert len(order) == 4 * (1 + len(pruners))
    assert (one.ratio.value, two.ratio.value) == (1.0, 3.0)
