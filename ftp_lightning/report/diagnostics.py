"""The method's failure signatures: rules fixed beforehand, looked for in what a run has measured. All are [ours]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftp_lightning.report import failure_rules as rules
from ftp_lightning.report.reading import Run
from ftp_lightning.report.wording import percent


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


SIGNATURES = (
    Signature(
        "Important tokens are pruned",
        f"the 95 % interval of the answers kept lies below {percent(rules.KEPT_ENOUGH, 0)}.",
        "Try kv keep, a lower budget, more steps of training, or text with facts to recall (--recall_share).",
        {"answers kept (evaluate)": rules.kept_by},
        rules.important_tokens,
    ),
    Signature(
        "A redundant block is pruned too hard",
        f"Block Influence is below the mean, at least {percent(rules.HARD, 0)} skip the block, and this block alone "
        f"costs at least {percent(rules.MOST_DAMAGE, 0)} of the KL of the whole schedule.",
        "Search longer, or bound the block by --max_sparsity.",
        {
            "sensitivity": lambda run: run["sensitivity"],
            "a schedule searched by KL": lambda run: rules.schedule(run) and rules.schedule_kl(run) is not None,
        },
        rules.pruned_too_hard,
    ),
    Signature(
        "One loss drowns another",
        f"a loss has less than {percent(rules.DROWNED, 0)} of the weighted sum and misses its aim: sparsity, over the "
        f"last fifth of the steps, stays above {rules.UNMET}; distillation, over all steps, and no validation KL is "
        "below the first.",
        "Raise its weight (--lambda_d, --lambda_s), or let the guide fade sooner (--guide_share).",
        {"weighted losses (train)": rules.weighted},
        rules.drowned_loss,
    ),
    Signature(
        "The trained router is no better than one that looks at no token",
        "it keeps no larger share of the answers than the method static (else uniform, else random).",
        "Train longer, on text that needs the prompt; or deploy the static router, which costs nothing.",
        {"dynamic and a baseline (evaluate)": rules.rival},
        rules.no_better_router,
    ),
    Signature(
        "The schedule is not met",
        f"a block's realised sparsity is more than {rules.OFF_TARGET} from its target.",
        "Use choice topk, or longer prompts: in short ones the reserved tokens weigh.",
        {"schedule and evaluation of one method": rules.per_block},
        rules.off_target,
    ),
    Signature(
        "Fine-tuning fits its calibration text only",
        f"KL on the evaluation's text is more than {rules.WORSE} times what it was before fine-tuning.",
        "Give the search more windows (--search_windows), from text like that of the evaluation.",
        {
            "KL before and after fine-tuning (evaluate)": lambda run: (
                rules.kl(run, "dynamic") is not None and rules.kl(run, "dynamic (before fine-tuning)") is not None
            )
        },
        rules.overfitted,
    ),
)
