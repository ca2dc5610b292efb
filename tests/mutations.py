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
    "KL is that of the student to the teacher": (
        P + "losses.py", "(teacher_logprobs.exp() * difference)",
        "(logits.log_softmax(dim=-1).exp() * -difference)",
        "test_losses.py::test_kl_is_that_of_the_teacher_to_the_student"),
    "chance is that of the few that are asked": (
        P + "evaluation/harness/results.py", "chance_of(labels or [", "chance_of([",
        "test_evaluation_tasks.py::test_chance_is_that_of_all_documents_of_a_task_however_few_are_asked"),
    "a method prunes where the pruner is dense": (
        P + "baselines/beside.py", "routed_from(setting.model, chosen)", "0",
        "test_baselines.py::test_a_method_computes_those_prompts_densely_that_the_pruner_does"),
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
    "keys of kept tokens are stored behind the others": (
        P, "merged = kept.join(own, others)", "merged = torch.cat([others, own], 1)",
        "test_families.py::test_training_forward_equals_inference_forward"),
    "padding competes for the kept tokens": (
        P, "settled, rank = reserved | ~real, torch", "settled, rank = reserved, torch",
        "test_routing.py::test_topk_counts_and_reserves"),
    "a budget counts padding": (
        P, "lengths = tuple(real.sum(1).tolist())", "lengths = (tokens,) * batch",
        "test_engine.py::test_a_row_decides_alone"),
    "the last token but one is reserved": (
        P, "(position == position[:, -1:])", "(position == position[:, -1:] - 1)",
        "test_routing.py::test_topk_counts_and_reserves"),
    "one token is reserved in place of two": (
        P, "min(length, 2 if starts else 1)", "min(length, 1)",
        "test_routing.py::test_topk_counts_and_reserves"),
    "ranks are divided by the number of tokens": (
        P, "rank / (context.lengths - 1).clamp", "rank / context.lengths.clamp",
        "test_routing.py::test_factors_are_as_written"),
    "in training skipped tokens score keys": (
        P, "write_scores(run, None, Tokens(slots, keep, False), keys, None)",
        "write_scores(run, None, Tokens(slots, forward.real, False), keys, None)",
        "test_engine.py::test_training_forward_equals_inference_forward"),
    "scores that no query gave are written": (
        P, "after = torch.where(seen, before + scores if self.adds_up else scores, before)",
        "after = before + scores if self.adds_up else scores",
        "test_attention.py::test_a_key_that_no_query_sees_keeps_its_latest_score"),
    "evicted tokens lose their score": (
        P, "self.own.scatter(1, index, after)", "torch.ones_like(self.own).scatter(1, index, after)",
        "test_engine.py::test_gathered_equals_oracle"),
    "the first queries give the scores": (
        P, "range(n - wanted, n, SCORE_CHUNK)", "range(0, wanted, SCORE_CHUNK)",
        "test_engine.py::test_gathered_equals_oracle"),
    "scores do not count the visible keys": (
        P, "weight = (chunk.counts / number)", "weight = (torch.ones_like(chunk.counts) / number)",
        "test_attention.py::test_uniform_attention_scores_one"),
    "a sliding window shows one token more": (
        P, "> query_slots[:, :, None] - window", ">= query_slots[:, :, None] - window",
        "test_families.py::test_gathered_equals_masked_oracle"),
    "a chunk of queries misses the first key of its window": (
        P, "keys - self.new + start - self.window + 1", "keys - self.new + start - self.window + 2",
        "test_attention.py::test_no_key_that_a_chunk_of_queries_sees_is_left_out"),
    "a query does not see the key of its own slot": (
        P, "self.queries.slots[:, stop - 1].max()) + 1 - offset",
        "self.queries.slots[:, stop - 1].max()) - offset",
        "test_attention.py::test_no_key_that_a_chunk_of_queries_sees_is_left_out"),
    "a cache with a window drops one key too many": (
        P, "last = (self.window or 1) - 1", "last = (self.window or 1) - 2",
        "test_generate.py::test_greedy_is_the_masked_twins"),
    "the cache tells the tokens it holds, not those seen": (
        P, "return self.seen\n", "return self.keys.shape[2] if self.is_initialized else 0\n",
        "test_engine.py::test_generate_equals_stepwise_greedy"),
    "a decoded token has the next one's position": (
        P, "real, position, position + 1,", "real, position + 1, position + 1,",
        "test_policies.py::test_decisions_and_logits_are_the_twins"),
    "positions of padded rows start at one": (
        P, "positions = (mask.cumsum(1) - 1).clamp(min=0)", "positions = mask.cumsum(1)",
        "test_evaluation_continuation.py::test_of_other_families_a_row_among_others_is_what_it_is_alone"),
    "a last chunk of one token is not routed": (
        P, "self.routes and past < self.prompt_end", "self.routes and past + 1 < self.prompt_end",
        "test_generate.py::test_chunked_prefill_routes_every_chunk"),
    "strict lets one more token skip": (
        P, "allowed = skipped + 1 <= ", "allowed = skipped <= ",
        "test_policies.py::test_strict_stays_within_its_allowance_at_every_prefix"),
    "a crop leaves the account of what it removed": (
        P, "account[:, : self.seen] for part", "account for part",
        "test_policies.py::test_a_second_prompt_takes_the_place_of_what_a_crop_removed"),
    "beams leave their scores behind": (
        P, "self.scores.map(change)", "pass",
        "test_policies.py::test_rows_of_a_cache_move_with_all_that_is_known_of_them"),
    "a list of kv modes is read from its end": (
        P, "self._kv_wanted = _modes(kv, schedule, blocks)", "self._kv_wanted = _modes(kv, schedule, blocks)[::-1]",
        "test_schedule_modes.py::test_a_mode_per_block_computes_what_it_says"),
    "FLOPs of keep are those of evict": (
        P, "keyed = real if mode == \"keep\" else attended", "keyed = attended",
        "test_flops.py::test_realised_limit_counts_the_pairs_one_by_one"),
    "planned FLOPs of keep are those of evict": (
        P, "_flops(cost, tokens if keeps else attended,", "_flops(cost, attended,",
        "test_flops.py::test_linear_flops_are_those_executed"),
    "cached bytes of keep are those of evict": (
        P, "(trace.real if mode == \"keep\" else attended)", "attended",
        "test_evaluation_continuation.py::test_costs_are_those_of_all_batches"),
    "padding counts as skipped": (
        P, "computed / self.real.sum().clamp(min=1)", "computed / self.real.numel()",
        "test_masked_padding.py::test_padding_is_no_token_that_skips"),
}  # fmt: skip
"""Name -> file or folder, what stands there once, what is put there, test.

Faults of the engine name the whole package, so that they need no change where a module moves.
"""


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
