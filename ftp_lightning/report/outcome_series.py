"""Rows (see `series`) of what evaluation and benchmark measured."""

from typing import Any

from ftp_lightning.report.reading import Run
from ftp_lightning.report.series import Rows, by_block
from ftp_lightning.report.wording import headline_method, method_labels


def realised(run: Run) -> Rows:
    """block, target, realised, difference: what the schedule of the headline method asks, what its evaluation did.

    Empty where the evaluated method is none whose schedule the run holds.
    """
    method = headline_method(run["evaluate"]) or {}
    schedule = run[SCHEDULES[method["name"]]] if method.get("name") in SCHEDULES else None
    done = method.get("realised_per_block")
    if not schedule or not done or len(done) != len(schedule["sparsity"]):
        return []
    target = schedule["sparsity"]
    return by_block(target=target, realised=done, difference=[a - b for a, b in zip(done, target)])


SCHEDULES = {
    "dynamic": "finetune_schedule",
    "dynamic (before fine-tuning)": "search_schedule",
    "static": "static_schedule",
}
"""Method of an evaluation -> the product that holds its schedule."""


def gates(run: Run) -> Rows:
    """token, text, computed_by, block_1, …: which blocks (1 = computed) took each token of the shown text."""
    found = run["tokens"]
    if not found:
        return []
    return [
        {"token": place, "text": text, "computed_by": count}
        | {f"block_{block}": int(keep[place - 1]) for block, keep in enumerate(found["keep"], start=1)}
        for place, (text, count) in enumerate(zip(found["tokens"], found["computed_by"], strict=True), start=1)
    ]


def pareto(run: Run) -> Rows:
    """method, label, flops_cut, share, low, high, best: answers kept against FLOPs saved, dense first; `best` 1 where
    no other method saves as much and keeps more. Empty without answers to keep."""
    methods = [(m, label) for m, label in method_labels(run["evaluate"]) if m.get("kept") and "flops_reduction" in m]
    if not methods:
        return []
    rows = [{"method": "dense", "label": "dense", "flops_cut": 0.0, "share": 1.0, "low": 1.0, "high": 1.0}]
    for method, label in methods:
        kept = {name: method["kept"][name] for name in ("share", "low", "high")}
        rows.append({"method": method["name"], "label": label, "flops_cut": method["flops_reduction"], **kept})
    return with_best(rows)


def with_best(rows: Rows) -> Rows:
    """`best`: 1 where no row saves at least as much and keeps at least as much, one of the two more; else 0."""

    def beaten(row: dict[str, Any]) -> bool:
        own = row["flops_cut"], row["share"]
        others = ((other["flops_cut"], other["share"]) for other in rows)
        return any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in others)

    return [{**row, "best": int(not beaten(row))} for row in rows]


def kept(run: Run) -> Rows:
    """method, label, share, low, high, items, gained: answers kept, with their 95 % interval."""
    return [
        {"method": method["name"], "label": label, **{key: method["kept"].get(key) for key in KEPT}}
        for method, label in method_labels(run["evaluate"])
        if method.get("kept")
    ]


KEPT = ("share", "low", "high", "items", "gained")


def kl(run: Run) -> Rows:
    """method, label, mean, p99, noise_floor: KL per continuation token (nats)."""
    floor = (run["evaluate"] or {}).get("noise_floor") or {}
    return [
        {
            "method": method["name"],
            "label": label,
            "mean": method["kl"]["mean"],
            "p99": method["kl"]["p99"],
            "noise_floor": floor.get("kl"),
        }
        for method, label in method_labels(run["evaluate"])
        if method.get("kl")
    ]


def kept_by_distance(run: Run) -> Rows:
    """method, label, distance, share, low, high, items: answers kept, by how far back the fact lies (tokens)."""
    return [
        {"method": method["name"], "label": label, "distance": distance, **{key: at.get(key) for key in KEPT[:4]}}
        for method, label in method_labels(run["evaluate"])
        for distance, at in ((method.get("kept") or {}).get("by_distance") or {}).items()
    ]


def speed(run: Run) -> Rows:
    """The benchmark's rows as they are: length, batch, kv, budget, speedup, low, high, flops_limit, …"""
    found = run["benchmark"]
    return [dict(row) for row in found["rows"]] if found else []
