"""The method's failure signatures: rules fixed beforehand, looked for in what a run has measured. All are [ours]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftp_lightning.report.reading import Run
from ftp_lightning.report.tables import headline_method, number, percent

KEPT_ENOUGH = 0.9
FEW_ITEMS = 30
HARD = 0.8
MOST_DAMAGE = 0.5
DROWNED = 0.1
UNMET = 0.1
OFF_TARGET = 0.05
WORSE = 1.1
LOSSES = ("distillation", "sparsity", "guide")


@dataclass(frozen=True)
class Signature:
    """A way in which the method fails, and how it shows.

    Args:
        name: what goes wrong.
        rule: the test in words, with its thresholds.
        remedy: what to try.
        needs: what of the run it looks at, products (keys of `reading.PRODUCTS`) or what they must hold, by name: a
            function that is true where it is there.
        evidence: the sentence that says what was found; None where the rule does not hold.
    """

    name: str
    rule: str
    remedy: str
    needs: dict[str, Callable[[Run], Any]]
    evidence: Callable[[Run], str | None]


def diagnose(run: Run) -> dict[str, Any]:
    """{"summary", "checks"}: every signature with its state, "found", "clear" or "unknown", those found first."""
    checks = sorted((check(signature, run) for signature in SIGNATURES), key=lambda c: ORDER.index(c["state"]))
    found, unknown = (sum(c["state"] == state for c in checks) for state in ("found", "unknown"))
    summary = f"{found or 'None'} of {len(checks)} failure signatures found."
    if unknown:
        summary += f" {unknown} could not be looked for."
    return {"summary": summary, "checks": checks}


ORDER = ("found", "unknown", "clear")
SAID = {"found": "found", "unknown": "not looked for", "clear": "not found"}


def check(signature: Signature, run: Run) -> dict[str, Any]:
    """One signature on one run."""
    missing = [name for name, there in signature.needs.items() if not there(run)]
    evidence = None if missing else signature.evidence(run)
    state = "unknown" if missing else "found" if evidence else "clear"
    return {
        "name": signature.name,
        "rule": signature.rule,
        "remedy": signature.remedy,
        "state": state,
        "said": SAID[state],
        "evidence": evidence,
        "missing": missing,
    }


# ---------------------------------------------------------------- what the rules look at


def _kept(run: Run, name: str | None = None) -> dict[str, Any] | None:
    """Answers kept by the headline method, or by the method called `name`."""
    methods = (run["evaluate"] or {}).get("methods") or []
    chosen = headline_method(run["evaluate"]) if name is None else next((m for m in methods if m["name"] == name), None)
    return (chosen or {}).get("kept")


def _rival(run: Run) -> str | None:
    """Of the baselines that choose tokens without a trained router, the one of the same schedule or less."""
    if (headline_method(run["evaluate"]) or {}).get("name") != "dynamic":
        return None
    return next((name for name in ("static", "uniform", "random") if _kept(run, name)), None)


def _kl(run: Run, name: str) -> float | None:
    methods = (run["evaluate"] or {}).get("methods") or []
    return next((m["kl"]["mean"] for m in methods if m["name"] == name and m.get("kl")), None)


def _weighted(run: Run) -> list[dict[str, float]]:
    """Weighted losses of every step: lambda times the loss, as they are added up; empty where they were not logged."""
    steps = (run["train"] or {}).get("steps") or []
    return steps if steps and all(f"weighted_{name}" in steps[0] for name in LOSSES) else []


def _schedule(run: Run) -> list[float]:
    found = run["finetune_schedule"] or run["search_schedule"]
    return found["sparsity"] if found else []


def _schedule_kl(run: Run) -> float | None:
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


# ---------------------------------------------------------------- the rules


def important_tokens(run: Run) -> str | None:
    """The whole interval of the answers kept lies below `KEPT_ENOUGH`; says at which distance most are lost."""
    kept = _kept(run)
    if kept["high"] >= KEPT_ENOUGH:
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
    found, whole, guilty = run["sensitivity"], _schedule_kl(run), []
    mean = sum(found["block_influence"]) / len(found["block_influence"])
    for block, sparsity in enumerate(_schedule(run)):
        alone = single_block_kl(found, block, sparsity)
        redundant = found["block_influence"][block] < mean
        if redundant and sparsity >= HARD and alone > 0 and alone >= MOST_DAMAGE * whole:
            guilty.append(f"block {block + 1} ({percent(sparsity, 0)} skip it, KL {number(alone)} by itself)")
    return f"{', '.join(guilty)}; the whole schedule has KL {number(whole)}." if guilty else None


def drowned_loss(run: Run) -> str | None:
    """A loss whose aim is not met has on average less than `DROWNED` of the weighted sum: the others decide."""
    steps = _weighted(run)
    end = steps[-max(1, len(steps) // 5) :]
    unmet = {
        "sparsity": (end, _mean(end, "sparsity") > UNMET, "blocks are still under-pruned"),
        "distillation": (steps, _never_better(run["train"]), "validation KL never fell below its first value"),
    }
    for name, (window, failed, how) in unmet.items():
        means = {other: _mean(window, f"weighted_{other}") for other in LOSSES}
        total = sum(means.values())
        if failed and total > 0 and means[name] / total < DROWNED:
            loudest = max(means, key=means.__getitem__)
            share = f"{percent(means[name] / total)} of the weighted loss, {loudest} {percent(means[loudest] / total)}"
            return f"{name} is {share}, and {how}."
    return None


def _mean(steps: list[dict[str, float]], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)


def _never_better(train: dict[str, Any]) -> bool:
    """Whether no later validation is below the first; False where there are not two."""
    values = [point["kl"] for point in train.get("validation_kl") or []]
    return len(values) > 1 and min(values[1:]) >= values[0]


def no_better_router(run: Run) -> str | None:
    """The trained router keeps no more than a baseline that looks at no token: its share is not above theirs."""
    own, rival = _kept(run), _rival(run)
    other = _kept(run, rival)
    if own["share"] > other["share"]:
        return None
    shares = percent(own["share"]), percent(other["share"])
    return f"The trained router keeps {shares[0]} of the answers, the method “{rival}” {shares[1]}."


def off_target(run: Run) -> str | None:
    """A block's realised sparsity is more than `OFF_TARGET` from the schedule."""
    from ftp_lightning.report.series import realised

    rows = [row for row in realised(run) if abs(row["realised"] - row["target"]) > OFF_TARGET]
    if not rows:
        return None
    worst = max(rows, key=lambda row: abs(row["realised"] - row["target"]))
    what = f"{percent(worst['realised'])} instead of {percent(worst['target'])} skip block {worst['block']}"
    return f"{len(rows)} block{'' if len(rows) == 1 else 's'} off target; {what}."


