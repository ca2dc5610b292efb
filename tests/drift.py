"""Tests against other versions of the libraries, in an environment of their own: `make drift [LOWEST=1]`.

    python tests/drift.py [--lowest] [--all] [--torch 2.13.0] [--tests tests/test_engine.py ...]

Installs, with uv, the newest versions within pyproject's ranges, or the lowest ones that can be had together, beside
the torch of requirements.txt (another build of it takes gigabytes: say it by --torch). Prints the versions, what pytest
says of each failure, and ends with its exit status. The environment stays in build/drift for the next time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = """torch transformers tokenizers lightning lm_eval datasets numpy scipy pandas accelerate jsonargparse wandb
    litserve fastapi pydantic""".split()
TESTERS = """pytest>=8 pytest-xdist>=3.5 hypothesis>=6.100 scikit-learn>=1.5 gguf>=0.10 peft>=0.17 openai>=1.50
    tensorboard>=2.17 httpx>=0.27 tenacity>=8 aiohttp>=3.9""".split()
CLOSE = """architecture artifact attention_score base_weights block_sensitivity cli cli_help data_prompts data_text
    doors engine evaluation_lm_eval evaluation_tasks export families generate_arguments host_sync hub models
    pruned_folder report router_training search_stage serve_answers serve_refusals sweep_stage tracking
    train_stage training_resume tune_stage user_calls""".split()
CLOSE = [f"tests/test_{name}.py" for name in CLOSE]
"""What calls torch, transformers, Lightning, lm-eval, datasets, jsonargparse and LitServe most."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowest", action="store_true", help="the lowest versions of the ranges, not the newest")
    parser.add_argument("--torch", default=_pinned("torch"), help="version of torch; its CPU build is taken if there")
    parser.add_argument("--tests", nargs="*", default=CLOSE, help="test files; default: those closest to the libraries")
    parser.add_argument("--all", action="store_true", help="all quick tests")
    parser.add_argument("--install-only", action="store_true")
    chosen = parser.parse_args()
    python = _environment(ROOT / "build" / "drift" / ("lowest" if chosen.lowest else "newest"))
    installed = subprocess.run(_installing(python, chosen.lowest, chosen.torch), cwd=ROOT, check=False)
    if installed.returncode:
        print("drift: these versions cannot be installed together", file=sys.stderr)
        return installed.returncode
    print(_versions(python), flush=True)
    if chosen.install_only:
        return 0
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "--tb=line"]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    tests = [] if chosen.all else chosen.tests
    return subprocess.run([*command, *tests], cwd=ROOT, env=os.environ | offline, check=False).returncode


def _pinned(name: str) -> str:
    found = re.search(rf"^{name}==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"requirements.txt pins no {name}"
    return found.group(1)


def _environment(folder: Path) -> str:
    """The interpreter of a virtual environment that has uv; made where it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
    return str(python)


def _installing(python: str, lowest: bool, torch: str) -> list[str]:
    """The command that installs this package's ranges and what its tests need."""
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    places = [word for place in links for word in ("--find-links", place)]
    cpu = any(path for place in links for path in Path(place).glob(f"torch-{torch}+cpu-*.whl"))
    torch += "+cpu" if cpu else ""
    which = ["--resolution", "lowest-direct"] if lowest else ["--upgrade"]
    about = [*which, *places, f"torch=={torch}", *TESTERS, "-e", "."]
    return [python, "-m", "uv", "pip", "install", "--python", python, *about]


def _versions(python: str) -> str:
    said = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {SHOWN}), sep=', ')"
    return subprocess.run([python, "-c", said], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
