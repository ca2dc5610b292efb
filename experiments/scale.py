"""What do search, training and evaluation take for the models of the literature? `python experiments/scale.py`

Writes the table of docs/scale.md: `--estimate` at the stages' default sizes, bfloat16, on one and on eight devices.
"on 2": spread over two by --device_map auto, because one is too small.
"""

from __future__ import annotations

from dataclasses import replace

from ftp_lightning import models
from ftp_lightning.__main__ import parse
from ftp_lightning.cli.progress import clock
from ftp_lightning.estimate import NEEDS, Need, Shape, empty_model

MODELS = {
    "LLaMA2-7B": "llama-7b",
    "LLaMA2-13B": "llama-13b",
    "LLaMA3-8B": "llama3-8b",
    "Qwen1.5-7B": "qwen1.5-7b",
    "Llama-3.1-8B": "llama-8b",
    "Qwen2.5-7B": "qwen2.5-7b",
}
PLACES = ((1, 24), (8, 24), (1, 80), (8, 80))
STAGES = ("search", "train", "evaluate")


def table() -> str:
    """GitHub's markdown: a row per model and stage."""
    head = "| model, bfloat16 | stage | weights + work, GB | " + " | ".join(f"{n} x {gb} GB" for n, gb in PLACES) + " |"
    lines = [head, "|---" * (3 + len(PLACES)) + "|"]
    for name, shape in MODELS.items():
        model = Shape.of(empty_model(models.load_config(f"random:{shape}"), models.DTYPES["bfloat16"]))
        lines += [
            _row(name, stage, replace(NEEDS[stage](model, parse(stage, [])), largest=model.largest)) for stage in STAGES
        ]
    return "\n".join(lines) + "\n"


def _row(name: str, stage: str, need: Need) -> str:
    cells = [_cell(need, count, gigabytes) for count, gigabytes in PLACES]
    return f"| {name} | {stage} | {need.weights / 1e9:.1f} + {need.working / 1e9:.1f} | " + " | ".join(cells) + " |"


def _cell(need: Need, count: int, gigabytes: int) -> str:
    if not need.fits(gigabytes):
        spread = need.spread(count, gigabytes)
        return "does not fit" if spread is None else f"on {spread}: {clock(need.seconds(1, gigabytes))}"
    return clock(need.seconds(count, gigabytes))


if __name__ == "__main__":
    print(table(), end="")
