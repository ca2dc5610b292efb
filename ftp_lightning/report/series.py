"""From the stages' JSON to rows: what a figure draws is exactly what its CSV holds.

Every function takes the run (`reading.read_run`) and returns a list of flat dicts with equal keys, one per row; an
empty list where the stage has not been run. Blocks are numbered from 1 (nearest the input). Numbers are passed on
untouched.
"""

from typing import Any

from ftp_lightning.report.reading import Run
from ftp_lightning.report.tables import headline_method, method_labels

Rows = list[dict[str, Any]]


def by_block(**columns: list[float] | None) -> Rows:
    """Columns of one value per block, side by side; a column that is None is left out."""
    present = {name: values for name, values in columns.items() if values is not None}
    if not present:
        return []
    names = list(present)
    return [
        {"block": block, **dict(zip(names, values, strict=True))}
        for block, values in enumerate(zip(*present.values(), strict=True), start=1)
    ]


def schedules(run: Run) -> Rows:
    """block, static_search, fine_tuned, realised: sparsity per block; `realised` is that of the headline method."""
    search, tuned = run["search_schedule"], run["finetune_schedule"]
    if not search and not tuned:
        return []
    method = headline_method(run["evaluate"]) or {}
    return by_block(
        static_search=search and search["sparsity"],
        fine_tuned=tuned and tuned["sparsity"],
        realised=method.get("realised_per_block"),
    )


def sensitivity(run: Run) -> Rows:
    """block, "sparsity 0.3", …: KL per continuation token when this block alone skips that share of tokens."""
    found = run["sensitivity"]
    if not found:
        return []
    columns = zip(*found["kl"], strict=True)
    return by_block(**{f"sparsity {level:g}": list(kl) for level, kl in zip(found["levels"], columns, strict=True)})


def influence(run: Run) -> Rows:
    """block, block_influence, "cosine > 0.8", …: how far a block turns its input, and for how many tokens hardly."""
    found = run["sensitivity"]
    if not found:
        return []
    redundancy = {f"cosine > {level}": shares for level, shares in found.get("redundancy", {}).items()}
    return by_block(block_influence=found["block_influence"], **redundancy)


def convergence(run: Run, stage: str) -> Rows:
    """series, forward_tokens, kl: "best" and "mean" of each generation, then allocations and starts (no tokens)."""
    found = run[stage]
    if not found:
        return []
    generations = [
        {"series": series, "forward_tokens": generation["forward_tokens"], "kl": generation[series]}
        for series in ("best", "mean")
        for generation in found["generations"]
    ]
    marks = closed_form(found) | starts(found)
    return generations + [{"series": name, "forward_tokens": None, "kl": kl} for name, kl in marks.items()]


def closed_form(metrics: dict[str, Any]) -> dict[str, float]:
    """Name -> KL of the allocations that need no search; the schedules a search was given to start from are not."""
    allocations = metrics.get("allocations") or {}
    return {allocation_name(name): kl for name, kl in allocations.items() if name not in ("start", "given")}


def allocation_name(name: str) -> str:
    """An allocation's name as it is written on the page."""
    plain = name.replace("_", " ")
    return "Block Influence" if plain == "block influence" else plain


START, OTHER_START = "start", "second start"


def starts(metrics: dict[str, Any]) -> dict[str, float]:
    """Name -> KL of the schedules the search was given: that of the pruner and that of --schedule, often the same."""
    allocations = metrics.get("allocations") or {}
    values = list(dict.fromkeys(allocations[name] for name in ("start", "given") if name in allocations))
    return dict(zip((START, OTHER_START), values))


def losses(run: Run) -> Rows:
    """step, distillation, sparsity, guide, guide_weight, total, agreement: one row per training step."""
    found = run["train"]
    return [dict(step) for step in found["steps"]] if found else []


def validation(run: Run) -> Rows:
    """step, kl: KL per continuation token on validation windows during training."""
    found = run["train"]
    return [dict(point) for point in found.get("validation_kl", [])] if found else []


def target_and_soft(run: Run) -> Rows:
    """block, target, soft: the sparsity asked of the router and 1 - mean p_compute at the end of training."""
    found = run["train"]
    return by_block(target=found["target_sparsity"], soft=found["soft_sparsity"]) if found else []


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
