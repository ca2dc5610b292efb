"""Whole evaluations: several processes, a real kill, real data, and the studies as their first lines say."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ftp_lightning.__main__ import main
from ftp_lightning.errors import UserError
from ftp_lightning.processes import launch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the data sets beside the checkout")
SMALL = "--model random:tiny --tasks story_recall,question_both --items 30 --windows 2 --budget 0.3 --batch_size 2"
SMALL = [*SMALL.split(), "--prompt_tokens", "96"]


def script(name, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    return runpy.run_path(str(ROOT / "experiments" / name), run_name="__main__")


def read(folder, name="results.json"):
    return (Path(folder) / name).read_text()


def test_the_plan_of_the_papers_tables_and_what_it_costs(monkeypatch, capsys, tmp_path):
    script("reproduce.py", monkeypatch, "--dry", 1, "--estimate", "1x80", "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert "embedded, 32 stages on 1 x A100 of 80 GB:" in said and "  evaluate: 0.0 hours" in said
    places = [line.split(":")[0] for line in said.splitlines() if ": ftp-lightning " in line]
    assert len(places) == len(set(places)) and {"0.22/evaluate", "inputs/hidden/train", "0.4/benchmark"} <= set(places)
    assert places.index("0.3/train") < places.index("allocation/uniform/search") and not (tmp_path / "out").exists()
    script("reproduce.py", monkeypatch, "--dry", 1, "--only", "1", "--output", tmp_path / "out")
    assert capsys.readouterr().out.count(": ftp-lightning ") == 5


@pytest.mark.slow
@pytest.mark.parametrize("model", ["random:tiny", "embedded"])
def test_the_papers_tables_with_reduced_limits(monkeypatch, capsys, tmp_path, model):
    sizes = "--limit 3 --windows 2 --search_windows 2 --generations 1 --offspring 1 --steps 2 --lengths 64 --pairs 2"
    words = f"--model {model} --tasks story_recall,story_name --budgets 0.3,0.4 --device cpu --output {tmp_path}"
    words = [*sizes.split(), *words.split()]
    script("reproduce.py", monkeypatch, *words)
    assert {f"table{n}.csv" for n in range(1, 7)} | {"tables.md", "tables.tex"} < {p.name for p in tmp_path.iterdir()}
    text = " ".join(read(tmp_path, "tables.md").split())
    assert text.count("quoted") >= 20 and f"| {model} | FTP (ours) | 40.0 |" in text and "80.2" in text
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("provenance.json")}
    script("reproduce.py", monkeypatch, *words)  # finished stages are not run again
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_numbers(tmp_path):
    assert main(["evaluate", *SMALL, "--output", str(tmp_path / "whole")]) == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ftp_lightning", "evaluate", *SMALL, "--output", str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    answers = tmp_path / "killed" / "answers"
    wait_for(lambda: sum(path.read_bytes().count(b"\n[") for path in answers.glob("*.jsonl")) >= 4, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "results.json").exists()
    assert main(["evaluate", *SMALL, "--output", str(tmp_path / "killed")]) == 0
    for name in ("results.json", "record.jsonl", "tables.md"):
        assert read(tmp_path / "killed", name) == read(tmp_path / "whole", name)
    assert not answers.exists()


def wait_for(what, process, seconds=600):
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < end, "the evaluation ended before it could be killed"
        time.sleep(0.05)


def share_of_tasks(processes, device, folder):
    """What one process of several makes of a task; the first has all items."""
    from ftp_lightning.evaluation.harness.model import FtpLM
    from ftp_lightning.evaluation.harness.tasks import run_tasks
    from ftp_lightning.pruning import TokenPruner
    from ftp_lightning.routing import StaticRouter
    from ftp_lightning.schedule import Schedule

    lm = FtpLM("random:tiny", pruner=TokenPruner(StaticRouter(), Schedule.uniform(3, 0.4)), batch_size=2, device="cpu")
    found = run_tasks(lm, {"story_recall": folder / "recall.jsonl"})
    lm.close()
    return lm.world_size, found


@pytest.mark.slow
def test_two_processes_share_the_items_and_find_the_same(tmp_path):
    rows = [
        {"id": f"r{i}", "context": f"The old man number {i} walked " * (3 + i), "choices": [" a", " b c"], "answer": 0}
        for i in range(5)
    ]
    (tmp_path / "recall.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (_, alone), (count, shared) = (launch(n, torch.device("cpu"), share_of_tasks, tmp_path) for n in (1, 2))
    assert count == 2
    alone, shared = alone["story_recall"], shared["story_recall"]
    assert [item["id"] for item in shared["items"]] == [f"r{i}" for i in range(5)]
    for one, two in zip(alone["items"], shared["items"], strict=True):
        assert one["answers"] == pytest.approx(two["answers"], abs=1e-4)
        assert (one["sparsity"], one["prompt_tokens"]) == (two["sparsity"], two["prompt_tokens"])


@pytest.mark.slow
@needs_shared
def test_real_data_in_float32_equal_hf_and_shared_contexts_are_twice_as_fast():
    """The reference model on 200 items of MMLU: every log-likelihood, and the time of prefilling a context once."""
    from lm_eval.models.huggingface import HFLM

    from ftp_lightning.evaluation.harness.model import FtpLM
    from ftp_lightning.evaluation.harness.task_data import find_files
    from ftp_lightning.evaluation.harness.tasks import load_tasks

    base = str(SHARED / "models" / "llama-books-10m")
    names = ("anatomy", "astronomy", "virology", "marketing")
    loaded = load_tasks({f"mmlu_{name}": find_files(f"mmlu_{name}", SHARED / "data") for name in names})
    requests = []
    for task in loaded:
        task.set_config(key="num_fewshot", value=1)
        task.build_all_requests(limit=50)
        requests += task.instances
    assert len(requests) == 800
    lm = FtpLM(base, dtype="float32", device="cpu", batch_size=8)
    tokens = []
    lm.model.model.embed_tokens.register_forward_pre_hook(lambda _, asked: tokens.append(asked[0].numel()))
    together, shared = lm.loglikelihood(requests, disable_tqdm=True), sum(tokens)
    alone = [lm.loglikelihood([request], disable_tqdm=True)[0] for request in requests]
    one_by_one = sum(tokens) - shared
    hf = HFLM(base, dtype="float32", device="cpu", batch_size=8).loglikelihood(requests, disable_tqdm=True)
    for other in (alone, hf):
        assert [x for x, _ in together] == pytest.approx([x for x, _ in other], abs=1e-4)
    assert one_by_one > 2 * shared


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("task", ["arc_challenge", "arc_easy", "hellaswag", "winogrande"])
def test_real_tasks_equal_hf_on_every_item(task):
    from lm_eval.models.huggingface import HFLM

    from ftp_lightning.evaluation.harness.model import FtpLM
    from ftp_lightning.evaluation.harness.task_data import find_files
    from ftp_lightning.evaluation.harness.tasks import run_tasks

    base, files = str(SHARED / "models" / "llama-books-10m"), {task: find_files(task, SHARED / "data")}
    ours, theirs = (
        run_tasks(kind(base, dtype="float32", device="cpu", batch_size=size), files, limit=40)[task]["items"]
        for kind, size in ((FtpLM, 7), (HFLM, 1))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a["answers"] == pytest.approx(b["answers"], abs=1e-4) and a["score"] == b["score"]


def test_two_runs_are_compared_item_by_item(monkeypatch, capsys, tmp_path):
    for name, right in (("a", 1.0), ("b", 0.0)):
        (tmp_path / name).mkdir()
        rows = [
            {"method": "m", "seed": 0, "task": "t", "item": i, "hash": str(i), "score": right, "right": bool(right)}
            for i in range(6)
        ]
        (tmp_path / name / "record.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script("compare_runs.py", monkeypatch, tmp_path / "a", tmp_path / "b", "--show", 2)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "6 items in both, 0 in one only" in said
        and "| t | A | B | 6 | 6 |" in said
        and "+100.0" in said
        and "0.031" in said
    )
    assert "t 0: gained by A" in said and "t: 4 more" in said
    with pytest.raises(SystemExit):
        script("compare_runs.py", monkeypatch, tmp_path / "a", tmp_path / "b", "--a", "x")
    assert "has no method 'x'" in capsys.readouterr().err


def test_unknown_tasks_are_told_with_the_nearest_names():
    from ftp_lightning.stages.task_files import check_tasks

    check_tasks(["story_recall", "question_first", "arc_easy", "gsm8k"])
    with pytest.raises(UserError, match=r"unknown task 'hellaswagg'\nDid you mean .*hellaswag"):
        check_tasks(["hellaswagg"])
