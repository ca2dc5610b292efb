"""The scripts under experiments/ that measure: they run as their first lines say, at a tiny shape."""

import runpy
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_decode_skipping_says_ratio_and_limit(monkeypatch, capsys, kv):
    arguments = ["--model", "random:tiny", "--kv", kv, "--prompt_tokens", "40", "--steps", "4", "--share", "0.34"]
    monkeypatch.setattr(sys, "argv", ["decode_skipping.py", *arguments])
    runpy.run_path(str(EXPERIMENTS / "decode_skipping.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith(f"random:tiny float32 {kv}, 34% of the blocks skipped at 40 tokens: ")
    assert "bytes allow 1." in said
