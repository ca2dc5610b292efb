"""A training that is stopped goes on to the very router that it would have had."""

import os
import signal

import pytest
import torch
from test_engine import seeded, tiny_llama
from test_router_training import SCHEDULE, windows

from ftp_lightning import DynamicRouter, TokenPruner
from ftp_lightning.lit.fitting import HISTORY, LAST, fit_router
from ftp_lightning.lit.training_settings import TrainingSettings

SETTINGS = {"steps": 12, "batch_size": 2, "accumulate": 2, "validations": 4, "gates": "gumbel", "seed": 2}


def train(folder, stop_at=None, number=signal.SIGTERM, fingerprint="same", **changes):
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")

    def tell(step, steps):
        if step == stop_at:
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


def test_a_checkpoint_of_another_training_or_a_broken_one_is_not_gone_on_from(whole, tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, 3, fingerprint="another")
    assert train(tmp_path)[0] == whole[0]
    with pytest.raises(SystemExit):
        train(tmp_path / "broken", 3)
    (tmp_path / "broken" / "checkpoints" / LAST).write_bytes(b"nothing that torch can read")
    assert train(tmp_path / "broken")[0] == whole[0]
