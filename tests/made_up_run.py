"""A made-up run: the files that the stages leave, with invented numbers; and a reader of the pages made from them."""

import csv
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

BLOCKS = 12
STAGES = ("sensitivity", "search", "train", "finetune", "static", "evaluate", "benchmark")
CONFIG = "model: embedded\ndata: embedded\nkv: keep\nseed: 0\nprompt_tokens: 192\ncontinuation_tokens: 64\n"
STORY = (
    "Mara hid the brass key under the third flowerpot. Then the rain came, and for an hour nobody left the house. Her "
    "brother read an old newspaper aloud, the cat slept, and the kettle sang twice. When the sun returned they asked "
    "her where it was."
)


def schedule(rng: random.Random, budget: float = 0.3) -> list[float]:
    """Twelve sparsities with the given mean: a noisy ramp, the first block dense."""
    raw = [0.0] + [block / BLOCKS + rng.uniform(0, 0.3) for block in range(1, BLOCKS)]
    return [round(value * budget * BLOCKS / sum(raw), 4) for value in raw]


def search_metrics(rng: random.Random, start: float) -> dict[str, Any]:
    best = [start * (0.35 + 0.65 * math.exp(-g / 9)) for g in range(31)]
    generations = [
        {"generation": g, "best": kl, "mean": kl * rng.uniform(1.1, 1.5), "forward_tokens": 49152 * (g + 1),
         "evaluations": 24 * (g + 1), "memo_hits": 3 * g} for g, kl in enumerate(best)
    ]  # fmt: skip
    allocations = {"uniform": start * 1.4, "ramp": start, "block_influence": start * 2.6, "sensitivity": start * 0.8}
    return {"value": best[-1], "allocations": allocations, "generations": generations}


def train_metrics(rng: random.Random) -> dict[str, Any]:
    steps = []
    for step in range(1, 301):
        fade, weight = math.exp(-step / 80), max(0.0, 1 - step / 150)
        parts = {"distillation": 0.02 + 0.1 * fade * rng.uniform(0.6, 1.4),
                 "sparsity": 0.01 + 0.9 * fade * rng.random(),
                 "guide": 0.45 + 0.25 * fade + 0.03 * rng.random()}  # fmt: skip
        total = parts["distillation"] + parts["sparsity"] + weight * parts["guide"]
        weighted = {f"weighted_{name}": value for name, value in parts.items()}
        weighted["weighted_guide"] *= weight
        rest = {"guide_weight": weight, "total": total, "agreement": 0.86 - 0.3 * fade}
        steps.append({"step": step, **parts, **weighted, **rest})
    target = schedule(rng)
    kl = [{"step": step, "kl": 0.0016 + 0.004 * math.exp(-step / 70)} for step in range(50, 301, 50)]
    soft = [max(0.0, value + rng.uniform(-0.04, 0.03)) for value in target]
    return {"parameters": 450, "steps": steps, "validation_kl": kl, "target_sparsity": target, "soft_sparsity": soft,
            "realised_sparsity": target}  # fmt: skip


def method(name: str, share: float, kl: float, rng: random.Random) -> dict[str, Any]:
    def kept(at: float, items: int) -> dict[str, Any]:
        half = 1.96 * math.sqrt(max(at * (1 - at), 0) / items)
        return {"share": at, "low": at - half, "high": at + half, "items": items}

    bins = {
        bounds: kept(max(0.02, share - 0.04 * i), 500)
        for i, bounds in enumerate(("0-64", "64-96", "96-128", "128-192"))
    }
    scores = {
        "recall": (share * 0.8, share * 0.95, True),
        "names": (share * 0.7, share, True),
        "coin": (0.51, None, False),
    }
    tasks = {t: {"acc": acc, "stderr": 0.011, "skill": skill, "measures": ok} for t, (acc, skill, ok) in scores.items()}
    per_block = schedule(rng)
    return {
        "name": name, "budget": 0.3, "kv": "keep", "realised_sparsity": 0.2987, "realised_per_block": per_block,
        "flops_reduction": 0.2711, "kl": {"mean": kl, "p99": kl * 14, "top1": 1 - kl * 9}, "kl_sequence": kl * 900,
        "ppl": {"prompt": 9.41 * (1 + kl), "sequence": 9.41 * (1 + 70 * kl)},
        "kept": {**kept(share, 2000), "gained": 21, "by_distance": bins}, "retention": 100 * (0.4 + 0.6 * share),
        "tasks": tasks,
    }  # fmt: skip


