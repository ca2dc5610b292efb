"""The chain end to end on the embedded model, tiny in every size; and what each stage promises about its folder."""

import json
import shutil
from pathlib import Path

import pytest
from made_up_run import Page
from pictures import sketch

from ftp_lightning import Schedule, TokenPruner, UserError, load_pruned
from ftp_lightning.__main__ import main, parse
from ftp_lightning.evaluation import record as of
from ftp_lightning.evaluation.outcome import counted_tasks, retention
from ftp_lightning.fingerprint import hash_path
from ftp_lightning.models import load_model
from ftp_lightning.products import read_provenance
from ftp_lightning.report.sections import SECTIONS
from ftp_lightning.stages.run import RunStage, gains
from ftp_lightning.stages.run_work import WORK, shares
from ftp_lightning.stages.search import starting_pruner

SIZES = """--sensitivity_windows 1 --search_windows 1 --generations 1 --finetune_generations 1 --offspring 2 --steps 2
    --validation_windows 1 --batch_size 1 --items 8 --limit 3 --test_windows 2 --lengths 64 --pairs 2 --prompt_tokens 96
    --continuation_tokens 16""".split()
METHODS = ["random", "uniform", "first_dense", "block_influence", "static", "dynamic (before fine-tuning)", "dynamic"]


