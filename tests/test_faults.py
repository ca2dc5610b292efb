"""A share of what tests/faults/kill.py does to every stage; docs/faults.md has the table of a whole run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


SHARES = {
    "killed": "--stages search,train,generate --kills 3 --only killed",
    "broken": "--stages search,train,evaluate --kills 2 --only broken,input,two,full",
}


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
def test_faults_end_in_the_same_result_or_one_clear_error(share):
    command = [sys.executable, str(ROOT / "tests" / "faults" / "kill.py"), *SHARES[share].split(), "--seed", "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
