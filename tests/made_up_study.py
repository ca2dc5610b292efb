"""A made-up study: three settings, three seeds, two metrics."""

import json
from pathlib import Path
from typing import Any


def study() -> dict[str, Any]:
    rows = [
        ("all factors", ["position", "score"], [0.90, 0.92, 0.94], [0.010, 0.012, 0.011]),
        ("position alone", ["position"], [0.80, 0.82, 0.84], [0.020, 0.011, 0.012]),
        ("no factor", [], [0.89, 0.95, 0.93], [0.010, None, 0.011]),
    ]
    return {
        "question": "Which factors does the router need?", "command": "make ablation-factors",
        "baseline": "all factors",
        "metrics": [{"name": "kept", "unit": "share", "better": "higher"}, {"name": "validation KL"}],
        "rows": [{"label": label, "parameters": {"factors": factors, "steps": 60}, "seeds": [0, 1, 2],
                  "metrics": {"kept": kept, "validation KL": kl}} for label, factors, kept, kl in rows],
    }  # fmt: skip


def write_study(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study() | changes))
    return folder
