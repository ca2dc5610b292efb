"""The measured ways to a schedule (experiments/found/schedules) as a study, for the pictures.

python docs/schedules_study.py runs/schedules-30-evict && ftp-lightning report runs/schedules-30-evict
"""

import json
import sys
from pathlib import Path

FOUND = Path(__file__).resolve().parents[1] / "experiments" / "found" / "schedules"
CELL, BASELINE = "evict-0.3", "uniform"
QUESTION = "Which way to a schedule keeps most at 30 % under evict? (10 M reference Llama, real books)"
METRICS = [
    {"name": "kl", "title": "held-out KL", "unit": "nats per continuation token", "better": "lower"},
    {"name": "kept", "title": "answers kept", "unit": "share", "better": "higher"},
]


def study() -> dict:
    """study.json of one cell: a row per method that every seed has."""
    seeds = {int(path.stem.rsplit("-", 1)[1]): json.loads(path.read_text()) for path in sorted(FOUND.glob(f"{CELL}-*"))}
    methods = [name for name in seeds[0] if all(name in found for found in seeds.values())]
    rows = [
        {
            "label": name,
            "seeds": list(seeds),
            "metrics": {
                "kl": [found[name]["held"]["kl"] for found in seeds.values()],
                "kept": [kept(found[name]) for found in seeds.values()],
            },
        }
        for name in methods
    ]
    return {"question": QUESTION, "command": "python experiments/schedules.py --kv evict --budgets 0.3",
            "metrics": METRICS, "rows": rows, "baseline": BASELINE}  # fmt: skip


def kept(found: dict) -> float:
    """Share of the answers that need the passage which are still right."""
    right = [ok for ok, needed in zip(found["right"], found["need"], strict=True) if needed]
    return sum(right) / len(right)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study(), indent=1) + "\n")
