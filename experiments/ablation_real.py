"""What do late blocks, stages, attention's choice, fitted and distilled maps bring on a real model, alone and together?

    make ablation-real                                        # SmolLM2 on the package's own stories
    python experiments/ablation_real.py --prompts mine.jsonl --cut 0.2 --limit 200

Every variant makes the same FLOPs cut. The first row is the paper's form without training: a uniform schedule, keys and
values of skipped tokens evicted, nothing for skipped tokens. Kept: the model's own answers to validation prompts, word
for word. What is answered, fitted and measured lies in --output: the same command goes on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ftp_lightning import Schedule, StaticRouter
from ftp_lightning.costs.budget import solve_budget
from ftp_lightning.studies.grid import arguments, sentences
from ftp_lightning.studies.record_study import differences, record_table
from ftp_lightning.tuning.recipes import RANK, RECIPES, Ground, Recipe, each, pruner_with, stage_schedule

KNOWN = {recipe.name: recipe for recipe in RECIPES}


def uniform(ground: Ground, cut: float) -> Schedule:
    return solve_budget(ground.model, cut, ground.length, "evict").under("evict")


VARIANTS = (
    Recipe("uniform", pruner_with(StaticRouter, 0), each(uniform)),
    KNOWN["default"],
    KNOWN["default, fitted"],
    KNOWN["late blocks"],
    KNOWN["late blocks, fitted"],
    KNOWN["late blocks, distilled"],
    KNOWN["stages"],
    Recipe("stages without attention, fitted", pruner_with(StaticRouter, RANK), each(stage_schedule)),
    KNOWN["stages, fitted"],
)
PAIRS = (
    ("default", "uniform"), ("late blocks", "uniform"), ("stages", "uniform"), ("default, fitted", "default"),
    ("late blocks, fitted", "late blocks"), ("late blocks, distilled", "late blocks, fitted"),
    ("stages, fitted", "stages"), ("stages, fitted", "stages without attention, fitted"),
)  # fmt: skip


def main() -> None:
    words: dict[str, Any] = {"model": "smollm2-135m-instruct", "prompts": "embedded"}
    sizes: dict[str, Any] = {"prompt_tokens": 192, "new_tokens": 16}
    args = arguments(__doc__, "runs/ablation_real", **words, **sizes, cut=0.2, limit=80, seed=0, variants="")
    with sentences():
        from ftp_lightning.evaluation.own_answers import own_answers
        from ftp_lightning.evaluation.record import joined
        from ftp_lightning.models import load
        from ftp_lightning.tuning.measured import Measured
        from ftp_lightning.tuning.parts import check_answers, read_prompts, split_rows
        from ftp_lightning.tuning.tuner import Allowance, Candidate, Tuner

        model, tokenizer = load(args.model)
        most = model.config.get_text_config().max_position_embeddings - args.new_tokens
        prompts = read_prompts(args.prompts, tokenizer, args.prompt_tokens, most, args.limit, args.seed)
        rows = own_answers(model, prompts, args.new_tokens, args.output)
        check_answers(rows)
        tuner = Tuner(Measured(model, args.output), split_rows(rows, args.seed), 1.0, (args.cut,), Allowance(1e9))
        found = []
        for recipe in VARIANTS:
            if args.variants and recipe.name not in args.variants.split(";"):
                continue
            pruner = tuner.prepared(recipe)
            one = Candidate(recipe.name, pruner, recipe.schedules(tuner.ground, pruner, (args.cut,)), [])
            tell = partial(print, recipe.name, end="\r", flush=True)
            found.append(tuner.measured.items(one.name, one.at(args.cut), tuner.parts["validation"], tell))
        items = joined(found)
        print(f"{record_table(items)}\n")
        names = set(items["method"])
        print(differences(items, [pair for pair in PAIRS if set(pair) <= names]))


if __name__ == "__main__":
    main()
