"""The index of the tasks asked for says what lm-eval's index of all tasks says of them."""

import pytest
from lm_eval.tasks import TaskManager

from ftp_lightning.evaluation.harness import index
from ftp_lightning.evaluation.harness.index import names_like, task_manager

FILES = {
    "colours/_template": "tag: colour_tasks\noutput_type: multiple_choice\n",
    "colours/red.yaml": "include: _template\ntask: red\ndataset_path: here\n",
    "colours/deep/blue.yaml": "include: ../_template\ntask: 'blue'\ntag:\n  - cold\n  - colour_tasks\n",
    "colours/group.yaml": "group: colours\ntask:\n- red\n- task: blue\n  num_fewshot: 1\n",
    "colours-more/again.yaml": "task: red\ndataset_path: there\n",
    "shapes/outside.yaml": "include: ../colours/deep/blue.yaml\ntask: square\n",  # inherits both tags
    "shapes/taken.yaml": "include: middle/one\ntask: circle\n",
    "shapes/middle/one": "include: ../../warm/last\n",
    "warm/last": "tag: [round, warm]\n",
    "many/all.yaml": "group: everything\ntask:\n- group: inner\n  task:\n  - square\n  - cold\n- group: colours\n",
    "many/broken.yaml": "include: ../nowhere/missing\ntask: lost\n",
}
NAMES = ["red", "blue", "colours", "colour_tasks", "cold", "square", "circle", "round", "everything", "lost"]


def agrees(names, whole: dict) -> set[str]:
    """Check what the index of `names` says of them and of their members against `whole`; returns their names."""
    found, open_names, seen = task_manager(names).task_index, list(names), set()
    while open_names:
        name = open_names.pop()
        if name not in seen:
            seen.add(name)
            assert found.get(name) == whole.get(name), name
            open_names += index._members([name], whole)
    return seen


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(index, "_root", lambda: tmp_path)
    clear = [index._manager.cache_clear, index._folders_of_names.cache_clear]
    for one in clear:
        one()
    yield TaskManager(include_defaults=False, include_path=tmp_path).task_index
    for one in clear:
        one()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_its_members_are_as_in_the_whole_index(made_up, name):
    assert (name in made_up) is (name != "lost")
    agrees([name], made_up)


def test_members_of_groups_in_groups_are_found(made_up):
    seen = agrees(["everything"], made_up)
    assert seen == {"everything", "inner", "colours", "red", "blue", "square", "cold"}
    assert made_up["red"].cfg["dataset_path"] == "there"  # lm-eval takes the first of two in the order of their paths


def test_only_the_folders_of_the_tasks_asked_for_are_parsed():
    assert {"winogrande"} <= set(task_manager(["winogrande"]).all_tasks)
    assert len(task_manager(["winogrande"]).all_tasks) < 200
    mmlu = task_manager(["mmlu"])
    assert len([task for task in mmlu.task_index["mmlu_stem_tasks"].tags if task in mmlu.task_index]) == 19
    assert task_manager([]).all_tasks == [] and "no_such_task" not in task_manager(["no_such_task"]).all_tasks


def test_names_that_are_suggested_exist():
    assert names_like("winogrand")[0] == "winogrande"
    assert names_like("[DONE]") == []  # a stop word that stands in a list


@pytest.mark.slow  # lm-eval parses all of its files: 15 s
def test_every_name_of_lm_eval_is_found_in_all_the_folders_that_declare_it():
    whole, folders = TaskManager().task_index, index._folders_of_names()
    for name, entry in whole.items():
        paths = [entry.yaml_path] if entry.yaml_path else [whole[task].yaml_path for task in entry.tags]
        assert {path.relative_to(index._root()).parts[0] for path in paths} <= folders[name], name
    agrees(["mmlu", "leaderboard", "arc_easy", "gsm8k", "lambada", "ruler", "mgsm_direct", "pythia"], whole)
