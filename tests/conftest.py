"""All tests are offline and use one thread, so that they measure the same thing everywhere."""

import gc
import os

gc.disable()  # until all is imported: looking for garbage takes a fifth of that time

# Before anything imports the Hub's client.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported by now stays: memory is measured after a full collection of garbage, which would look at all of
    it again each time, for half a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder, in this process: returns (exit status, stdout, stderr)."""
    from ftp_lightning.__main__ import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
