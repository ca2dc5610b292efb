"""Several threads on one pruned model: each gets its own right answer; attach and detach wait for calls."""

import copy
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_engine import tiny_llama
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ftp_lightning import DynamicRouter, RandomRouter, Schedule, TokenPruner
from ftp_lightning.errors import UserError

SCHEDULE = Schedule([0.0, 0.3, 0.6, 0.4])


def asked(model, pruner, number, how):
    """One call: its result, and the decisions that this thread's trace tells."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 64, (1 + number % 2, 5 + number % 13), generator=generator)
    with torch.no_grad():
        if how == "generate":
            found = model.generate(ids, max_new_tokens=4, do_sample=False)
        elif how == "prompt":  # a chunk on a filled cache
            cache = model(ids, use_cache=True).past_key_values
            with pruner.prompt():
                found = model(ids, past_key_values=cache).logits
        elif how == "last":
            found = model(ids, logits_to_keep=1).logits
        else:
            found = model(ids).logits
    return found, [keep.clone() for keep in pruner.trace.routed.keep]


def calls_side_by_side(model, pruner, calls, threads):
    expected = [asked(model, pruner, *call) for call in calls]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda call: asked(model, pruner, *call), calls))
    for (a, keep_a), (b, keep_b) in zip(expected, found):
        assert torch.equal(a, b)
        assert all(torch.equal(x, y) for x, y in zip(keep_a, keep_b, strict=True))


WAYS = ("forward", "generate", "prompt", "last")


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_threads_get_their_own_answers(kv):
    model = tiny_llama()
    pruner = TokenPruner(DynamicRouter(), SCHEDULE, kv=kv)
    with pruner(model):
        calls_side_by_side(model, pruner, [(n, WAYS[n % 4]) for n in range(24)], 8)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("decode", ["dense", "strict"])
def test_two_thousand_calls_of_eight_threads(kv, decode):
    model = tiny_llama()
    pruner = TokenPruner(DynamicRouter(), SCHEDULE, kv=kv, decode=decode)
    with pruner(model):
        calls_side_by_side(model, pruner, [(n, WAYS[n % 4]) for n in range(500)], 8)


def test_training_in_one_thread_leaves_the_others_alone():
    model, pruner = tiny_llama(), TokenPruner(DynamicRouter(), SCHEDULE, kv="keep")
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    with pruner(model), torch.no_grad():
        expected = model(ids).logits
        found = []
        with pruner.masked(8):
            other = threading.Thread(target=lambda: found.append(model(ids).logits))
            other.start()
            other.join()
    assert torch.equal(found[0], expected)


def slow_block(model, inside, go_on):
    """The model's last block says when it runs, and waits."""

    def wait(*_):
        inside.set()
        assert go_on.wait(20)

    return model.model.layers[-1].register_forward_pre_hook(wait)


def test_detach_waits_for_a_call_of_another_thread():
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = []
    with pruner(model), torch.no_grad():
        expected.append(model(ids).logits)
    pruner.attach(model)
    inside, go_on, found = threading.Event(), threading.Event(), []
    handle = slow_block(model, inside, go_on)
    call = threading.Thread(target=lambda: found.append(model(ids).logits.detach()))
    call.start()
    assert inside.wait(20)
    leave = threading.Thread(target=pruner.detach)
    leave.start()
    time.sleep(0.05)
    assert leave.is_alive() and "forward" in model.model.__dict__
    go_on.set()
    call.join(20)
    leave.join(20)
    handle.remove()
    assert torch.equal(found[0], expected[0]) and "forward" not in model.model.__dict__
    assert not hasattr(model, "pruner")


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_a_call_that_waits_for_another_threads_call_does_not_lock_detach(how):
    """The second call comes while a detach waits for the first one: it runs the stock model, and waits for nobody."""
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = model(ids).logits
    pruner.attach(model)
    gate, inside, found = pruner._attached.gate, threading.Event(), []

    def ask():
        with torch.no_grad():
            found.append(model(ids).logits if how == "forward" else model.generate(ids, max_new_tokens=1))

    def wait(*_):
        handle.remove()
        inside.set()
        while gate._state == "open":
            time.sleep(0.001)
        second = threading.Thread(target=ask, daemon=True)
        second.start()
        second.join(5)
        assert not second.is_alive()

    handle = model.model.layers[-1].register_forward_pre_hook(wait)
    first = threading.Thread(target=ask, daemon=True)
    first.start()
    assert inside.wait(20)
    pruner.detach()
    first.join(20)
    assert len(found) == 2 and "forward" not in model.model.__dict__
    assert torch.equal(found[0], stock if how == "forward" else torch.cat([ids, stock[:, -1:].argmax(-1)], 1))


