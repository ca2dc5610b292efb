"""A training that is stopped goes on to the very router that it would have had."""

import errno
import os
import signal

import pytest
import torch
from test_engine import seeded, tiny_llama
from test_router_training import SCHEDULE, windows

from ftp_lightning import DynamicRouter, TokenPruner, stopping
from ftp_lightning.errors import Interrupted, UserError
from ftp_lightning.lit.checkpoints import BEST, HISTORY, LAST
from ftp_lightning.lit.fitting import fit_router
from ftp_lightning.lit.training_settings import TrainingSettings

SETTINGS = {"steps": 9, "batch_size": 2, "accumulate": 2, "validations": 3, "gates": "gumbel", "seed": 2}


def train(folder, stop_at=None, number=signal.SIGTERM, fingerprint="same", **changes):
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")

    told = []

    def tell(step, steps):  # at the end of every batch, of which a step has two; a second signal would leave at once
        if step == stop_at and not told:
            told.append(step)
            os.kill(os.getpid(), number)

    settings = TrainingSettings(**SETTINGS | changes)
    model = tiny_llama(torch.float32)
    metrics = fit_router(model, pruner, windows(9), windows(4, 9), settings, folder, None, tell, fingerprint)
    return metrics, torch.cat([value.flatten() for value in pruner.router.state_dict().values()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "stop_at,number", [(1, signal.SIGTERM), (3, signal.SIGUSR1), (6, signal.SIGTERM), (7, signal.SIGTERM)]
)
def test_saved_by_a_signal_it_goes_on_to_the_same_router(whole, tmp_path, stop_at, number):
    with pytest.raises(SystemExit) as left:
        train(tmp_path, stop_at, number)
    assert left.value.code == 128 + number
    saved = torch.load(tmp_path / "checkpoints" / LAST, weights_only=True)
    assert saved["global_step"] in (stop_at, stop_at + 1)  # the signal is heard in the step after this one
    assert (tmp_path / "checkpoints" / LAST).stat().st_size < 100_000
    metrics, weights = train(tmp_path)
    assert metrics == whole[0] and torch.equal(weights, whole[1])


def test_after_a_kill_it_goes_on_from_the_last_validation(whole, tmp_path):
    class Killed(Exception):
        pass

    def die(step, steps):
        if step == 8:
            raise Killed

    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    settings, model = TrainingSettings(**SETTINGS), tiny_llama(torch.float32)
    with pytest.raises(Killed):
        fit_router(model, pruner, windows(9), windows(4, 9), settings, tmp_path, None, die, "same")
    history = tmp_path / "checkpoints" / HISTORY
    history.write_text(history.read_text() + '{"step": 9, "half a li')
    metrics, weights = train(tmp_path)
    assert metrics == whole[0] and torch.equal(weights, whole[1])


def test_one_that_is_done_and_asked_again_says_the_same(whole, tmp_path):
    assert train(tmp_path)[0] == train(tmp_path)[0] == whole[0]


def test_checkpoints_of_another_training_are_refused_and_kept(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, 3, fingerprint="another")
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    for fingerprint in ("same", ""):
        with pytest.raises(UserError, match="checkpoints of another training"):
            train(tmp_path, fingerprint=fingerprint)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


@pytest.mark.parametrize("name", [LAST, BEST, HISTORY])
def test_a_broken_checkpoint_is_set_aside_and_said(whole, tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        train(tmp_path, 7)
    (tmp_path / "checkpoints" / name).write_bytes(b"nothing that torch can read")
    assert train(tmp_path)[0] == whole[0]
    assert (tmp_path / "checkpoints" / f"{name}.broken-1").read_bytes() == b"nothing that torch can read"
    assert f"{name}.broken-1" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_read_just_now_is_kept(whole, tmp_path, monkeypatch, number):
    with pytest.raises(SystemExit):
        train(tmp_path, 7)

    def failing(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=os.strerror(number)):
        patch.setattr("zipfile.ZipFile", failing)
        train(tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*broken*"))
    assert train(tmp_path)[0] == whole[0]


def test_a_checkpoint_is_not_written_by_way_of_another_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", lambda *_: pytest.fail("by way of TMPDIR"))
    with pytest.raises(SystemExit):
        train(tmp_path, 7)
    assert {LAST, BEST, HISTORY} == {path.name for path in (tmp_path / "checkpoints").iterdir()}


@pytest.fixture
def heard():
    """SIGINT is heard: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_handlers_of_signals_are_put_back_after_a_training(tmp_path, number, heard):
    before = [signal.getsignal(one) for one in stopping.SIGNALS]
    with pytest.raises(SystemExit) as left:
        train(tmp_path, 1, number, steps=3, validations=1)
    assert left.value.code == 128 + number
    train(tmp_path, steps=3, validations=1)
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == before
