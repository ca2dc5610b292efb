"""What does the dense model score on the embedded tasks, with and without the fact?

python experiments/measure_tasks.py

Items come from the test stories. Two measures: `greedy`, the argmax of every answer token is the answer's (full stop
included); `choice`, the right one of four choices has the highest log-likelihood (`norm`: per character). A score
within 2 standard errors of chance is marked: such a task measures nothing on this model, and no pruner is to be
credited with keeping it.
"""

import argparse
import math
import random
from collections.abc import Mapping, Sequence
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


def table(scores: Mapping[str, Sequence[Scores]]) -> str:
    """A Markdown table: per group the number of items and the share right per measure."""
    measures = list(next(iter(scores.values()))[0])
    lines = [f"| | items | {' | '.join(measures)} | |", "|---|" + "---|" * (len(measures) + 2)]
    for group, rows in scores.items():
        shares = {key: sum(row[key] for row in rows) / len(rows) for key in measures}
        cells = " | ".join(f"{share:.3f}" for share in shares.values())
        lines.append(f"| {group} | {len(rows)} | {cells} | {_remark(shares, len(rows))} |")
    return "\n".join(lines)


def _remark(shares: Mapping[str, float], items: int) -> str:
    """Which of the two choice measures are within 2 standard errors of chance on the whole context."""
    error = math.sqrt(CHANCE * (1 - CHANCE) / items)
    near = [measure for measure in ("choice", "norm") if abs(shares[measure] - CHANCE) < 2 * error]
    return f"near chance by {' and '.join(near)}: measures nothing here" if near else ""


def recall_scores(model: Any, tokenizer: Any, items: Sequence[Item]) -> dict[str, list[Scores]]:
    """Scores per form, per distance and over all; those on the context without the facts under `deleted: ...`."""
    groups: dict[str, list[Scores]] = {}
    for item in items:
        whole, deleted = (
            score(model, tokenizer, item[field], item["choices"], item["answer"])
            for field in ("context", "context_deleted")
        )
        both = {**whole, **{f"{measure}, deleted": value for measure, value in deleted.items()}}
        for group in ("all", f"form {item['kind']}", f"distance {distance_bucket(item['distance'])}"):
            groups.setdefault(group, []).append(both)
    return dict(sorted(groups.items(), key=lambda entry: _order(entry[0])))


def _order(group: str) -> tuple[bool, str, int]:
    kind, _, rest = group.partition(" ")
    return group != "all", kind, int(rest.split("-")[0]) if kind == "distance" else 0


def choice_scores(model: Any, tokenizer: Any, items: Sequence[Item]) -> dict[str, list[Scores]]:
    """The scores of one multiple-choice task, under its name."""
    return {items[0]["kind"]: [score(model, tokenizer, i["context"], i["choices"], i["answer"]) for i in items]}


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
    for length in arguments.prompt_tokens:
        items = recall_items(tokenizer, documents, rng, arguments.items, length)
        print(
            f"\n### Recall, passages of {length} tokens\n\n{table(recall_scores(model, tokenizer, items))}", flush=True
        )
    for task in (ending_items, name_items):
        print(f"\n### {task.__name__}\n\n{table(choice_scores(model, tokenizer, task(stories, rng)))}", flush=True)


if __name__ == "__main__":
    main()
