"""Reads what the stages left in a run folder; a stage that has not been run is `None`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.named_file import parse_yaml
from ftp_lightning.products import found_product, is_as_written, product_text, read_provenance

STAGES = ("sensitivity", "search", "train", "finetune", "static", "evaluate", "benchmark")

PRODUCTS = {
    "sensitivity": "sensitivity/sensitivity.json",
    "search": "search/metrics.json",
    "search_schedule": "search/schedule.json",
    "train": "train/metrics.json",
    "finetune": "finetune/metrics.json",
    "finetune_schedule": "finetune/schedule.json",
    "static": "static/metrics.json",
    "static_schedule": "static/schedule.json",
    "evaluate": "evaluate/results.json",
    "tokens": "evaluate/tokens.json",
    "benchmark": "benchmark/benchmark.json",
}

Run = dict[str, Any]
"""Product name (a key of `PRODUCTS`) -> the parsed JSON, or None where the file does not exist."""


def read_run(folder: Path) -> Run:
    """Every product of the run, by name.

    Errors: UserError if `folder` is no folder or holds no product at all, or a product is not JSON.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.\nGive the output folder of `run`.")
    run = {name: read_json(folder / path) for name, path in PRODUCTS.items()}
    criteria = {stage: read_config(folder / stage).get("criterion", "kl") for stage in ("search", "finetune", "static")}
    if all(product is None for product in run.values()):
        raise UserError(
            f"{folder} holds nothing that a stage of a run has written.\n"
            "Give the output folder of `run`: the one with search/, train/, evaluate/ in it."
        )
    return run | {"criteria": criteria}


def read_json(path: Path) -> Any:
    """The parsed file, or None if there is none. UserError where it is broken, or not what its stage has written."""
    return found_product(path.parent, path.name)


def read_text(path: Path) -> str | None:
    """The file's text, or None if there is none. UserError as `read_json`."""
    return product_text(path.parent, path.name)


@contextmanager
def as_stages_write(*folders: Path) -> Iterator[None]:
    """Inside, what goes wrong with values that no stage has written is a UserError that names their files.

    Files whose hash stands in the record of their stage are not suspected: what goes wrong with these is our fault.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        paths = [folder / name for folder in folders for name in (*PRODUCTS.values(), "study.json", "tune.json")]
        doubted = [str(path) for path in paths if path.exists() and not _is_sure(path)]
        if not doubted:
            raise
        raise UserError(
            f"one of {', '.join(doubted[:4])} is not what a stage writes ({type(error).__name__}: {str(error)[:100]})\n"
            "Run its stage again with --overwrite."
        ) from error


def _is_sure(path: Path) -> bool:
    return bool(is_as_written(path.parent, path.name))


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of `evaluate`, whose numbers the page quotes first, else of the last stage that left a config.yaml.

    A named model is given by its title, which tells its weights. Errors: UserError if the file is not YAML.
    """
    for stage in ("evaluate", *reversed(STAGES)):
        if settings := read_config(folder / stage):
            parts = (read_provenance(folder / stage) or {}).get("parts") or {}
            # a title has blanks; hashes of folders and names of the Hub have none
            known = str(parts.get("model", ""))
            return {**settings, "model": known} if " " in known else settings
    return {}


def read_config(stage_folder: Path) -> dict[str, Any]:
    """The settings that a stage has left in its config.yaml; empty where there is none. UserError if it is not YAML."""
    path = stage_folder / "config.yaml"
    found = parse_yaml(read_text(path) or "", str(path))
    return found if isinstance(found, dict) else {}


def read_origins(folder: Path) -> list[dict[str, Any]]:
    """How each stage came about: `{"stage", "provenance", "config"}` of stages that left either, in run order."""
    origins = []
    for stage in STAGES:
        text = read_text(folder / stage / "config.yaml")
        provenance = read_provenance(folder / stage)
        if provenance is not None or text is not None:
            origins.append({"stage": stage, "provenance": provenance or {}, "config": text})
    return origins
