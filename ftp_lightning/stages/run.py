"""Stage `run`: the whole chain on one model and one text, resumed at the first unfinished stage."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ftp_lightning.cli.kv import AUTO, kv_option
from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress, say
from ftp_lightning.cli.settings import BudgetSettings, RowsSettings, StageSettings
from ftp_lightning.device_map import read_device_map
from ftp_lightning.errors import UserError
from ftp_lightning.products import read_product
from ftp_lightning.stages.benchmark import BenchmarkStage
from ftp_lightning.stages.evaluate import OUR_TASKS, EvaluateStage
from ftp_lightning.stages.search import SearchStage
from ftp_lightning.stages.sensitivity import BOTH, SensitivityStage
from ftp_lightning.stages.train import RouterName, TrainStage
from ftp_lightning.whole_files import write_text

ROUND = ("train", "finetune")
COMPARED = ("random", "uniform", "first_dense", "block_influence", "static")


@dataclass(frozen=True, kw_only=True)
class RunStage(BudgetSettings, RowsSettings):
    """Run the whole chain: sensitivity, search, train, finetune, static, evaluate, benchmark, report. Each stage has a
    folder of its own; report.html shows what they found.

    `static` continues the search with the static router for as many generations as the fine-tuning had, so that the
    baseline of this name has searched as long as the trained router. Without that baseline it is left out, with
    --device_map the benchmark, which times one device."""

    stage: ClassVar[str] = "run"

    budget: float = option(0.3, "mean share of tokens that skip a block; see --budget_kind", least=0.0, below=1.0)
    kv: str = kv_option("keep", "skipped tokens give no keys and values (evict), or do (keep)")
    search_kv: bool = option(False, "search the kv mode of every block as well, in place of --kv")
    sensitivity_windows: int = option(16, "calibration windows of the sensitivity", least=1, most=10**7)
    search_windows: int = option(32, "calibration windows of search and fine-tuning", least=1, most=10**7)
    generations: int = option(15, "generations of the search", least=0, most=10**5)
    finetune_generations: int = option(6, "generations of the fine-tuning", least=0, most=10**5)
    offspring: int = option(8, "children per generation", least=1, most=10**5)
    router: RouterName = option(
        "dynamic", "which router; `projected` and `projected_once` also see 12 directions of the hidden state"
    )
    guide: Literal["static", "future"] = option("static", "what the guide loss teaches, see `train --guide`")
    guide_share: float = option(0.25, "share of the steps over which the guide loss decays to 0", least=0.0, most=1.0)
    guide_decay: Literal["linear", "cosine", "constant"] = option("linear", "how the guide loss decays")
    dense: int | None = option(
        None,
        "train first under a uniform schedule with so many dense blocks; else the searched one",
        least=0,
    )
    rounds: int = option(
        1, "how often router and schedule are adapted to each other, by train and finetune", least=1, most=1000
    )
    steps: int = option(200, "steps of router training", least=1, most=10**8)
    batch_size: int = option(4, "windows per step of router training", least=1, most=10**6)
    validation_windows: int = option(
        TrainStage.validation_windows, "windows that router training is measured on, at most", least=1, most=10**7
    )
    learning_rate: float = option(1e-2, "learning rate of router training", above=0.0, most=10.0)
    recall_share: float = option(0.5, "share of windows that hold facts to recall", least=0.0, most=1.0)
    train_data: str | None = option(None, "text to train the router on, if it differs from --data")
    test_data: str | None = option(None, "text to evaluate on, if it differs from --data")
    test_split: str = option("auto", "split of the text to evaluate on; `auto` is test")
    compare: tuple[str, ...] = option(COMPARED, "baselines to evaluate beside the trained router")
    tasks: tuple[str, ...] = option(OUR_TASKS, "tasks to evaluate")
    items: int = option(300, "questions with facts to recall", least=1, most=10**7)
    limit: int | None = option(None, "items per task at most", least=1, most=10**7)
    task_data: str | None = option(None, "folder of TASK.jsonl, in the Hub's schema, for lm-eval's tasks")
    num_fewshot: int | None = option(
        None, "examples before each item of lm-eval's tasks; else the task's own", least=0, most=10_000
    )
    apply_chat_template: bool = option(False, "put the items into the model's chat template")
    test_windows: int | None = option(None, "windows of test text at most; all of them by default", least=1, most=10**7)
    lengths: tuple[int, ...] = option((), "prompt lengths of the benchmark; by default 512, 1024, 2048")
    pairs: int = option(15, "pairs of prefills per length", least=2, most=10_000)
    processes: int = option(
        1,
        "processes that share search, training (W of them: W times the rows) and the items of tasks",
        least=1,
        most=1024,
    )

    def check(self) -> None:
        super().check()
        if self.dense is not None and self.budget_kind == "flops":
            raise UserError(
                "--dense makes a uniform schedule, whose budget is a share of tokens\nLeave --budget_kind out."
            )
        if self.search_kv and self.kv != RunStage.kv:
            raise UserError(
                "--kv cannot be combined with --search_kv, which finds the mode of every block\nRemove one of them."
            )
        if self.search_kv and self.dense is not None:
            raise UserError("--dense makes a uniform schedule, and --search_kv searches for one\nRemove one of them.")
        self.stages()

    @property
    def found_kv(self) -> str:
        """--kv of the stages that take the mode of the searched schedule, where one is searched."""
        return AUTO if self.search_kv else self.kv

    def execute(self, progress: Progress | None = None) -> Path:
        from ftp_lightning.report import build_report, headline
        from ftp_lightning.stages.run_inputs import check_inputs
        from ftp_lightning.stages.run_work import REPORT, shares

        started, before, finished, stages = time.monotonic(), 0.0, 0.0, self.stages()
        if self.estimate is not None:
            return self._say_estimates(stages)
        share_of = shares(stages, check_inputs(stages))
        for number, (name, settings) in enumerate(stages.items(), start=1):
            label = f"[{number}/{len(stages) + 1}] {name}"
            shown = Progress(label, before, share_of[name], started, finished_before=finished, after=REPORT)
            settings.execute(shown)
            before += share_of[name]
            finished += share_of[name] if shown.idle else 0.0
        write_text(self.folder / "rounds.json", json.dumps(gains(self.folder, self.rounds), indent=1) + "\n")
        page = build_report(self.folder)
        say(headline(read_product(self.folder / "evaluate", "results.json")))
        Progress(f"[{len(stages) + 1}/{len(stages) + 1}] report", started=started).done(f"wrote {page}")
        return self.folder

    def _say_estimates(self, stages: dict[str, StageSettings]) -> Path:
        """What every stage would take that takes long."""
        for settings in stages.values():
            if settings.stage != "benchmark":
                settings.say_estimate()
        return self.folder

    def stages(self) -> dict[str, StageSettings]:
        """The settings of every stage of the chain, in order; each reads what those before it wrote. All rounds but the
        last lie in folders of their own, round1/train, …"""
        measured, searched = self._at("sensitivity/sensitivity.json"), self._at("search/schedule.json")
        trained, tuned = self._at("train/pruned"), self._at("finetune/pruned")
        sizes = {"windows": self.search_windows, "offspring": self.offspring, "recall_share": self.recall_share}
        budget = {name: getattr(self, name) for name in ("budget", "budget_kind", "budget_length")}
        search = sizes | budget | {"kv": self.found_kv, "search_kv": self.search_kv}
        search |= {"sensitivity": measured, "processes": self.processes}
        search |= self.row_flags()
        evaluate = {"compare": self.compare, "before": trained, "sensitivity": measured}
        tuning = search | {"generations": self.finetune_generations}
        longer = search | {"generations": self.rounds * self.finetune_generations, "schedule": searched}
        chain: dict[str, tuple[type[StageSettings], dict[str, Any]]] = {
            "sensitivity": (SensitivityStage, self._sensitivity()),
            "search": (SearchStage, search | {"generations": self.generations}),
            **self._rounds(tuning, searched),
            "static": (SearchStage, longer),
            "evaluate": (EvaluateStage, self._evaluation() | evaluate | {"pruned": tuned}),
            "benchmark": (BenchmarkStage, {"lengths": self.lengths, "pairs": self.pairs, "pruned": tuned}),
        }
        if "static" in self.compare:
            chain["evaluate"][1]["static_schedule"] = self._at("static/schedule.json")
        else:
            del chain["static"]
        if read_device_map(self.device_map) is not None:  # it times one device
            del chain["benchmark"]
        shared = self.shared()
        return {name: kind(**shared | {"output": self._at(name)} | more) for name, (kind, more) in chain.items()}

    def _at(self, name: str) -> str:
        return str(self.folder / name)

    def _rounds(self, tuning: dict[str, Any], searched: str) -> dict[str, tuple[type[StageSettings], dict[str, Any]]]:
        """Train and finetune, round after round: the next goes on from the pruner that the one before has tuned."""
        chain: dict[str, tuple[type[StageSettings], dict[str, Any]]] = {}
        schedule = searched
        first: dict[str, Any] = (
            {"schedule": searched} if self.dense is None else {"budget": self.budget, "dense": self.dense}
        )
        start = first | {"kv": self.found_kv, "router": self.router}
        for place in round_places(self.rounds):
            trained = {"pruned": self._at(f"{place}train/pruned"), "schedule": schedule}
            chain[f"{place}train"] = (TrainStage, self._training() | start)
            chain[f"{place}finetune"] = (SearchStage, tuning | trained)
            schedule = self._at(f"{place}finetune/schedule.json")
            start = {"pruned": self._at(f"{place}finetune/pruned")}
        return chain

    def _sensitivity(self) -> dict[str, Any]:
        return {
            "kv": BOTH if self.search_kv else self.kv,
            "windows": self.sensitivity_windows,
            "recall_share": self.recall_share,
        } | self.row_flags()

    def _training(self) -> dict[str, Any]:
        names = ["steps", "batch_size", "learning_rate", "recall_share", "processes"]
        names += ["validation_windows", "guide", "guide_share", "guide_decay"]
        return {name: getattr(self, name) for name in names} | {"data": self.train_data or self.data} | self.row_flags()

    def _evaluation(self) -> dict[str, Any]:
        names = ("tasks", "items", "limit", "task_data", "num_fewshot", "apply_chat_template", "processes")
        text = {"data": self.test_data or self.data, "split": self.test_split, "windows": self.test_windows}
        return {name: getattr(self, name) for name in names} | text | self.row_flags()


def round_places(rounds: int) -> list[str]:
    """Where the rounds lie in a run's folder; the last lies where a single one does."""
    return [*(f"round{number}/" for number in range(1, rounds)), ""]


def gains(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Of each round the KL before and after: of the router on validation windows, of the schedule on calibration
    windows with that router."""
    found = []
    for number, place in enumerate(round_places(rounds), start=1):
        trained, tuned = (read_product(folder / f"{place}{name}", "metrics.json") for name in ROUND)
        router = {"before": trained["validation_kl"][0]["kl"], "after": trained["best_validation_kl"]}
        schedule = {"before": tuned["allocations"]["given"], "after": tuned["value"]}
        found.append({"round": number, "router_validation_kl": router, "schedule_calibration_kl": schedule})
    return found
