"""Quantised models, in a process that can import torchao: elsewhere it would be imported and complain every time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCHAO = Path(sys.prefix) / "torchao"


@pytest.mark.skipif(not TORCHAO.is_dir(), reason="torchao is not in .venv/torchao; `make setup` puts it there")
def test_quantised_models_are_exact_or_refused():
    """Runs the tests of `test_peft_quantised.py` that skip without torchao."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TORCHAO), os.environ.get("PYTHONPATH", "")])}
    tests = str(Path(__file__).with_name("test_peft_quantised.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-m", "torchao"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and " passed" in last, done.stdout[-3000:]