@pytest.fixture(scope="module")
def chain(settled, tmp_path_factory) -> Path:
    """The folder of one tiny run of the embedded model at a budget of 30 %."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ftp_lightning.report.page.draw", sketch)  # tests/test_report.py draws
        assert main(["run", "--output", str(folder), *SIZES]) == 0
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_stage_is_finished_and_says_how_it_came_about(chain):
    for stage in WORK:
        names = {path.name for path in (chain / stage).iterdir()}
        assert {"config.yaml", "metrics.json", "provenance.json"} <= names
        assert set(read_provenance(chain / stage)["files"]) <= names
        assert not [name for name in names if "partial" in name or name == "state.json"]
    figures = {f"figure-{plot.name}" for section in SECTIONS for plot in section.plots}
    assert figures <= Page(chain / "report.html").ids()


def test_products_hold_no_paths(chain):
    text = "".join(path.read_text(errors="ignore") for path in chain.rglob("*.json") if path.name != "provenance.json")
    assert str(chain.parent) not in text and str(Path.home()) not in text


def test_both_searches_meet_the_budget_exactly(chain):
    for stage in ("search", "finetune", "static"):
        schedule = Schedule.load(chain / stage / "schedule.json")
        assert schedule.num_blocks == 12 and abs(schedule.budget - 0.3) <= 1e-9
        found = read(chain / stage / "metrics.json")
        assert found["value"] <= min(found["allocations"].values())
        assert found["generations"][-1]["best"] == found["value"]
    assert set(read(chain / "search/metrics.json")["allocations"]) == {
        "uniform", "ramp", "late", "first dense", "default", "block influence", "gradient", "sensitivity",
    }  # fmt: skip
    assert {"start", "given"} <= set(read(chain / "finetune/metrics.json")["allocations"])


def test_fine_tuning_keeps_the_router_and_changes_the_schedule(chain):
    trained, tuned = (TokenPruner.load(chain / stage / "pruned") for stage in ("train", "finetune"))
    assert trained.router.parameter_count == 450
    state = tuned.router.state_dict()
    assert all(state[name].equal(value) for name, value in trained.router.state_dict().items())
    assert trained.schedule == Schedule.load(chain / "search/schedule.json")
    assert tuned.schedule == Schedule.load(chain / "finetune/schedule.json")


def test_the_pruned_folder_is_loaded_with_its_base(chain):
    model, tokenizer = load_pruned(chain / "finetune" / "pruned")
    assert model.config.num_hidden_layers == 12 and tokenizer.vocab_size == model.config.vocab_size


def test_results_have_the_shape_that_the_report_reads(chain):
    results = read(chain / "evaluate" / "results.json")
    assert set(results) == {"dense", "noise_floor", "methods", "counted", "paired"}
    assert [method["name"] for method in results["methods"]] == METHODS
    assert results["noise_floor"]["against"] == "eager attention, one row at a time"
    assert results["noise_floor"]["kl"] > 0.0
    assert set(results["dense"]["tasks"]) == {"story_recall", "story_ending", "story_name"}
    for method in results["methods"]:
        assert (method["kv"], len(method["realised_per_block"])) == ("keep", 12)
        assert method["budget"] == pytest.approx(0.3, abs=1e-9)
        assert method["realised_sparsity"] == pytest.approx(0.3, abs=0.01)
        assert 0.0 < method["flops_reduction"] < 0.3
        assert method["kl"]["mean"] > results["noise_floor"]["kl"] >= 0.0
        assert set(method["ppl"]) == {"prompt", "sequence"} and method["kl_sequence"] > 0.0
        kept = method["kept"]
        assert kept["low"] <= kept["share"] <= kept["high"] and kept["items"] > 0
        assert sum(bucket["items"] for bucket in kept["by_distance"].values()) == kept["items"]
        for cell in method["tasks"].values():
            assert cell["low"] <= cell["acc"] <= cell["high"] and 0 < cell["flops_cut"] < 0.3
            assert cell["measures"] is (cell["exercised"] and not cell["near_chance"] and cell["acc"] is not None)
            assert cell["truncated"] == 0 and cell["prompt_tokens"] > 60
            assert cell["sparsity"] == pytest.approx(0.3, abs=0.02)


def test_the_record_tells_every_item_and_method(chain):
    items = of.read_record(chain / "evaluate/record.jsonl")
    recall = items[items.task == "story_recall"]
    assert recall.groupby("method", sort=False).size().to_dict() == dict.fromkeys(["dense", *METHODS], 3)
    dense = read(chain / "evaluate/results.json")["dense"]["tasks"]["story_recall"]
    assert dense["n"] == 3
    twins = items[items.task.str.endswith("_deleted")]
    assert set(twins.method) == {"dense"}  # without their facts questions are asked of the dense model alone
    asked = items[items.hash.notna()]
    assert set(asked.hash.str.len()) == {16} and all(len(answers) == 4 for answers in recall.answers)
    pruned = recall[recall.method != "dense"]
    assert (pruned.flops < pruned.dense_flops).all() and (pruned.kv_bytes == pruned.dense_kv_bytes).all()
    for method in METHODS:  # the text of an evaluation stands in its record, too
        text = items[(items.method == method) & (items.task == "text")]
        assert len(text) > 0 and text.kl.notna().all() and (text.flops < text.dense_flops).all()


def test_tables_are_written_in_three_formats_and_answers_are_gone(chain):
    folder = chain / "evaluate"
    assert "| noise floor: dense, eager attention" in (folder / "tables.md").read_text()
    assert (folder / "tables.tex").read_text().count("\\begin{table}") == 3
    assert (
        (folder / "pairs.csv")
        .read_text()
        .startswith("task,a,b,items,clusters,seeds,difference,low,high,lost,gained,p\n")
    )
    assert not (folder / "answers").exists()


def test_tokens_count_the_blocks_that_computed_them(chain):
    story = read(chain / "evaluate" / "tokens.json")
    assert story["num_blocks"] == len(story["keep"]) == 12 and len(story["tokens"]) == 96
    assert story["computed_by"] == [sum(column) for column in zip(*story["keep"])]
    assert story["computed_by"][0] == story["computed_by"][-1] == 12  # the reserved tokens


def test_the_benchmark_stands_beside_the_flops_limit(chain):
    (row,) = read(chain / "benchmark" / "benchmark.json")["rows"]
    assert (row["length"], row["batch"], row["kv"]) == (64, 1, "keep")
    assert row["low"] <= row["speedup"] <= row["high"] and 1.0 < row["flops_limit"] < 2.0


def test_a_finished_run_is_left_alone_and_an_interrupted_one_resumes_to_the_same_products(
    chain, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ftp_lightning.report.page.draw", lambda plot, rows: None)  # drawn by the first run already
    folder = tmp_path / "again"
    shutil.copytree(chain, folder)
    before = hash_path(folder / "finetune" / "pruned"), (folder / "finetune" / "schedule.json").read_bytes()
    (folder / "finetune" / "provenance.json").unlink()  # as if killed
    (folder / "finetune" / "schedule.json").unlink()
    assert main(["run", "--output", str(folder), *SIZES]) == 0
    told = capsys.readouterr().err
    assert told.count("is done already") == 6 and "finetune: measuring" in told
    assert (hash_path(folder / "finetune" / "pruned"), (folder / "finetune" / "schedule.json").read_bytes()) == before


def test_a_run_with_other_settings_is_refused_and_nothing_changes(chain, capsys):
    before = hash_path(chain)
    assert main(["run", "--output", str(chain), *SIZES, "--seed", "1"]) == 2
    told = capsys.readouterr().err
    assert "seed 0 -> 1" in told and "--overwrite" in told
    assert hash_path(chain) == before


def test_generate_shows_both_texts(chain, tmp_path, capsys):
    pruned = chain / "finetune" / "pruned"
    words = ["--pruned", str(pruned), "--output", str(tmp_path), "--max_new_tokens", "4", "--pairs", "1"]
    for prompt in ([], ["--prompt", "Once upon a time there was a miller who kept a goat in the orchard."]):
        assert main(["generate", *words, *prompt]) == 0  # a second prompt needs no --overwrite
    shown, found = capsys.readouterr().out, read(tmp_path / "generation.json")
    assert found["prompt"].startswith("Once upon") and len(found["skipped"]) == 12
    assert "time to first token" in shown and found["dense"] in shown and found["pruned"] in shown


def test_generate_leaves_the_folder_of_another_stage_alone(tmp_path, capsys):
    sizes = "--model random:tiny --windows 1 --offspring 1 --generations 0".split()
    assert main(["search", *sizes, "--output", str(tmp_path)]) == 0
    before = hash_path(tmp_path)
    assert main(["generate", "--model", "random:tiny", "--prompt", "Once", "--output", str(tmp_path)]) == 2
    assert "stage search -> generate" in capsys.readouterr().err
    assert hash_path(tmp_path) == before and (tmp_path / "schedule.json").is_file()


def test_sensitivity_leaves_numbers_and_a_picture_that_a_search_starts_from(tmp_path):
    sizes = "--model random:tiny --windows 2 --prompt_tokens 48".split()
    measured = [*sizes, "--router", "random", "--kv", "both", "--levels", "0.5,1.0", "--thresholds", "0.5,0.9"]
    assert main(["sensitivity", *measured, "--output", str(tmp_path / "measured")]) == 0
    found = read(tmp_path / "measured" / "sensitivity.json")
    assert (found["router"], found["kv"], found["levels"], found["thresholds"]) == (
        "random",
        "both",
        [0.5, 1],
        [0.5, 0.9],
    )
    assert set(found["kl_by_kv"]) == {"keep", "evict"} and set(found["position"]) == set(found["redundancy"])
    assert found["kl"] == found["kl_by_kv"]["keep"] != found["kl_by_kv"]["evict"]
    assert len(found["gradient"]) == found["num_blocks"]
    assert (tmp_path / "measured" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    search = [*sizes, "--offspring", "1", "--generations", "0", "--kv", "evict", "--output", str(tmp_path / "search")]
    assert main(["search", *search, "--sensitivity", str(tmp_path / "measured" / "sensitivity.json")]) == 0
    assert {"sensitivity", "gradient"} <= set(read(tmp_path / "search" / "metrics.json")["allocations"])
    assert main(["sensitivity", *sizes, "--no_gradient", "--output", str(tmp_path / "less")]) == 0
    assert "gradient" not in read(tmp_path / "less" / "sensitivity.json")


def test_an_interrupted_search_goes_on_to_the_result_it_would_have_had(tmp_path, monkeypatch):
    sizes = "--model random:tiny --windows 2 --offspring 2 --generations 3 --kv evict --prompt_tokens 48".split()
    assert main(["search", *sizes, "--output", str(tmp_path / "whole")]) == 0

    def interrupt(self, done, total, what):
        if what.startswith("generation 2 "):
            raise KeyboardInterrupt

    monkeypatch.setattr("ftp_lightning.cli.progress.Progress.step", interrupt)
    assert main(["search", *sizes, "--output", str(tmp_path / "stopped")]) == 130
    assert (tmp_path / "stopped" / "state.json").is_file()
    monkeypatch.undo()
    assert main(["search", *sizes, "--output", str(tmp_path / "stopped")]) == 0
    for name in ("schedule.json", "metrics.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_search_at_another_budget_starts_from_the_projected_schedule(chain, tmp_path):
    given = str(chain / "search" / "schedule.json")
    sizes = ["--windows", "1", "--generations", "0", "--budget", "0.5", "--output", str(tmp_path)]
    assert main(["search", "--schedule", given, *sizes]) == 0
    assert Schedule.load(tmp_path / "schedule.json").budget == pytest.approx(0.5, abs=1e-9)
    assert "given" in read(tmp_path / "metrics.json")["allocations"]


def test_retention_counts_a_group_once_and_the_same_tasks_for_all_methods():
    def told(**measures):
        return {"tasks": {task: {"measures": one} for task, one in measures.items()}}

    methods = [told(group=True, member=True, arc=True, short=True), told(group=True, arc=True, short=False)]
    assert counted_tasks(methods, ("group", "arc", "short")) == ["group", "arc"]
    dense, pruned = (
        of.joined([of.record([{"score": one} for one in scores], name, task) for task, scores in tasks.items()])
        for name, tasks in (
            ("dense", {"group": [1.0, 1.0], "arc": [1.0, 0.0], "short": [1.0, 1.0]}),
            ("x", {"group": [1.0, 0.0], "arc": [1.0, 0.0], "short": [0.0, 0.0]}),
        )
    )
    assert retention(pruned, dense, ["group", "arc"])["retention"] == pytest.approx(100 * (0.5 + 1.0) / 2)
    assert retention(pruned, dense, [])["retention"] is None


def test_a_random_search_draws_from_its_seed():
    settings = parse("search", ["--model", "random:tiny", "--router", "random", "--seed", "5"])
    assert starting_pruner(settings, load_model(settings.model)).router.seed == 5


def test_settings_of_the_chain_pass_on_what_they_share():
    words = "--model random:tiny --seed 4 --kv evict --budget 0.5 --test_data x --train_data y"
    run = parse("run", f"{words} --num_fewshot 3 --task_data z --apply_chat_template".split())
    evaluate = run.stages()["evaluate"]
    assert (evaluate.num_fewshot, evaluate.task_data, evaluate.apply_chat_template) == (3, "z", True)
    stages = run.stages()
    assert {stage.model for stage in stages.values()} == {"random:tiny"}
    assert {stage.seed for stage in stages.values()} == {4}
    assert stages["train"].data == "y" and stages["evaluate"].data == "x" and stages["search"].data == "embedded"
    assert [stages[name].chosen_split for name in ("search", "train", "evaluate")] == [
        "calibration",
        "training",
        "test",
    ]
    assert stages["search"].budget == stages["finetune"].budget == 0.5
    run = parse("run", ["--validation_windows", "3"])
    assert run.stages()["train"].validation_windows == 3 != parse("run", []).validation_windows


def test_a_run_trains_first_under_the_schedule_it_is_told(tmp_path):
    about = {"router": "projected", "guide": "future", "guide_share": 1.0, "guide_decay": "constant"}
    stages = RunStage(output=str(tmp_path), budget=0.6, dense=2, **about).stages()
    train, tuned = stages["train"], stages["finetune"]
    assert train.schedule is None and (train.budget, train.dense, train.router) == (0.6, 2, "projected")
    assert (train.guide, train.guide_share, train.guide_decay) == ("future", 1.0, "constant")
    assert tuned.schedule == str(tmp_path / "search/schedule.json")  # the static router's is one to start from
    assert RunStage(output=str(tmp_path)).stages()["train"].schedule == str(tmp_path / "search/schedule.json")
    with pytest.raises(UserError, match="share of tokens"):
        RunStage(output=str(tmp_path), budget=0.3, budget_kind="flops", dense=2)


def test_rounds_adapt_router_and_schedule_to_each_other_again(tmp_path):
    run = parse("run", ["--model", "random:tiny", "--rounds", "2", "--output", str(tmp_path)])
    stages = run.stages()
    assert list(stages) == [
        "sensitivity",
        "search",
        "round1/train",
        "round1/finetune",
        "train",
        "finetune",
        "static",
        "evaluate",
        "benchmark",
    ]
    first, tuned, second, last = (stages[name] for name in list(stages)[2:6])
    at = lambda name: str(tmp_path / name)  # noqa: E731
    assert (first.schedule, first.pruned) == (at("search/schedule.json"), None)
    assert (tuned.schedule, tuned.pruned) == (at("search/schedule.json"), at("round1/train/pruned"))
    assert (second.schedule, second.pruned) == (None, at("round1/finetune/pruned"))
    assert (last.schedule, last.pruned) == (at("round1/finetune/schedule.json"), at("train/pruned"))


def test_the_gain_of_each_round_is_told(tmp_path):
    for place, (kl, loss) in {"round1/": (0.3, 0.2), "": (0.15, 0.1)}.items():
        for name, record in (
            ("train", {"validation_kl": [{"step": 0, "kl": 2 * kl}], "best_validation_kl": kl}),
            ("finetune", {"allocations": {"given": 2 * loss}, "value": loss}),
        ):
            (tmp_path / f"{place}{name}").mkdir(parents=True)
            (tmp_path / f"{place}{name}" / "metrics.json").write_text(json.dumps(record))
    assert gains(tmp_path, 2)[1] == {
        "round": 2,
        "router_validation_kl": {"before": 0.3, "after": 0.15},
        "schedule_calibration_kl": {"before": 0.2, "after": 0.1},
    }


def test_the_shares_of_the_time_follow_the_sizes():
    default = shares(parse("run", []).stages(), 12)
    assert sum(default.values()) == pytest.approx(1.0) and all(share > 0 for share in default.values())
    longer = shares(parse("run", ["--steps", "400"]).stages(), 12)
    assert longer["train"] > 1.3 * default["train"] and longer["search"] < default["search"]
    rounds = shares(parse("run", ["--rounds", "2"]).stages(), 12)
    assert set(rounds) > {"round1/train", "train"}
    assert shares(parse("run", []).stages(), 30)["sensitivity"] > 2 * default["sensitivity"]
