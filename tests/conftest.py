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


LONGEST = """stages policies search_genetic generate train_stage training_resume report processes sweep_files estimate
    compensation benchmark_stage host_sync device_map quantised tune_stage real_engine made_tasks sweep_stage
    block_sensitivity notebooks stopping""".split()
"""Files that take longest: started first, so that no process is left with one of them when the others have finished."""


def pytest_collection_modifyitems(items: list) -> None:
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: memory is measured after a full collection of garbage, which would look at all of
    it again each time, for half a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def settled() -> None:
    """As after collection, with what was imported since: for tests that measure memory many times."""
    gc.collect()
    gc.freeze()


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