def test_a_call_whose_attention_is_untapped_half_way_runs_the_stock_one():
    """It has read the name of our attention function from the module's config, and then another thread detaches."""
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    attention = model.model.layers[1].self_attn
    x = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    with pruner(model):
        ours = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    stock = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    assert ours is not stock and torch.equal(ours(attention, x, x, x, None)[0], stock(attention, x, x, x, None)[0])


def test_detach_inside_a_call_is_refused():
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    ids = torch.randint(3, 64, (1, 12))
    with pruner(model):
        handle = model.model.layers[-1].register_forward_pre_hook(lambda *_: pruner.detach())
        with pytest.raises(UserError, match="while its model is running"):
            model(ids)
        handle.remove()
        model(ids)


def test_attaching_while_another_thread_runs_the_stock_model():
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    ids = torch.randint(3, 64, (1, 12))
    with torch.no_grad():
        expected = model(ids).logits
    inside, go_on, found = threading.Event(), threading.Event(), []
    handle = slow_block(model, inside, go_on)
    call = threading.Thread(target=lambda: found.append(model(ids).logits.detach()))
    call.start()
    assert inside.wait(20)
    pruner.attach(model)
    go_on.set()
    call.join(20)
    handle.remove()
    assert torch.equal(found[0], expected)
    pruner.detach()


def test_of_two_threads_that_attach_a_pruner_each_one_is_refused(monkeypatch):
    """Both would find the model free where neither waits for the other."""
    model, pruners = tiny_llama(), [TokenPruner(RandomRouter(number), SCHEDULE) for number in range(2)]
    monkeypatch.setattr(RandomRouter, "check_model", lambda *_: time.sleep(0.05))

    def attach(pruner):
        try:
            pruner.attach(model)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(attach, pruners))
    assert sorted(text is None for text in said) == [False, True] and "another pruner" in str(said)
    for pruner in pruners:
        pruner.detach()
    assert "forward" not in model.model.__dict__


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not():
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    inside, go_on = threading.Event(), threading.Event()
    pruner.attach(model)
    handle = slow_block(model, inside, go_on)
    call = threading.Thread(target=lambda: model(torch.randint(3, 64, (1, 12))))
    call.start()
    assert inside.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        pruner.detach()
        os._exit(0)
    go_on.set()
    call.join(20)
    handle.remove()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pruner.detach()


def test_a_copy_of_a_model_and_its_pruner_stand_alone():
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    ids = torch.randint(3, 64, (1, 12))
    with torch.no_grad(), pruner(model):
        expected = model(ids).logits
        other = copy.deepcopy(model)
        assert torch.equal(other(ids).logits, expected)
        assert other.pruner is not pruner
        other.pruner.detach()
        assert torch.equal(model(ids).logits, expected)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_a_trace_is_the_threads_own_until_a_later_thread_has_ended():
    """A streamer's thread has ended when its text is read; a server's threads go on."""
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    ids = torch.randint(3, 64, (1, 12))
    done, go_on = threading.Event(), threading.Event()

    def other():
        with torch.no_grad():
            model(ids[:, :7])
        done.set()
        assert go_on.wait(20)

    with torch.no_grad(), pruner(model):
        model(ids)
        thread = threading.Thread(target=other)
        thread.start()
        assert done.wait(20) and pruner.trace.real.shape == (1, 12)
        go_on.set()
        thread.join(20)
        assert pruner.trace.real.shape == (1, 7)
        model(ids)
        assert pruner.trace.real.shape == (1, 12)


def test_a_detach_that_is_interrupted_leaves_the_pruner_in_force(monkeypatch):
    """Ctrl-C while it waits for a call that does not end: later calls are answered, and a later detach works."""
    model, pruner = tiny_llama(), TokenPruner(RandomRouter(1), SCHEDULE)
    ids = torch.randint(3, 64, (1, 12))
    pruner.attach(model)
    with torch.no_grad():
        expected, found = model(ids).logits, []

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Condition, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruner.detach()
    call = threading.Thread(target=lambda: found.append(model(ids).logits.detach()), daemon=True)
    call.start()
    call.join(20)
    assert torch.equal(found[0], expected) and "forward" in model.model.__dict__
    pruner.detach()
    assert "forward" not in model.model.__dict__
