"""From the stages' JSON to rows: what a figure draws is exactly what its CSV holds.

Every function takes the run (`reading.read_run`) and returns a list of flat dicts with equal keys, one per row; an
empty list where the stage has not been run. Blocks are numbered from 1 (nearest the input). Numbers are passed on
untouched.
"""

from collections.abc import Sequence
from typing import Any

from ftp_lightning.report.reading import Run
from ftp_lightning.report.wording import headline_method, kv_per_block

Rows = list[dict[str, Any]]


def by_block(**columns: Sequence[Any] | None) -> Rows:
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
    """block, static_search, fine_tuned, realised: sparsity per block; `realised` is that of the headline method.
    static_search_kv, fine_tuned_kv: the kv mode of every block, where the schedule says it."""
    search, tuned = run["search_schedule"], run["finetune_schedule"]
    if not search and not tuned:
        return []
    method = headline_method(run["evaluate"]) or {}
    return by_block(
        static_search=search and search["sparsity"],
        fine_tuned=tuned and tuned["sparsity"],
        realised=method.get("realised_per_block"),
        static_search_kv=search and kv_per_block(search),
        fine_tuned_kv=tuned and kv_per_block(tuned),
    )


def sensitivity(run: Run) -> Rows:
    """block, "sparsity 0.3", …: KL per continuation token when this block alone skips that share of tokens; where
    several kv modes were measured "keep, sparsity 0.3", …"""
    found = run["sensitivity"]
    if not found:
        return []
    by_kv = found.get("kl_by_kv") or {}
    by_kv = {f"{kv}, ": kl for kv, kl in by_kv.items()} if len(by_kv) > 1 else {"": found["kl"]}
    return by_block(
        **{
            f"{kv}sparsity {level:g}": list(column)
            for kv, kl in by_kv.items()
            for level, column in zip(found["levels"], zip(*kl, strict=True), strict=True)
        }
    )


def influence(run: Run) -> Rows:
    """block, block_influence, "cosine > 0.8", …: how far a block turns its input, and for how many tokens hardly."""
    found = run["sensitivity"]
    if not found:
        return []
    redundancy = {f"cosine > {level}": shares for level, shares in found.get("redundancy", {}).items()}
    return by_block(block_influence=found["block_influence"], **redundancy)


def gradient(run: Run) -> Rows:
    """block, gradient: mean |dL/dg| of a gate on the block's update of each prompt token (nats)."""
    found = run["sensitivity"]
    return by_block(gradient=found.get("gradient")) if found else []


def positions(run: Run) -> Rows:
    """block, "same > 0.8", "chance > 0.8", "explained > 0.8", …: whether the tokens that a block hardly turns stand at
    the same positions in every text (pooled Jaccard index; that of as many tokens anywhere; R² of position alone)."""
    measured = (run["sensitivity"] or {}).get("position") or {}
    names = {"same": "jaccard", "chance": "jaccard_by_chance", "explained": "explained"}
    return by_block(**{f"{own} > {at}": values[key] for at, values in measured.items() for own, key in names.items()})


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


def weighted(run: Run) -> Rows:
    """step, distillation, sparsity, guide: lambda times the loss at every step; empty where it was not logged."""
    steps = (run["train"] or {}).get("steps") or []
    if not steps or "weighted_distillation" not in steps[0]:
        return []
    names = ("distillation", "sparsity", "guide")
    return [{"step": step["step"], **{name: step[f"weighted_{name}"] for name in names}} for step in steps]


def validation(run: Run) -> Rows:
    """step, kl: KL per continuation token on validation windows during training."""
    found = run["train"]
    return [dict(point) for point in found.get("validation_kl", [])] if found else []


def target_and_soft(run: Run) -> Rows:
    """block, target, soft, realised: the sparsity asked of the router, 1 - mean p_compute, and the share of tokens that
    skipped, at the end of training."""
    found = run["train"]
    if not found:
        return []
    values = {name: found.get(f"{name}_sparsity") for name in ("target", "soft", "realised")}
    return by_block(**values)
