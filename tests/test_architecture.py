"""What the house promises: imports point one way, nothing heavy before it is needed, public names exist."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ftp_lightning

PACKAGE = Path(ftp_lightning.__file__).parent
CORE = ("schedule", "schedule_family", "routing", "pruning", "losses", "errors", "json_file")
EDGES = ("lit", "search", "evaluation", "report", "data", "models", "artifact", "fingerprint", "tracking", "hub") + (
    "processes", "launcher", "started", "estimate", "baselines", "device_map", "sharding",
)  # fmt: skip
HEAVY = {"lightning", "pytorch_lightning", "deap", "lm_eval", "wandb", "datasets", "matplotlib", "jinja2"}
# The pruned folder names its base model, which `models` loads and tells apart.
CORE_MAY_USE = {"models"}


def imported(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


def parts_used(path: Path) -> set[str]:
    """Parts of this package that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("ftp_lightning.")}


CORE_FILES = [file for part in CORE for file in files_of(part)]
EDGE_FILES = [file for part in EDGES for file in files_of(part)]


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_core_knows_nothing_of_edges_and_heavy_libraries(path):
    assert not {name.split(".")[0] for name in imported(path)} & HEAVY
    assert parts_used(path) <= {*CORE, *CORE_MAY_USE}


@pytest.mark.parametrize("path", EDGE_FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_edges_know_nothing_of_stages(path):
    assert not {"cli", "stages", "studies"} & parts_used(path)


def test_every_part_of_the_package_is_core_edge_or_stage():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts == {*CORE, *EDGES, "cli", "stages", "studies", "__init__", "__main__"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(json.loads(answer.stdout.splitlines()[-1]))


@pytest.mark.parametrize("stage", ["run", "search", "evaluate", "generate"])
def test_help_loads_nothing_heavy(stage):
    loaded = loaded_after(f"from ftp_lightning.__main__ import main\nassert main(['{stage}', '--help']) == 0")
    assert not loaded & {*HEAVY, "torch", "transformers", "numpy"}


def test_the_package_itself_loads_nothing_heavy():
    assert not loaded_after("import ftp_lightning") & {*HEAVY, "torch", "transformers", "numpy"}


def test_public_names_exist():
    promised = "Schedule TokenPruner FixedRouter StaticRouter RandomRouter DynamicRouter load_pruned".split()
    assert set(promised) <= set(ftp_lightning.__all__)
    assert all(callable(getattr(ftp_lightning, name)) for name in ftp_lightning.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Shedule'"):
        ftp_lightning.Shedule  # noqa: B018