def overfitted(run: Run) -> str | None:
    """Fine-tuning raised the KL on the evaluation's text by more than a tenth."""
    before, after = _kl(run, "dynamic (before fine-tuning)"), _kl(run, "dynamic")
    if after <= WORSE * before:
        return None
    return f"KL on the evaluation's text rose from {number(before)} to {number(after)} by fine-tuning."


def _per_block(run: Run) -> bool:
    from ftp_lightning.report.series import realised

    return bool(realised(run))


SIGNATURES = (
    Signature(
        "Important tokens are pruned",
        f"the 95 % interval of the answers kept lies below {percent(KEPT_ENOUGH, 0)}.",
        "Try kv keep, a lower budget, more steps of training, or text with facts to recall (--recall_share).",
        {"answers kept (evaluate)": _kept},
        important_tokens,
    ),
    Signature(
        "A redundant block is pruned too hard",
        f"Block Influence is below the mean, at least {percent(HARD, 0)} skip the block, and this block alone costs at "
        f"least {percent(MOST_DAMAGE, 0)} of the KL of the whole schedule.",
        "Search longer, or bound the block by --max_sparsity.",
        {
            "sensitivity": lambda run: run["sensitivity"],
            "a schedule searched by KL": lambda run: _schedule(run) and _schedule_kl(run) is not None,
        },
        pruned_too_hard,
    ),
    Signature(
        "One loss drowns another",
        f"a loss has less than {percent(DROWNED, 0)} of the weighted sum and misses its aim: sparsity, over the last "
        f"fifth of the steps, stays above {UNMET}; distillation, over all steps, and no validation KL is below the "
        "first.",
        "Raise its weight (--lambda_d, --lambda_s), or let the guide fade sooner (--guide_share).",
        {"weighted losses (train)": _weighted},
        drowned_loss,
    ),
    Signature(
        "The trained router is no better than one that looks at no token",
        "it keeps no larger share of the answers than the method static (else uniform, else random).",
        "Train longer, on text that needs the prompt; or deploy the static router, which costs nothing.",
        {"dynamic and a baseline (evaluate)": _rival},
        no_better_router,
    ),
    Signature(
        "The schedule is not met",
        f"a block's realised sparsity is more than {OFF_TARGET} from its target.",
        "Use choice topk, or longer prompts: in short ones the reserved tokens weigh.",
        {"schedule and evaluation of one method": _per_block},
        off_target,
    ),
    Signature(
        "Fine-tuning fits its calibration text only",
        f"KL on the evaluation's text is more than {WORSE} times what it was before fine-tuning.",
        "Give the search more windows (--search_windows), from text like that of the evaluation.",
        {
            "KL before and after fine-tuning (evaluate)": lambda run: (
                _kl(run, "dynamic") is not None and _kl(run, "dynamic (before fine-tuning)") is not None
            )
        },
        overfitted,
    ),
)
