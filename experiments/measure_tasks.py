"""What does the dense model score on the embedded tasks, with and without the fact?  python experiments/measure_tasks.py

Items come from the test stories. Two measures: `greedy`, the argmax of every answer token is the answer's (full stop included); `choice`, the
right one of four choices has the highest log-likelihood (`norm`: per character). A score within 2 standard errors of chance is
marked: such a task measures nothing on this model, and no pruner is to be credited with keeping it.
"""

import argparse
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ftp_lightning.data.choices import distance_bucket, ending_items, name_items, recall_items
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.stories import load_stories
from ftp_lightning.models import load

Item = Mapping[str, Any]
Scores = dict[str, bool]
CHANCE = 0.25


@torch.inference_mode()
def score(model: Any, tokenizer: Any, context: str, choices: Sequence[str], answer: int) -> Scores:
    """Whether the answer is the greedy continuation, the likeliest choice, and the likeliest per character."""
    prompt = tokenizer.encode(context)
    rows = [tokenizer.encode(context + choice)[len(prompt) :] for choice in choices]
    # All tokens but the prompt's last go into the cache once; every choice then reads it.
    cache = model(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows))
    width = max(map(len, rows))
    inputs = torch.tensor([(prompt[-1:] + row + [0] * width)[:width] for row in rows])
    logs = model(inputs, past_key_values=cache).logits.log_softmax(-1)
    totals = [sum(logs[i, j, token].item() for j, token in enumerate(row)) for i, row in enumerate(rows)]
    greedy = logs[answer, : len(rows[answer])].argmax(-1).tolist() == rows[answer]
    per_character = [total / len(choice) for total, choice in zip(totals, choices, strict=True)]
    return {"greedy": greedy, "choice": _best(totals) == answer, "norm": _best(per_character) == answer}


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def table(rows: Iterable[tuple[str, Scores]]) -> dict[str, dict[str, float | int | bool]]:
    """Per group: number of items, share right per measure, and whether `choice` is near chance."""
    groups: dict[str, list[Scores]] = {}
    for group, scores in rows:
        groups.setdefault(group, []).append(scores)
    result = {}
    for group, scores in sorted(groups.items()):
        shares = {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]}
        error = math.sqrt(max(shares["choice"] * (1 - shares["choice"]), CHANCE * (1 - CHANCE)) / len(scores))
        result[group] = {"items": len(scores), **shares, "near_chance": abs(shares["choice"] - CHANCE) < 2 * error}
    return result


def measure_recall(model: Any, tokenizer: Any, items: Sequence[Item]) -> dict[str, Any]:
    """Tables per form, per distance and over all, on the context and on the context with the facts deleted."""
    result = {}
    for field in ("context", "context_deleted"):
        scored = [(item, score(model, tokenizer, item[field], item["choices"], item["answer"])) for item in items]
        groups = [("all", s) for _, s in scored]
        groups += [(f"form {item['kind']}", s) for item, s in scored]
        groups += [(f"distance {distance_bucket(item['distance'])}", s) for item, s in scored]
        result[field] = table(groups)
    return result


def measure_choices(model: Any, tokenizer: Any, items: Sequence[Item]) -> dict[str, Any]:
    """The table of one multiple-choice task."""
    return table((item["kind"], score(model, tokenizer, item["context"], item["choices"], item["answer"])) for item in items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--items", type=int, default=300, help="recall items")
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[192, 448], help="lengths of recall passages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model)
    documents, stories = load_documents("embedded", "test"), load_stories("test")
    rng = random.Random(arguments.seed)
    results: dict[str, Any] = {
        task.__name__: measure_choices(model, tokenizer, task(stories, rng)) for task in (ending_items, name_items)
    }
    for length in arguments.prompt_tokens:
        items = recall_items(tokenizer, documents, rng, arguments.items, length)
        results[f"recall, {length} tokens"] = measure_recall(model, tokenizer, items)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
