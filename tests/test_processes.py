"""Several processes find what one finds, and say so where they differ."""

import random

import pytest
import torch

from ftp_lightning.errors import UserError
from ftp_lightning.processes import Processes, launch
from ftp_lightning.schedule import Schedule
from ftp_lightning.search import allocations
from ftp_lightning.search.fitness import MemoFitness
from ftp_lightning.search.genetic import genetic_search
from ftp_lightning.search.settings import SearchSettings

BLOCKS, SETTINGS = 6, SearchSettings(budget=0.4, generations=4, offspring=7, survivors=(3,), stage_windows=(2,))
SEEDS = {"uniform": Schedule.uniform(BLOCKS, 0.4), "late": allocations.late(BLOCKS, 0.4)}


class Noisy(MemoFitness):
    """Counts what this process measured itself."""

    def __init__(self, sizes=(2, 2, 1)):
        super().__init__(sizes)
        self.measured = 0

    def measure(self, schedule, chunk):
        self.measured += 1
        return random.Random(f"{schedule.key()}/{chunk}").random()

    def cost(self, schedule, chunk):
        return self.sizes[chunk]


def search(processes, sizes=(2, 2, 1)):
    fitness = Noisy(sizes)
    found = genetic_search(fitness, BLOCKS, SETTINGS, SEEDS, processes=processes)
    return found, processes.gather(fitness.measured)


def fail_at_one(item):
    if item == 1:
        raise KeyError("item one")
    return item


def refuse_one(item):
    if item == 1:
        raise UserError("item one is not possible")
    return item


def walk(processes, device):
    """What the tests below look at, in one launch: starting processes is slow."""
    found, measured = search(processes)
    wrong = {
        "other data": lambda: search(processes, sizes=(2, 2, 2) if processes.rank else (2, 2, 1)),
        "drift": lambda: processes.check_equal("the population of generation 3", "ab"[processes.rank]),
        "failure": lambda: processes.map(fail_at_one, range(3)),
        "refusal": lambda: processes.map(refuse_one, range(3)),
    }
    told = {}
    for name, run in wrong.items():
        try:
            run()
        except Exception as error:
            told[name] = (type(error).__name__, str(error))
    return found, measured, processes.gather(told), torch.get_num_threads(), processes.from_first(processes.rank)


def refuse(processes, device):
    raise UserError("this cannot be searched\nTry another.")


@pytest.fixture(scope="module")
def two():
    return launch(2, torch.device("cpu"), walk)


def test_two_processes_share_the_work_and_find_what_one_finds(two):
    alone = genetic_search(Noisy(), BLOCKS, SETTINGS, SEEDS)
    found, measured, _, threads, first = two
    assert found == alone and first == 0
    assert sum(measured) == alone.generations[-1]["evaluations"]
    assert max(measured) <= 0.6 * sum(measured) and threads == max(1, torch.get_num_threads() // 2)


def test_processes_that_differ_or_fail_end_together(two):
    here, there = two[2]
    assert here == there  # every process raises, so that none waits for another
    assert here["other data"][0] == "UserError" and "what is searched of process 1" in here["other data"][1]
    assert "the population of generation 3 of process 1 is b, that of process 0 a" in here["drift"][1]
    assert here["failure"][0] == "RuntimeError" and "process 1 failed" in here["failure"][1]
    assert "item one" in here["failure"][1]
    assert here["refusal"] == ("UserError", "item one is not possible")


@pytest.mark.slow
def test_a_refusal_in_all_processes_comes_home_as_one():
    with pytest.raises(UserError, match="this cannot be searched"):
        launch(2, torch.device("cpu"), refuse)


def test_one_process_needs_no_fabric():
    alone = Processes()
    assert alone.map(lambda x: 2 * x, range(3)) == [0, 2, 4] and alone.from_first(7) == 7
    alone.check_equal("anything", object())


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(UserError, match="there are"):
        launch(torch.cuda.device_count() + 1, torch.device("cuda"), refuse)
