"""Recompute the intervals of published studies from their values by seed, and print the old ones beside the new.

    python experiments/recomputed.py experiments/found/studies/*/study.json [--write]

A study.json of before holds intervals over pooled items and, per row, one value for each seed, but not the items. The
new interval is Student's over the seeds, never narrower than the stored one; where no answer differs, it is that of
`statistics.paired`. Doing it again changes nothing.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ftp_lightning.evaluation.statistics import clustered, paired
from ftp_lightning.studies.study_table import MEASURES, changes, interval_text, sentence
from ftp_lightning.whole_files import write_text

SCALE = {"kl": 1.0, "kept": 100.0}


def by_seed(row: dict[str, Any], other: dict[str, Any], measure: str) -> list[float]:
    """Row minus other for each seed."""
    return [SCALE[measure] * (a - b) for a, b in zip(row[measure], other[measure], strict=True)]


def recomputed(old: dict[str, Any], row: dict[str, Any], other: dict[str, Any], measure: str) -> dict[str, Any]:
    """The stored difference with its new interval."""
    differences = by_seed(row, other, measure)
    over_seeds = clustered(differences)
    assert over_seeds.value is not None and over_seeds.high is not None
    reach = max(over_seeds.high - over_seeds.value, old["high"] - old["difference"], old["difference"] - old["low"])
    if reach == 0:
        seeds = [place % len(differences) for place in range(row["answers"])]
        same = [1.0] * len(seeds)
        reach = SCALE[measure] * (paired(same, same, list(range(len(seeds))), seeds).high or 0.0)
    center, most = old["difference"], 100.0 if measure == "kept" else math.inf
    ends = max(center - reach, -most), min(center + reach, most)
    return {"difference": center, "low": ends[0], "high": ends[1], "by_seed": differences}


def renew(study: dict[str, Any]) -> list[str]:
    """Replace the intervals and the sentence of a study; returns a line for each that changed."""
    rows, said = {row["label"]: row for row in study["rows"]}, []
    first = study["rows"][0]["label"]
    for one in [*study["compared"], *study.get("pairs", [])]:
        for measure in MEASURES:
            old = one[measure]
            if old is not None:
                new = recomputed(old, rows[one["label"]], rows[one.get("against", first)], measure)
                if interval_text(new) != interval_text(old):
                    said.append(f"{one['label']}, {measure}: {interval_text(old)} -> {interval_text(new)}")
                one[measure] = new
    study["sentence"] = sentence(first, study["compared"])
    if study.get("pairs"):
        alike = changes("the row that is alike but for the last parameter", study["pairs"])
        study["sentence"] = f"{alike} {study['sentence']}"
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="study.json files")
    parser.add_argument("--write", action="store_true", help="store the new intervals")
    arguments = parser.parse_args()
    for path in arguments.studies:
        study = json.loads(path.read_text(encoding="utf-8"))
        print(f"{path.parent.name}:", *renew(study), sep="\n  ")
        if arguments.write:
            write_text(path, json.dumps(study, indent=1) + "\n")


if __name__ == "__main__":
    main()
