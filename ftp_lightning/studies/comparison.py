"""Methods of the registry compared at equal FLOPs, on tasks and on the dense model's own answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.data.reading import read_questions
from ftp_lightning.studies.grid import Cell
from ftp_lightning.whole_files import write_text

if TYPE_CHECKING:
    from pandas import DataFrame

    from ftp_lightning.evaluation.bench import Bench
    from ftp_lightning.pruning import TokenPruner


NAMED_BY_SCHEDULE = ("recent_sink",)
VALIDATION_ROWS = 6


@dataclass(frozen=True)
class Compared(Cell):
    """One method at one FLOPs cut on one chunk of one task; `method` "dense" is the model itself."""

    model: str
    task: str
    chunk: int
    cut: float
    method: str


@dataclass(frozen=True)
class Comparison:
    """Measures cells. What is dear is made once per process: the model, what methods look at, dense answers.

    Attributes:
        output: folder of what was found.
        books: folder with the folders `calibration`, `validation` and `test` of text files.
        squad: file of SQuAD's records. prompts: file of prompts that the model answers itself.
        items: of a chunk.
        prompt_tokens: model -> tokens of its prompts, at which methods are placed.
        templated: model -> tasks that are put into its chat template.
    """

    output: Path
    books: str
    squad: str
    prompts: str
    items: int
    prompt_tokens: tuple[tuple[str, int], ...]
    templated: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def measure(self, cell: Compared) -> DataFrame:
        """The record of one method on one chunk of one task."""
        bench = self.bench(cell.model, cell.task, cell.chunk)
        if cell.method == "dense":
            return bench.dense
        form, pruner = self.pruner(cell.model, cell.method, cell.cut)
        return bench.measure(cell.method, pruner).assign(form=form)

    @lru_cache(maxsize=4)  # noqa: B019  it lives as long as the process
    def bench(self, model: str, task: str, chunk: int) -> Bench:
        """The items of one chunk, drawn with the seed `chunk`, and the dense answers to them.

        Methods are asked the items that need the prompt alone, the first item where there are none.
        """
        from ftp_lightning.evaluation.harness.asking import HarnessTasks
        from ftp_lightning.stages.evaluate import EvaluateStage, bench_of

        about: dict[str, Any] = {"model": model, "prompt_tokens": self.tokens(model), "seed": chunk, "batch_size": 4}
        about |= {"items": self.items, "data": f"{self.books}/test", "split": "all", "windows": self.items}
        if task == "own_answers":
            about |= {"rows": task, "data": self.own_prompts(), "continuation_tokens": 24, "tasks": ()}
        else:
            about |= {
                "apply_chat_template": task in dict(self.templated).get(model, ()),
                "task_data": self.squad or None,
            }
            about |= {"tasks": (task,), "windows": 1, "continuation_tokens": 8}
        found = bench_of(EvaluateStage(**about), *self.loaded(model), None, self.output / "answers")
        if isinstance(found.ask, HarnessTasks) and task != "own_answers":
            items = found.needed(found.dense[found.dense["task"] == task])
            found.ask.only = {task: items.loc[items["needed"], "item"].tolist() or [0]}
        return found

    @cache  # noqa: B019
    def pruner(self, model: str, method: str, cut: float) -> tuple[str, TokenPruner]:
        """The method where a prompt of the model's length saves `cut` of its FLOPs, and the form of its schedule.

        A rival is judged by the best of three schedules on validation rows; what is named by its schedule has that one.
        """
        from ftp_lightning.baselines.allocated import Allocated
        from ftp_lightning.baselines.registry import METHODS, Profile, best_form
        from ftp_lightning.studies.calibrated import keep_order

        setting, peer, profile = self.setting(model), METHODS[method], Profile(self.tokens(model))
        if isinstance(peer, Allocated) or method in NAMED_BY_SCHEDULE:
            found = "own", peer.place(setting, cut, profile)
        else:
            found = best_form(peer, setting, cut, profile, self.validation(model))
        keep_order(setting, self.output / model)
        return found

    @lru_cache(maxsize=1)  # noqa: B019
    def validation(self, model: str) -> Callable[[TokenPruner], float]:
        """KL of a pruner on rows of the validation books."""
        from ftp_lightning.evaluation.bench import TEXT, Bench
        from ftp_lightning.stages.inputs import measured_rows
        from ftp_lightning.stages.search import SearchStage

        settings = SearchStage(model=model, data=f"{self.books}/validation", split="all")
        bench = Bench(self.loaded(model)[0], {TEXT: measured_rows(settings, *self.loaded(model), VALIDATION_ROWS, 0.5)})
        return lambda pruner: bench.score("", pruner).kl_mean

    @lru_cache(maxsize=1)  # noqa: B019
    def setting(self, model: str) -> Any:
        """What methods may look at, measured on the calibration books and kept in `output`."""
        from ftp_lightning.studies.calibrated import calibrated

        about: dict[str, Any] = {"model": model, "data": f"{self.books}/calibration", "split": "all"}
        return calibrated(self.loaded(model), self.output / model, **about)

    @lru_cache(maxsize=1)  # noqa: B019
    def loaded(self, model: str) -> tuple[Any, Any]:
        from ftp_lightning.models import load

        return load(model)

    def own_prompts(self) -> str:
        """The file of prompts that the model answers itself."""
        if self.prompts or not self.squad:
            return self.prompts
        path = self.output / "questions.jsonl"
        asked = (
            {"prompt": f"{question.passage}\n\n{question.question}", "document": question.article}
            for question in read_questions([Path(self.squad)], "all")
        )
        write_text(path, "".join(json.dumps(record) + "\n" for record in asked))
        return str(path)

    def tokens(self, model: str) -> int:
        return dict(self.prompt_tokens)[model]
