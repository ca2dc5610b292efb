"""A wandb sweep file, read as `wandb sweep` reads it: its grid, and the command line of every run."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.named_file import read_yaml

Run = dict[str, Any]
"""Parameter -> value."""

DEFAULT_COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]
MOST_RUNS = 10_000
"""Of one grid [ours]: each takes minutes."""
AGENT = "Run it with `wandb sweep {}`, then `wandb agent ID`."


def read_sweep(path: str) -> dict[str, Any]:
    """The sweep in a YAML file. UserError where there is none, or one whose runs are not told beforehand."""
    try:
        sweep = read_yaml(path)
    except UserError as error:
        raise UserError(f"study: {error}") from None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise UserError(f"study: {path} has no parameters, so it is not a sweep file\nGive --study sweeps/NAME.yaml.")
    _check_is_grid(sweep, path)
    return sweep


def _check_is_grid(sweep: dict[str, Any], path: str) -> None:
    """UserError for what only wandb's server decides while runs are going on, and for what is not a grid."""
    agent = AGENT.format(path)
    if sweep.get("method") != "grid":
        raise UserError(f"study: the method of {path} is {sweep.get('method')}; alone only a grid is run\n{agent}")
    if type(sweep.get("run_cap", 1)) is not int or sweep.get("run_cap", 1) < 1:
        raise UserError(f"study: run_cap of {path} is {sweep['run_cap']!r}, must be a whole number from 1")
    if "early_terminate" in sweep:
        raise UserError(f"study: {path} stops runs early, for which they are compared as they go\n{agent}")
    for name, told in sweep["parameters"].items():
        listed = isinstance(told, dict) and isinstance(told.get("values", [told.get("value")]), list)
        if not listed or not {"value", "values"} & set(told):
            raise UserError(f"study: parameter {name} of {path} has neither `value` nor a list `values`\n{agent}")
        if told.get("values") == []:
            raise UserError(f"study: parameter {name} of {path} has no values, so there is nothing to run\nAdd some.")


def with_values(sweep: dict[str, Any], path: str, **given: Any) -> dict[str, Any]:
    """The sweep with parameters set; None leaves one as it is. A list of values replaces a list of values.

    UserError where one value is given for a parameter that the study varies.
    """
    parameters = dict(sweep["parameters"])
    for name, value in given.items():
        if value is None:
            continue
        varied = "values" in parameters.get(name, {})
        if varied and not isinstance(value, list):
            raise UserError(f"{name} is what {path} varies, so it cannot be {value}\nLeave --{name} out.")
        parameters[name] = {"values" if isinstance(value, list) else "value": value}
    return sweep | {"parameters": parameters}


def expand(sweep: dict[str, Any]) -> list[Run]:
    """All runs of a grid, in wandb's order: parameters by name, the last one changing first; at most `run_cap`.

    UserError for more than `MOST_RUNS`.
    """
    told = sorted(sweep["parameters"].items())
    values = [one["values"] if "values" in one else [one["value"]] for _, one in told]
    if (count := min(math.prod(map(len, values)), sweep.get("run_cap", math.inf))) > MOST_RUNS:
        raise UserError(f"study: its grid has {count:,} runs, at most {MOST_RUNS:,} are taken\nVary less.")
    chosen = itertools.islice(itertools.product(*values), sweep.get("run_cap"))
    return [dict(zip((name for name, _ in told), run)) for run in chosen]


def arguments(sweep: dict[str, Any], run: Run) -> tuple[str, list[str]]:
    """The stage of this package that `wandb agent` would start for a run, and its arguments.

    UserError where the command starts something else, or has a macro other than ${args}.
    """
    words: list[str] = []
    for word in sweep.get("command", DEFAULT_COMMAND):
        words += [f"--{name}={value}" for name, value in run.items()] if word == "${args}" else [str(word)]
    start = ["${env}", "${interpreter}", "-m", "ftp_lightning"]
    if words[:4] != start or len(words) < 5:
        raise UserError(f"study: its command is not {' '.join(start)} STAGE ${{args}}\nWrite it so.")
    macro = next((word for word in words[5:] if re.fullmatch(r"\$\{.*\}", word)), None)
    if macro:
        raise UserError(f"study: its command has {macro}, which is not understood here\nUse ${{args}} alone.")
    return words[4], words[5:]


def varied(sweep: dict[str, Any]) -> list[str]:
    """Names of the parameters with several values, but for the seed."""
    return [name for name, told in sorted(sweep["parameters"].items()) if "values" in told and name != "seed"]
