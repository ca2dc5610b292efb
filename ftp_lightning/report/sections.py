"""What the page shows and in which order: the table of its sections and figures."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ftp_lightning.report import block_figures, figures, outcome_figures, outcome_series, series, training_figures
from ftp_lightning.report.reading import Run


@dataclass(frozen=True)
class Plot:
    """A figure: `rows` takes the run and gives the data, `draw` takes these and gives the Figure."""

    name: str
    title: str
    caption: str
    rows: Callable[[Run], series.Rows]
    draw: Callable[[series.Rows], Any]
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page. `needs`: product (a key of `reading.PRODUCTS`) -> the stage that makes it."""

    key: str
    title: str
    intro: str
    needs: dict[str, str]
    plots: tuple[Plot, ...] = ()

    def missing(self, run: Run) -> list[str]:
        """The stages this section would have liked to read, but which left nothing."""
        return list(dict.fromkeys(stage for product, stage in self.needs.items() if run[product] is None))


OUTCOME = (
    Plot("kept", "Answers kept", "Of the items that dense answers right, and wrong without the passage: the share "
         "still right. Whiskers: 95 % interval.", outcome_series.kept, outcome_figures.kept),
    Plot("kl", "Distance from the dense model", "Dot: mean over continuation tokens. Tick at the end of the line: 99th "
         "percentile. Left of a dashed line (the noise floor) no difference can be measured.", outcome_series.kl,
         outcome_figures.kl),
    Plot("kept_by_distance", "Answers kept, by distance", "How many tokens lie between the fact and the question. "
         "Whiskers: 95 % interval.", outcome_series.kept_by_distance, outcome_figures.kept_by_distance, True),
    Plot("pareto", "What the saving costs", "Right and up is better. Dashed: the methods that no other beats in both. "
         "FLOPs, not time: measured time is under Speed.", outcome_series.pareto, outcome_figures.pareto,
         True),
)  # fmt: skip

SCHEDULE = (
    Plot("schedule", "Sparsity of every block", "Found with the static router, then fine-tuned with the trained one. "
         "Diamonds: what the evaluation realised. Hatched: skipped tokens leave no keys and values (evict), where "
         "others keep theirs.", series.schedules, figures.schedules, True),
    Plot("realised", "Realised against target", "Bars: the share of the prompts' tokens that skipped the block, by the "
         "method of the headline. Below: the difference, on its own scale.", outcome_series.realised,
         block_figures.realised, True),
)  # fmt: skip

GATES = (
    Plot("gates", "Gates", "Filled: the block computed the token. Above: how many blocks computed it.",
         outcome_series.gates, block_figures.gates, True),
)  # fmt: skip

BLOCKS = (
    Plot("sensitivity", "One block at a time", "This block alone skips tokens, all others are dense.",
         series.sensitivity, figures.sensitivity),
    Plot("influence", "Block Influence and redundancy", "Above: how far a block turns its input. Below: the share of "
         "tokens whose input and output nearly agree.", series.influence, figures.influence),
    Plot("gradient", "Gradient of a token's gate", "How much the continuation's loss changes with a gate on the "
         "block's update of one prompt token.", series.gradient, block_figures.gradient),
    Plot("positions", "Are the same positions redundant in every text?", "Above: overlap of the redundant positions "
         "of two texts; dotted: as many tokens anywhere. Below: what position alone explains; gaps: not defined.",
         series.positions, block_figures.positions),
)  # fmt: skip

SEARCH = (
    Plot("search", "Search with the static router", "Every schedule has the same mean. Horizontal lines: allocations "
         "that need no search, and what the search was given to start from.",
         partial(series.convergence, stage="search"), figures.convergence),
    Plot("finetune", "Fine-tuning with the trained router", "The same search, from the schedule found (start), with "
         "the router that will be deployed. Other lines: allocations that need no search.",
         partial(series.convergence, stage="finetune"), figures.convergence),
    Plot("static", "Search with the static router, continued", "From the schedule found, for as many generations as "
         "the fine-tuning: the static router that the evaluation compares with has searched as long.",
         partial(series.convergence, stage="static"), figures.convergence),
)  # fmt: skip

TRAINING = (
    Plot("losses", "Losses", "Faint: every step. Bold: running mean over the last 5 % of the steps. The guide tells "
         "the router to decide as the static one, and fades.", series.losses, training_figures.losses, True),
    Plot("weighted", "Which loss is minimised", "Weight times loss, running mean, stacked. A loss that is hardly seen "
         "here decides nothing.", series.weighted, training_figures.weighted),
    Plot("target_and_soft", "Target, soft and realised sparsity", "At the last training step. The sparsity loss pulls "
         "where a bar stays below its mark.", series.target_and_soft, training_figures.target_and_soft),
    Plot("validation", "Validation", "KL per continuation token on windows that were not trained on; the best state "
         "is kept.", series.validation, training_figures.validation),
)  # fmt: skip

SPEED = (
    Plot("speed", "Prefill, measured", "Solid: measured, with its 95 % interval. Dashed: if blocks took what stock "
         "ones of the kept tokens take. Dotted: what the FLOPs saved would allow. Decoding is not part of it.",
         outcome_series.speed, outcome_figures.speed, True),
)  # fmt: skip

SECTIONS = (
    Section("result", "Result", "", {"evaluate": "evaluate"}, OUTCOME),
    Section("schedule", "Schedule", "The share of tokens that skip each block; the mean is the budget. Blocks are "
            "numbered from 1, nearest the input.", {"search_schedule": "search", "finetune_schedule": "finetune",
            "evaluate": "evaluate"}, SCHEDULE),
    Section("story", "Which tokens are computed", "", {"tokens": "evaluate"}, GATES),
    Section("speed", "Speed", "", {"benchmark": "benchmark"}, SPEED),
    Section("tasks", "Tasks", "", {"evaluate": "evaluate"}),
    Section("blocks", "Sensitivity of the blocks", "What the search begins with.",
            {"sensitivity": "sensitivity"}, BLOCKS),
    Section("search", "Search", "", {"search": "search", "finetune": "finetune",
            "static": "static"}, SEARCH),
    Section("training", "Training of the router", "", {"train": "train"}, TRAINING),
)  # fmt: skip
