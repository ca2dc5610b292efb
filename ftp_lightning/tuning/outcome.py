"""tune.json: what a tuning found, and the sentences that say it."""

from __future__ import annotations

from typing import Any

from ftp_lightning.evaluation.statistics import Interval
from ftp_lightning.tuning.promise import holds
from ftp_lightning.tuning.tuner import Rung, Tuned


def outcome(tuned: Tuned, keep: float, prompts: dict[str, Any]) -> dict[str, Any]:
    """JSON-able: `curve` on validation prompts, the `chosen` cut, `held_out`, the recipes tried, and `sentences`.

    prompts: counts, for the record.
    """
    curve = [rung_record(rung) | {"holds": holds(rung.kept, keep)} for rung in tuned.rungs]
    found = {
        "keep": keep,
        "recipe": tuned.chosen.name,
        "chosen": curve[tuned.left - 1],
        "confirmed": tuned.confirmed,
        "held_out": [rung_record(rung) for rung in tuned.held_out],
        "curve": curve,
        "family": [{"cut": cut, "budget": one.budget} for cut, one in tuned.chosen.schedules.items()],
        "ended_by_time": tuned.timed_out,
        "recipes": {one.name: list(map(rung_record, one.curve)) for one in (tuned.chosen, *tuned.others)},
        "untried": tuned.untried,
        "prompts": prompts,
    }
    return found | {"sentences": sentences(found)}


def rung_record(rung: Rung) -> dict[str, Any]:
    """A row of the curve."""
    told: dict[str, Any] = {
        "cut": rung.cut,
        "flops_cut": rung.flops_cut,
        "budget": rung.budget,
        "items": rung.kept.items,
    }
    told |= _ends("kept", rung.kept) | _ends("first", rung.first) | {"kl": rung.kl}
    return told | ({} if rung.speed is None else _ends("speed", rung.speed))


def _ends(name: str, interval: Interval) -> dict[str, float | None]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def sentences(found: dict[str, Any]) -> list[str]:
    """What a user should know, most important first."""
    chosen, first = found["chosen"], found["held_out"][0]
    target = f"{100 * found['keep']:.4g} %"
    told = [
        f"A cut of {chosen['flops_cut']:.1%} of the prefill's FLOPs keeps at least {target} of the model's own "
        f"answers: {share(chosen)} of {chosen['items']} validation answers."
    ]
    if found["confirmed"]:
        told.append(f"Held-out prompts confirm it: {share(first)} of {first['items']}.")
    else:
        told.insert(
            0,
            f"Held-out prompts did not confirm the cut of {first['flops_cut']:.1%}: it keeps {share(first)} of "
            f"{first['items']} of their answers, {target} were asked for. The next cut that would hold is taken.",
        )
        told.append("No prompts are left to confirm it: run `tune` again with more of them to be sure.")
    if (speed := chosen.get("speed")) is not None:
        gain = f"comes {speed:.2f} times as fast" if speed >= 1 else f"takes {1 / speed:.2f} times as long"
        more = "." if speed >= 1 else ": your prompts are too short, or the model too small, to gain time."
        told.append(f"The first token of a typical prompt {gain}{more}")
    if found["ended_by_time"]:
        told.append("Time was out before a cut failed: more --minutes may find a larger one.")
    elif found["curve"][-1]["holds"]:
        told.append("No cut that was tried fails: larger --cuts may hold as well.")
    return told


def share(row: dict[str, Any]) -> str:
    """ "98.9 % (94.0 to 99.8)"."""
    value, low, high = (row[name] for name in ("kept", "kept_low", "kept_high"))
    ends = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * value:.1f} %{ends}"
