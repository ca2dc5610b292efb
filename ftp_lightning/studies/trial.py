"""Stage `trial`: one run of a study: a schedule, a router trained under it, and what they keep."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.cli.kv import kv_option
from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import StageSettings, picked, text_identity
from ftp_lightning.errors import UserError
from ftp_lightning.lock import locked
from ftp_lightning.products import read_product
from ftp_lightning.stages.search import SearchStage
from ftp_lightning.stages.sensitivity import SensitivityStage
from ftp_lightning.stages.train import RouterName, TrainStage

STUDIES = "runs/studies"
UNTRAINED = ("static", "random")
SEARCHED = "searched"
MEASURED = ("block_influence", "gradient", "sensitivity")
"""Allocations that look at a measured sensitivity."""
SENSITIVITY_WINDOWS = 8


class _Untrained(TrainStage):
    """The settings of a pruner that is made and not trained."""

    def check_trains(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class TrialStage(_Untrained):
    """One run of a study: find a schedule, train a router, measure KL and answers kept. Writes results.json.

    What runs have in common (sensitivity, schedule, router) is found once and lies in --shared_folder, named by all
    that decides it. `sweep` makes the runs of a study and compares them.
    """

    stage: ClassVar[str] = "trial"
    spreads: ClassVar[bool] = False

    study: str = option("trial", "name of the study that this run belongs to, and of its folder", passive=True)
    label: str | None = option(
        None, "name of this run in tables; by default the settings that differ", passive=True, raw=True
    )
    quoted: float | None = option(None, "the paper's number for it, shown beside ours", passive=True)
    shared_folder: str = option(f"{STUDIES}/shared", "folder of what several runs share", passive=True)
    budget: float = option(0.3, "mean share of tokens that skip a block", least=0.0, below=1.0)
    router: RouterName | Literal["static", "random"] = option(  # type: ignore[assignment]  # wider on purpose
        "dynamic", "which router; static and random learn nothing"
    )
    kv: str = kv_option("keep", "skipped tokens give no keys and values (evict), or do (keep)")
    steps: int = option(60, "optimiser steps", least=1, most=10**8)
    batch_size: int = option(2, "windows per forward", least=1, most=10**6)
    validations: int = option(
        1, "times the router is measured while it trains; at 1 no state is chosen", least=1, most=10**6
    )
    allocation: str = option(SEARCHED, "how the budget is spread over the blocks: searched, or an allocation by name")
    generations: int = option(6, "generations of the search", least=0, most=10**5)
    finetune_generations: int = option(
        0, "generations of a search with the trained router; 0: none", least=0, most=10**5
    )
    calibration: str | None = option(None, "text to search on, if it differs from --data")
    calibration_windows: int = option(16, "calibration windows to search on", least=1, most=10**7)
    calibration_recall_share: float = option(
        0.5, "share of the calibration windows that holds facts to recall", least=0.0, most=1.0
    )
    decode: Literal["dense", "threshold", "strict"] = option("dense", "which generated tokens skip blocks")
    threshold: float = option(
        0.5, "probability of being computed below which a generated token skips", least=0.0, most=1.0
    )
    test_data: str | None = option(None, "text to measure on, if it differs from --data")
    test_split: str = option("validation", "split of the text to measure on; `test` is for final tables")
    test_windows: int = option(32, "windows to measure KL on, half of them with facts to recall", least=2, most=10**7)
    items: int = option(120, "questions with facts to recall", least=1, most=10**7)

    def check(self) -> None:
        super().check()
        named = Path(self.study).name == self.study != ".." and self.study.isprintable()
        if not named or not 0 < len(self.study) <= 100:
            raise UserError(f"study is {self.study[:100]!r}, which names no folder\nGive a name without slashes.")
        if self.shard:
            raise UserError("a run of a study works on one device only\nLeave --shard out.")
        for name in ("pruned", "schedule", "budgets", "dense"):
            if getattr(self, name):
                raise UserError(f"{name} is given, but a run of a study finds its own\nLeave --{name} out.")
        if self.finetune_generations and self.router in UNTRAINED:
            raise UserError(
                f"--finetune_generations needs a trained router, and router {self.router} is not\nRemove one of them."
            )
        self._check_allocation()

    def _check_allocation(self) -> None:
        from ftp_lightning.search.allocate import ALLOCATIONS

        if self.allocation != SEARCHED and self.allocation not in ALLOCATIONS:
            raise UserError(
                f"there is no allocation {self.allocation!r}\nAllocations: {SEARCHED}, {', '.join(ALLOCATIONS)}."
            )

    @property
    def folder(self) -> Path:
        """By default STUDIES/STUDY/runs/DIGEST: runs of equal settings are one run, whoever starts them."""
        return Path(self.output).expanduser() if self.output else Path(STUDIES) / self.study / "runs" / self.digest

    @property
    def digest(self) -> str:
        """12 hex digits over the settings that decide the result."""
        settings = {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata["passive"]}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def identity(self) -> dict[str, Any]:
        texts = {name: getattr(self, name) for name in ("calibration", "test_data")}
        return super().identity() | {name: text and text_identity(text) for name, text in texts.items()}

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.stages.inputs import keeping_models

        with keeping_models():
            self._run(folder, progress)

    def _run(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.stages.inputs import load_model
        from ftp_lightning.studies.bench import measure

        pruner, training = self.find_pruner(progress)
        found = measure(self, pruner) | {"parameters": training["parameters"] if training else 0}
        folder.write_json("results.json", self.about() | found)
        numbers = {"kl": found["kl"], "kept": found["kept"]["share"], "realised_sparsity": found["realised_sparsity"]}
        folder.write_json("metrics.json", numbers)
        pruner.save(folder.place("pruned"), base=self.model, model=load_model(self)[0])
        self._track(folder, pruner, numbers, training["steps"] if training else [])
        share = found["kept"]["share"]
        kept = "the dense model answers nothing right" if share is None else f"{share:.1%} of the answers kept"
        progress.done(f"KL {found['kl']:.3g}, {kept}")

    def _track(self, folder: StageFolder, pruner: Any, numbers: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """The run as a whole: its training may have been carried out by another one."""
        from ftp_lightning.stages.inputs import load_model
        from ftp_lightning.stages.routed_story import pruner_images
        from ftp_lightning.tracking import log_outcome, logging_to

        images = pruner_images(self, *load_model(self), pruner)
        with logging_to(self.tracking, folder.place("logs").parent, self.config(), "trial", self.study) as logger:
            log_outcome(logger, numbers=numbers, history=history, images=images, pruned=folder.path / "pruned")

    def about(self) -> dict[str, Any]:
        """What a table is told of the run."""
        return {"label": self.label, "seed": self.seed, "quoted": self.quoted, "budget": self.budget, "kv": self.kv}

    def find_pruner(self, progress: Progress) -> tuple[Any, dict[str, Any] | None]:
        """The pruner that is measured, and the metrics of its training, None where nothing was to be trained."""
        from ftp_lightning.pruning import TokenPruner

        searched = self.search_settings(progress)
        schedule = self._shared(searched, progress) / "schedule.json"
        if self.router in UNTRAINED:
            return self._untrained(schedule), None
        trained = self._shared(replace(picked(TrainStage, self), schedule=str(schedule), budget=None), progress)
        place = trained / "pruned"
        if self.finetune_generations:
            tuning: dict[str, Any] = {
                "pruned": str(place),
                "schedule": str(schedule),
                "generations": self.finetune_generations,
            }
            place = self._shared(replace(searched, kv="auto", allocations=(), **tuning), progress) / "pruned"
        pruner = TokenPruner.load(place).changed(decode=self.decode, threshold=self.threshold)
        return pruner, read_product(trained, "metrics.json")

    def search_settings(self, progress: Progress) -> SearchStage:
        """The search for the schedule; of a named allocation, which is what is found then."""
        own: dict[str, Any] = {"budget": self.budget, "kv": self.kv, "windows": self.calibration_windows}
        named = () if self.allocation == SEARCHED else (self.allocation,)
        own |= {"generations": 0 if named else self.generations, "allocations": named}
        if not named or self.allocation in MEASURED:
            measured = self._on_calibration(SensitivityStage, kv=self.kv, windows=SENSITIVITY_WINDOWS)
            own["sensitivity"] = str(self._shared(measured, progress) / "sensitivity.json")
        return self._on_calibration(SearchStage, **own)

    def _on_calibration(self, kind: type[StageSettings], **own: Any) -> Any:
        text = {"data": self.calibration or self.data, "recall_share": self.calibration_recall_share}
        text |= self.row_flags()
        return kind(**self.shared() | text | own)

    def _untrained(self, schedule: Path) -> Any:
        from ftp_lightning.routing import RandomRouter
        from ftp_lightning.stages.inputs import load_model
        from ftp_lightning.stages.train import new_pruner

        settings = replace(picked(_Untrained, self), schedule=str(schedule), budget=None)
        pruner = new_pruner(settings, *load_model(self))
        changes = {"router": RandomRouter(self.seed)} if self.router == "random" else {}
        return pruner.changed(decode=self.decode, threshold=self.threshold, **changes)

    def _shared(self, settings: StageSettings, progress: Progress) -> Path:
        """The folder of a finished stage that other runs may have carried out; one process at a time does."""
        from ftp_lightning.studies.runner import is_finished

        told = settings.config(), settings.identity(), ""
        name = StageFolder(Path(), settings.stage, *told).fingerprint
        place = Path(self.shared_folder).expanduser() / f"{settings.stage}-{name}"
        placed = replace(settings, output=str(place), tracking="none", overwrite=False)
        if not is_finished(placed):
            with locked(place):
                placed.execute(Progress(f"{progress.label}, {settings.stage}"))
        return place
