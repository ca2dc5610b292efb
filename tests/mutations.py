"""Plausible faults, and the test that notices each:  python tests/mutations.py [WORDS OF A NAME]

Each is put into a copy of the package, one at a time, and its test is run there; a test that still passes is an error.
First all of these tests have to pass on the code as it stands: a test that fails anyway notices nothing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
P = "ftp_lightning/"

MUTATIONS = {
    "the search minimises accuracy instead of error": (
        P + "search/accuracy.py", "return 1.0 - sum(right) / len(right)", "return sum(right) / len(right)",
        "test_searched_documents.py::test_the_loss_is_the_share_of_wrong_answers"),
    "searches look at all documents": (
        P + "search/accuracy.py", "if place(made[0].doc) < SEARCHED:", "if True:",
        "test_searched_documents.py::test_a_search_looks_at_the_documents_of_lowest_place_alone"),
    "evaluation asks what was searched": (
        P + "stages/evaluate.py", 'run["seen"] = seen', 'run["seen"] = None',
        "test_searched_documents.py::test_evaluate_leaves_out_what_search_has_seen_for_every_method"),
    "training forgets what its schedule was searched on": (
        P + "pruning/pruner.py", '["schedule"].after(self.schedule.seen)', '["schedule"]',
        "test_searched_documents.py::test_a_schedule_carries_what_it_was_selected_on_through_every_change"),
    "the noise floor has the same kernel": (
        P + "evaluation/continuation.py", 'return "sdpa" if model.config._attn_implementation == "eager" else "eager"',
        "return model.config._attn_implementation",
        "test_evaluation_continuation.py::test_the_noise_floor_runs_another_attention_kernel"),
    "the learning rate does not fall": (
        P + "lit/router_training.py", "max(0.05, 1.0 - step / self.settings.steps)", "1.0",
        "test_router_training.py::test_the_learning_rate_falls_linearly_to_a_twentieth"),
    "windows ignore the seed": (
        P + "stages/inputs.py", "count, settings.seed, recall_share)", "count, 0, recall_share)",
        "test_stage_windows.py::test_another_seed_draws_other_windows"),
    "a study measures on the windows of its validation": (
        P + "studies/bench.py", "OTHER_SEED = 1_000_003", "OTHER_SEED = 0",
        "test_stage_windows.py::test_a_study_measures_on_other_windows_than_its_training_was_validated_on"),
    "a task is near chance by the pruned model's error": (
        P + "evaluation/outcome.py", 'base["chance"], base["stderr"])', 'base["chance"], standard_error(items))',
        "test_stage_windows.py::test_a_task_is_near_chance_by_the_dense_models_error"),
    "crossover never happens": (
        P + "search/genetic.py", "rng.random() < self.settings.crossover:", "False:",
        "test_search_genetic.py::test_children_are_mixed_as_often_as_asked"),
    "wins are never counted": (
        P + "search/genetic.py", "state.wins[champion.reach] += 1", "pass",
        "test_search_genetic.py::test_a_proposal_that_improves_the_best_is_counted_for_its_reach"),
    "a tournament takes any": (
        P + "search/operators.py", "return min((rng.choice(population) for _ in range(size)), key=lambda individual: "
        "individual.loss)", "return rng.choice(population)",
        "test_search_genetic.py::test_a_parent_is_the_best_of_so_many_random_ones"),
    "the estimate of training forgets the teacher": (
        P + "estimate.py", "(4 if stage.recompute else 3)", "(3 if stage.recompute else 2)",
        "test_estimate.py::test_a_training_step_costs_what_torch_counts"),
    "the random baseline ignores the seed": (
        P + "baselines/random_tokens.py", "RandomRouter(setting.seed)", "RandomRouter(0)",
        "test_stage_windows.py::test_the_random_baseline_is_drawn_by_the_seed"),
    "a rival's last blocks have nothing to select": (
        P + "baselines/lazy_llm.py", "window, most = 1, 0.8", "window, most = 1, 1.0",
        "test_baselines_forms.py::test_a_rising_schedule_of_a_rival_never_leaves_a_block_without_tokens"),
    "the static baseline searches less": (
        P + "stages/run.py", "self.rounds * self.finetune_generations", "0",
        "test_run_chain.py::test_the_static_baseline_searches_as_long_as_the_trained_router"),
    "answers of another attention kernel are taken": (
        P + "evaluation/harness/answers.py", 'getattr(model.config, "_attn_implementation", None)', "None",
        "test_evaluation_identity.py::test_dtype_attention_kernel_and_weights_count"),
}  # fmt: skip
"""Name -> file or folder, what stands there once, what is put there, test."""


def changed(name: str) -> tuple[Path, str]:
    """The file of this mutation, below the root, and its text with the fault; ValueError unless the old text stands
    once in the file or folder that the list names."""
    place, old, new, _ = MUTATIONS[name]
    files = sorted((ROOT / place).rglob("*.py")) or [ROOT / place]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    found = [file for file, text in texts.items() for _ in range(text.count(old))]
    if len(found) != 1:
        raise ValueError(f"{name}: {place} holds {old!r} {len(found)} times")
    return found[0].relative_to(ROOT), texts[found[0]].replace(old, new)


def status(tests: list[str], copy: Path) -> int:
    """What pytest says of these tests of the copy: 0 all passed, 1 one failed, above 1 they could not be run."""
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in tests]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode


def noticed(name: str, copy: Path) -> bool:
    """Whether the test of this mutation fails with it."""
    file, text = changed(name)
    before = (copy / file).read_text(encoding="utf-8")
    (copy / file).write_text(text, encoding="utf-8")
    try:
        return status([MUTATIONS[name][3]], copy) == 1
    finally:
        (copy / file).write_text(before, encoding="utf-8")


def main(words: str) -> int:
    chosen = [name for name in MUTATIONS if words in name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "build", "__pycache__"))
        if not chosen or status(sorted({MUTATIONS[name][3] for name in chosen}), copy) != 0:
            print(f"no mutation is named so, or its test does not pass without it: {words!r}")
            return 1
        survived = 0
        for name in chosen:
            by_test = noticed(name, copy)
            survived += not by_test
            print(f"{'noticed' if by_test else 'SURVIVED':8s}  {name}: {MUTATIONS[name][3]}", flush=True)
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
