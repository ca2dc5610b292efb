"""Maps of their own for a small cut of a ready-made pruner: how those of SmolLM2's cut of 12 % were made.

    python experiments/small_cut.py --books BOOKS --squad xquad_en.jsonl --prompts instructions.jsonl
    python experiments/small_cut.py … --budget 0.233333 --rank 40 --pruned runs/small_cut/pruned

The blocks that the pruner skips at `--budget` get maps of rank `--rank`, fitted by ridge regression on 200 rows and
distilled on the KL of the dense model's own answers of 24 tokens: to needles, questions and own questions of the split
"training" (see docs/record.md), and to `--prompts`, one user turn each. The best epoch is chosen on the split
"validation". Answers and epochs are kept in `--output`, so that the same command goes on after a kill; the pruner with
the new maps among its others is written to `--output`/pruned.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from ftp_lightning import Schedule, StaticRouter, TokenPruner, distil_compensation, fit_compensation
from ftp_lightning.data.prompts import load_prompts
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.disk.ready import base_of, load_pruner
from ftp_lightning.evaluation.own_answers import own_answers
from ftp_lightning.fingerprint import digest
from ftp_lightning.lit.distillation import DistillationSettings
from ftp_lightning.models import load
from ftp_lightning.studies.grid import arguments, sentences
from ftp_lightning.studies.record_questions import Asked, Sources, record_questions

TRAINING = Asked((("needles-300-700", 60), ("xquad", 160), ("own", 160)))
VALIDATION = Asked((("needles-300-700", 15), ("xquad", 25), ("own", 30)))
NEW_TOKENS, LONGEST, FITTED_ON = 24, 420, 200


def asked(tokenizer: Any, questions: Asked, sources: Sources, split: str) -> list[Row]:
    tasks = [record_questions(tokenizer, questions, sources, split, task) for task, _ in questions.counts]
    return [Row(list(one.ids), [], document=place) for found in tasks for place, one in enumerate(found)]


def made(args: Any) -> TokenPruner:
    """The pruner with maps of its own for schedules of at most `args.budget`."""
    given, sources = load_pruner(args.pruned), Sources(args.books, args.squad)
    assert given.compensation is not None and given.family is not None
    model, tokenizer = load(args.model or base_of(args.pruned))
    model.eval().requires_grad_(False)
    prompts = load_prompts(args.prompts, "all", tokenizer, LONGEST, answers=False)
    rows = Rows([*asked(tokenizer, TRAINING, sources, "training"), *prompts.rows[: args.count]])
    checked = Rows(asked(tokenizer, VALIDATION, sources, "validation"))
    rows, checked = (own_answers(model, one, NEW_TOKENS, args.output / "answers") for one in (rows, checked))
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    nearest = min(given.family.schedules, key=lambda one: abs(one.budget - args.budget))
    skipped = [block for block, share in enumerate(nearest.sparsity) if share > 0.0]
    schedule = Schedule([float(block in skipped) for block in range(given.family.num_blocks)], kv="keep")
    fitted = fit_compensation(model, rows.subset(order[:FITTED_ON]), args.rank, batch_size=1, parts="attention+mlp")
    about: dict[str, Any] = {"parts": "attention+mlp", "skip": "low-rank", "compensation": fitted.only(skipped)}
    pruner, settings = TokenPruner(StaticRouter(), schedule, **about), DistillationSettings(args.epochs, args.rate)
    name = digest(f"{skipped} {args.rank} {args.epochs} {args.rate} {rows.hash()}".encode())[:16]
    maps = distil_compensation(model, pruner, rows, checked, settings, args.output / f"state-{name}")
    most = nearest.budget + 1e-6
    others = {budget: other for budget, other in given.compensation.smaller if abs(budget - most) > 1e-4}
    smaller = tuple(sorted((others | {most: maps.rounded()}).items(), key=lambda one: one[0]))
    return given.changed(compensation=replace(given.compensation, smaller=smaller), family=given.family)


def main() -> None:
    about: dict[str, Any] = {"books": "", "squad": "", "prompts": "", "pruned": "smollm2-135m-instruct", "count": 480}
    args = arguments(__doc__, "runs/small_cut", model="", **about, budget=0.133333, rank=64, epochs=4, rate=0.004)
    with sentences():
        made(args).save(args.output / "pruned", base=args.model or base_of(args.pruned))


if __name__ == "__main__":
    main()