def results(rng: random.Random) -> dict[str, Any]:
    tasks = {name: {"acc": acc, "stderr": 0.011, "chance": chance, "n": 2000}
             for name, acc, chance in (("recall", 0.83, 0.0), ("names", 0.74, 0.25), ("coin", 0.51, 0.5))}  # fmt: skip
    values = {"random": (0.412, 0.0192), "uniform": (0.701, 0.0051), "static": (0.804, 0.0021),
              "dynamic (before fine-tuning)": (0.886, 0.0013), "dynamic": (0.912, 0.0009)}  # fmt: skip
    methods = [method(name, share, kl, rng) for name, (share, kl) in values.items()]
    return {"dense": {"ppl": 9.41, "tasks": tasks}, "noise_floor": {"kl": 2.3e-5, "top1": 0.9993}, "methods": methods}


def story_tokens(rng: random.Random) -> dict[str, Any]:
    tokens = re.findall(r"\s?\S+", STORY)
    levels = [[rng.random() + 0.6 * any(c.isupper() for c in t) for t in tokens] for _ in range(BLOCKS)]
    keep = [[int(score > 0.07 * block) for score in row] for block, row in enumerate(levels)]
    counts = [sum(column) for column in zip(*keep, strict=True)]
    return {"title": "The brass key", "tokens": tokens, "computed_by": counts, "keep": keep, "num_blocks": BLOCKS}


def benchmark(rng: random.Random) -> dict[str, Any]:
    rows = []
    for batch in (1, 8):
        for length in (256, 512, 1024, 2048):
            speedup = 1.36 - 40 / length - 0.03 * (batch == 1)
            rows.append({"length": length, "batch": batch, "kv": "keep", "budget": 0.3, "speedup": speedup,
                         "low": speedup - 0.02, "high": speedup + 0.03, "flops_limit": 1.372,
                         "dense_ms": length / 9 * batch, "pruned_ms": length / 9 * batch / speedup,
                         "realised_sparsity": 0.299})  # fmt: skip
    return {"rows": rows}


def write_run(folder: Path, stages: tuple[str, ...] = STAGES) -> Path:
    """A made-up run: the files that the given stages leave."""
    rng = random.Random(0)
    kl = [
        [level**2 * 0.004 * (1 + 6 * math.exp(-b)) * (b < BLOCKS - 1) for level in (0.3, 0.6, 0.9)]
        for b in range(BLOCKS)
    ]
    influence = [0.4 * math.exp(-b / 2) + 0.05 + 0.15 * (b == BLOCKS - 1) for b in range(BLOCKS)]
    found = {"num_blocks": BLOCKS, "levels": [0.3, 0.6, 0.9], "block_influence": influence, "kl": kl, "tokens": 65536,
             "redundancy": {"0.8": [1 - x for x in influence]}, "gradient": [x / 100 for x in influence],
             "position": {"0.8": {"jaccard": [None, *[0.9] * (BLOCKS - 1)], "jaccard_by_chance": [0.8] * BLOCKS,
                                  "explained": [None, *[0.1] * (BLOCKS - 1)]}}}  # fmt: skip
    made = {
        "sensitivity": {"sensitivity.json": found},
        "search": {"schedule.json": {"sparsity": schedule(rng)}, "metrics.json": search_metrics(rng, 0.004)},
        "train": {"metrics.json": train_metrics(rng)},
        "finetune": {"schedule.json": {"sparsity": schedule(rng)}, "metrics.json": search_metrics(rng, 0.0015)},
        "static": {"schedule.json": {"sparsity": schedule(rng)}, "metrics.json": search_metrics(rng, 0.002)},
        "evaluate": {"results.json": results(rng), "tokens.json": story_tokens(rng)},
        "benchmark": {"benchmark.json": benchmark(rng)},
    }
    for stage in stages:
        (folder / stage).mkdir(parents=True)
        origin = {"command": f"ftp-lightning {stage} --seed 0", "seed": 0, "commit": "4f2a9c1",
                  "versions": {"torch": "2.13.0"}, "data": {"stories": "sha256:9d1e"}}  # fmt: skip
        for name, content in {**made[stage], "provenance.json": origin}.items():
            (folder / stage / name).write_text(json.dumps(content))
        (folder / stage / "config.yaml").write_text(CONFIG + f"output: {stage}\n")
    return folder


def edit(path: Path, change: Any) -> None:
    """Changes one JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Page(HTMLParser):
    """Collects tags, attributes and text; knows nothing of how the page was made."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.tags}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
