"""What the failure signatures look at in a run, and their rules: each gives the sentence of what was found, or None.

All thresholds are [ours]; `diagnostics` tells them in words.
"""

from __future__ import annotations

from typing import Any

from ftp_lightning.report.outcome_series import realised
from ftp_lightning.report.reading import Run
from ftp_lightning.report.wording import headline_method, number, percent

KEPT_ENOUGH = 0.9
FEW_ITEMS = 30
HARD = 0.8
MOST_DAMAGE = 0.5
DROWNED = 0.1
UNMET = 0.1
OFF_TARGET = 0.05
WORSE = 1.1
LOSSES = ("distillation", "sparsity", "guide")


def kept_by(run: Run, name: str | None = None) -> dict[str, Any] | None:
    """Answers kept by the headline method, or by the method called `name`."""
    methods = (run["evaluate"] or {}).get("methods") or []
    chosen = headline_method(run["evaluate"]) if name is None else next((m for m in methods if m["name"] == name), None)
    return (chosen or {}).get("kept")


def rival(run: Run) -> str | None:
    """Of the baselines that choose tokens without a trained router, the one of the same schedule or less."""
    if (headline_method(run["evaluate"]) or {}).get("name") != "dynamic":
        return None
    return next((name for name in ("static", "uniform", "random") if kept_by(run, name)), None)


def kl(run: Run, name: str) -> float | None:
    methods = (run["evaluate"] or {}).get("methods") or []
    return next((m["kl"]["mean"] for m in methods if m["name"] == name and m.get("kl")), None)


def weighted(run: Run) -> list[dict[str, float]]:
    """Weighted losses of every step: lambda times the loss, as they are added up; empty where they were not logged."""
    steps = (run["train"] or {}).get("steps") or []
    return steps if steps and all(f"weighted_{name}" in steps[0] for name in LOSSES) else []


def schedule(run: Run) -> list[float]:
    found = run["finetune_schedule"] or run["search_schedule"]
    return found["sparsity"] if found else []


def schedule_kl(run: Run) -> float | None:
    """KL of the last schedule on calibration windows, where that is what the search minimised."""
    stage = "finetune" if run["finetune"] else "search"
    if not run[stage] or (run.get("criteria") or {}).get(stage, "kl") != "kl":
        return None
    return run[stage]["value"]


def single_block_kl(found: dict[str, Any], block: int, sparsity: float) -> float:
    """KL when `block` (from 0) alone is pruned at `sparsity`, linear between the measured levels, from (0, 0) on;
    beyond the last level its value."""
    levels, values = [0.0, *found["levels"]], [0.0, *found["kl"][block]]
    for (low, at_low), (high, at_high) in zip(zip(levels, values), zip(levels[1:], values[1:])):
        if sparsity <= high:
            return at_low + (at_high - at_low) * (sparsity - low) / (high - low)
    return values[-1]


def important_tokens(run: Run) -> str | None:
    """The whole interval of the answers kept lies below `KEPT_ENOUGH`; says at which distance most are lost."""
    kept = kept_by(run)
    if kept["high"] is None or kept["high"] >= KEPT_ENOUGH:
        return None
    lost = f"{percent(1 - kept['share'])} of {kept['items']:,} answers that need the prompt are lost"
    bins = {d: at for d, at in (kept.get("by_distance") or {}).items() if at["items"] >= FEW_ITEMS}
    if len(bins) < 2:
        return lost + ": tokens that held them were skipped."
    worst = min(bins, key=lambda distance: bins[distance]["share"])
    return f"{lost}, most where the fact lies {worst} tokens back ({percent(bins[worst]['share'])} kept there)."


def pruned_too_hard(run: Run) -> str | None:
    """A block that looks redundant (Block Influence below the mean) is pruned at `HARD` or more, and what pruning it
    alone costs is `MOST_DAMAGE` or more of the KL of the whole schedule."""
    found, whole, guilty = run["sensitivity"], schedule_kl(run), []
    mean = sum(found["block_influence"]) / len(found["block_influence"])
    for block, sparsity in enumerate(schedule(run)):
        alone = single_block_kl(found, block, sparsity)
        redundant = found["block_influence"][block] < mean
        if redundant and sparsity >= HARD and alone > 0 and alone >= MOST_DAMAGE * whole:
            guilty.append(f"block {block + 1} ({percent(sparsity, 0)} skip it, KL {number(alone)} by itself)")
    return f"{', '.join(guilty)}; the whole schedule has KL {number(whole)}." if guilty else None


def drowned_loss(run: Run) -> str | None:
    """A loss whose aim is not met has on average less than `DROWNED` of the weighted sum: the others decide."""
    steps = weighted(run)
    end = steps[-max(1, len(steps) // 5) :]
    unmet = {
        "sparsity": (end, mean(end, "sparsity") > UNMET, "blocks are still under-pruned"),
        "distillation": (steps, never_better(run["train"]), "validation KL never fell below its first value"),
    }
    for name, (window, failed, how) in unmet.items():
        means = {other: mean(window, f"weighted_{other}") for other in LOSSES}
        total = sum(means.values())
        if failed and total > 0 and means[name] / total < DROWNED:
            loudest = max(means, key=means.__getitem__)
            share = f"{percent(means[name] / total)} of the weighted loss, {loudest} {percent(means[loudest] / total)}"
            return f"{name} is {share}, and {how}."
    return None


def mean(steps: list[dict[str, float]], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)


def never_better(train: dict[str, Any]) -> bool:
    """Whether no later validation is below the first; False where there are not two."""
    values = [point["kl"] for point in train.get("validation_kl") or []]
    return len(values) > 1 and min(values[1:]) >= values[0]


def no_better_router(run: Run) -> str | None:
    """The trained router keeps no more than a baseline that looks at no token: its share is not above theirs."""
    own, name = kept_by(run), rival(run)
    other = kept_by(run, name)
    if own["share"] > other["share"]:
        return None
    shares = percent(own["share"]), percent(other["share"])
    return f"The trained router keeps {shares[0]} of the answers, the method “{name}” {shares[1]}."


def off_target(run: Run) -> str | None:
    """A block's realised sparsity is more than `OFF_TARGET` from the schedule."""
    rows = [row for row in realised(run) if abs(row["realised"] - row["target"]) > OFF_TARGET]
    if not rows:
        return None
    worst = max(rows, key=lambda row: abs(row["realised"] - row["target"]))
    what = f"{percent(worst['realised'])} instead of {percent(worst['target'])} skip block {worst['block']}"
    return f"{len(rows)} block{'' if len(rows) == 1 else 's'} off target; {what}."


def overfitted(run: Run) -> str | None:
    """Fine-tuning raised the KL on the evaluation's text by more than a tenth."""
    before, after = kl(run, "dynamic (before fine-tuning)"), kl(run, "dynamic")
    if after <= WORSE * before:
        return None
    return f"KL on the evaluation's text rose from {number(before)} to {number(after)} by fine-tuning."


def per_block(run: Run) -> bool:
    return bool(realised(run))
