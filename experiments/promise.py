"""Does `tune` keep its promise? Many tunings on different prompts, each checked on prompts of documents it never saw.

    python experiments/promise.py                    # docs/tune.md: the embedded model, our own stories
    python experiments/promise.py --repetitions 100 --keep 0.9 --prompts mine.jsonl --model smollm2-135m-instruct

Each repetition draws half of the documents, tunes on --limit of their prompts, and measures the pruner it found on
prompts of the other half. The promise is held where these keep at least --keep of the answers. Recipes that fit nothing
take part, and the model's ready-made pruner: what is measured of a prompt is measured once for all repetitions, and the
same command goes on. Repetitions share prompts, so they are not independent.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.studies.grid import arguments, sentences

CUTS = (0.04, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4)


def main() -> None:
    words: dict[str, Any] = {"model": "embedded", "prompts": "embedded"}
    sizes: dict[str, Any] = {"prompt_tokens": 40, "new_tokens": 8, "population": 400}
    args = arguments(__doc__, "runs/promise", **words, **sizes, repetitions=20, limit=150, keep=0.8)
    with sentences():
        from ftp_lightning.disk.ready import is_ready, load_pruner
        from ftp_lightning.evaluation.own_answers import own_answers
        from ftp_lightning.evaluation.record import kept
        from ftp_lightning.models import load
        from ftp_lightning.tuning.measured import Measured
        from ftp_lightning.tuning.parts import read_prompts, split_rows
        from ftp_lightning.tuning.recipes import RECIPES, given
        from ftp_lightning.tuning.tuner import Allowance, Tuner

        model, tokenizer = load(args.model)
        most = model.config.get_text_config().max_position_embeddings - args.new_tokens
        prompts = read_prompts(args.prompts, tokenizer, args.prompt_tokens, most, args.population, 0)
        rows = own_answers(model, prompts, args.new_tokens, args.output)
        measured = Measured(model, args.output, 16)
        recipes = [recipe for recipe in RECIPES if recipe.name in ("default", "late blocks")]
        recipes += [given(load_pruner(args.model))] if is_ready(args.model) else []
        told: Counter[str] = Counter()
        for seed in range(args.repetitions):
            names = sorted(set(rows.documents))
            seen = set(random.Random(seed).sample(names, len(names) // 2))
            places = [[n for n, name in enumerate(rows.documents) if (name in seen) is side] for side in (True, False)]
            mine, fresh = rows.subset(places[0]).sample(args.limit, seed), rows.subset(places[1])
            tuner = Tuner(measured, split_rows(mine, seed), args.keep, CUTS, Allowance(1e9), seed)
            try:
                tuned = tuner.run(recipes)
            except UserError as error:
                told["nothing promised"] += 1
                print(f"{seed}: {str(error).splitlines()[0]}", flush=True)
                continue
            items = measured.items("", tuned.pruner, fresh)
            share, cut = kept(items), tuned.rungs[tuned.left - 1].flops_cut
            verdict = "held" if (share.value or 0.0) >= args.keep else "broken"
            told[verdict] += 1
            told["not confirmed"] += not tuned.confirmed
            print(
                f"{seed}: {tuned.chosen.name}, a cut of {cut:.1%}{'' if tuned.confirmed else ' (not confirmed)'}: "
                f"{share.value:.1%} of {share.items} answers to fresh prompts, {verdict}",
                flush=True,
            )
        print(f"held in {told['held']} of {told['held'] + told['broken']} tunings; {dict(told)}")


if __name__ == "__main__":
    main()
