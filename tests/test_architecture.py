"""What the house promises: imports point one way, nothing heavy before it is needed, public names exist."""

import ast
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

import ftp_lightning

PACKAGE = Path(ftp_lightning.__file__).parent
CORE = (
    "schedule",
    "schedule_family",
    "attention_score",
    "routing",
    "pruning",
    "costs",
    "training",
    "disk",
    "losses",
    "errors",
    "json_file",
    "named_file",
    "yaml_file",
    "whole_files",
)
EDGES = ("lit", "search", "evaluation", "report", "data", "models", "artifact", "fingerprint", "tracking", "hub") + (
    "processes", "launcher", "started", "estimate", "baselines", "device_map", "sharding", "machine", "tuning",
    "serving", "cells", "lock", "products", "stopping",
)  # fmt: skip
HEAVY = {"lightning", "pytorch_lightning", "deap", "lm_eval", "wandb", "datasets", "matplotlib", "jinja2"}
HEAVY |= {"litserve", "fastapi", "uvicorn", "prometheus_client", "pydantic"}
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


@pytest.mark.parametrize("stage", ["run", "search", "evaluate", "generate", "serve", "export"])
def test_help_loads_nothing_heavy(stage):
    loaded = loaded_after(f"from ftp_lightning.__main__ import main\nassert main(['{stage}', '--help']) == 0")
    assert not loaded & {*HEAVY, "torch", "transformers", "numpy"}


def test_the_package_itself_loads_nothing_heavy():
    assert not loaded_after("import ftp_lightning") & {*HEAVY, "torch", "transformers", "numpy"}


def test_the_longest_files_of_tests_are_there():
    from conftest import LONGEST

    here = Path(__file__).resolve().parent
    assert [name for name in LONGEST if not (here / f"test_{name}.py").is_file()] == []


def test_public_names_exist():
    promised = "Schedule TokenPruner FixedRouter StaticRouter RandomRouter DynamicRouter load_pruned".split()
    assert set(promised) <= set(ftp_lightning.__all__)
    assert all(callable(getattr(ftp_lightning, name)) for name in ftp_lightning.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Shedule'"):
        ftp_lightning.Shedule  # noqa: B018


class Way:
    """The functions of this package that a call passes, and the files that they are in."""

    def __enter__(self):
        self.functions: set[tuple[str, int, str]] = set()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        self.files = {file for file, _, _ in self.functions}

    def _see(self, frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            self.functions.add((code.co_filename, code.co_firstlineno, code.co_name))


MOST_FUNCTIONS, MOST_FILES = 55, 9
"""What one `model(x)` may pass [ours]: a newcomer reads all of it. Before these bounds it was 135 in 22 files."""


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["static evict", "dynamic keep", "dynamic keep with options"])
def test_a_forward_passes_few_functions_in_few_files(kind, padded):
    import torch
    from tiny import random_llama

    from ftp_lightning import AttentionScore, DynamicRouter, Schedule, StaticRouter, TokenPruner

    model, options = random_llama(64), {"kv": "evict" if "evict" in kind else "keep"}
    if "options" in kind:
        options["attention"] = AttentionScore(8, heads="max", blocks="max", pooling="max", kernel_size=7)
    pruner = TokenPruner(StaticRouter() if "static" in kind else DynamicRouter(), Schedule([0.0, 0.5, 0.5]), **options)
    ids, mask = torch.randint(3, 64, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, : 7 * padded] = 0
    with torch.no_grad(), pruner(model), Way() as way:
        model(ids, attention_mask=mask)
    assert len(way.functions) <= MOST_FUNCTIONS, sorted(way.functions)
    assert len(way.files) <= MOST_FILES, sorted(way.files)


def module_of(path: Path) -> str:
    parts = ("ftp_lightning", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def at_run_time(node: ast.AST):
    """The nodes below, functions included; what stands under `if TYPE_CHECKING` is never run."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from at_run_time(child)


def imports_of(module: str, tree: ast.AST) -> set[str]:
    """Modules of this package that a module imports, wherever in it."""
    found = set()
    for node in at_run_time(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in whole}
    return (found & MODULES.keys()) - {module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen, rest = set(), [start]
        while rest:
            for name in graph[rest.pop()] - seen:
                seen.add(name)
                rest.append(name)
        return seen

    beyond = {name: reached(name) for name in graph}
    groups = {tuple(sorted(other for other in beyond[name] if name in beyond[other])) for name in graph}
    return sorted(list(group) for group in groups if group)


def test_imports_go_in_no_circle():
    graph = {name: imports_of(name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}
    assert circles(graph) == []


def import_each_first(names: list[str]) -> list[str]:
    """What goes wrong when each module is imported while no other module of ours is. It spoils its process."""
    failed = []
    for name in names:
        for known in [known for known in sys.modules if known.split(".")[0] == "ftp_lightning"]:
            del sys.modules[known]
        try:
            __import__(name)
        except ImportError as error:
            failed.append(f"{name}: {error}")
    return failed


def test_every_module_of_the_core_can_be_imported_first():
    """The imports of packages count as well here: what a module needs must not need the module.

    In a fork: what others wrote is imported there already."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        assert pool.submit(import_each_first, [module_of(path) for path in CORE_FILES]).result() == []


def test_a_circle_is_found_wherever_its_import_stands():
    lazy = ast.parse("def f():\n    from ftp_lightning.schedule import Schedule")
    typed = ast.parse("if TYPE_CHECKING:\n    from ftp_lightning.schedule import Schedule")
    assert imports_of("x", lazy) == {"ftp_lightning.schedule"} and imports_of("x", typed) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
