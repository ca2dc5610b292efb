"""One sentence, and a handful of numbers, computed from what the run measured."""

import math
from typing import Any

from ftp_lightning.report.reading import Run
from ftp_lightning.report.wording import floor_kl_text, headline_method, kept_text, number, percent

ENOUGH_ITEMS = 2000  # [ours] fewer answers than this are a quick look (method, section 8)


def verdict(run: Run) -> str:
    """What was skipped, what it cost and what it brought: only clauses whose numbers exist."""
    method, row = headline_method(run["evaluate"]), speed_row(run)
    clauses = []
    if method:
        clauses.append(f"{percent(method['realised_sparsity'])} of the prompt's token-block computations are skipped")
    if method and method.get("kept"):
        clauses.append(f"{kept_text(method['kept'])} of the answers that need the prompt are kept")
    if row:
        clauses.append(speed_clause(row))
    if not clauses:
        return "This run has not been evaluated yet."
    sentence = "; ".join(clauses)
    return sentence[0].upper() + sentence[1:] + "."


def speed_clause(row: dict[str, Any]) -> str:
    """Measured time with its interval, beside what the FLOPs allow, at the length it was measured."""
    pace = f"{row['speedup']:.2f}x [{row['low']:.2f}, {row['high']:.2f}], limit {row['flops_limit']:.2f}x"
    if row["low"] <= 1 <= row["high"]:
        return f"no measurable difference in prefill time at {row['length']:,} tokens ({pace})"
    direction = "faster" if row["speedup"] > 1 else "slower"
    return f"prefill of {row['length']:,} tokens is {direction} than dense ({pace})"


def speed_row(run: Run) -> dict[str, Any] | None:
    """The benchmark row of the headline method's budget and kv mode: smallest batch, then longest prompt.

    The rule is fixed beforehand, so the row cannot be picked by its result; other settings are never quoted.
    """
    return min(speed_rows(run), key=lambda row: (row["batch"], -row["length"]), default=None)


def speed_rows(run: Run) -> list[dict[str, Any]]:
    """The benchmark rows of the headline method's budget and kv mode."""
    rows = (run["benchmark"] or {}).get("rows") or []
    method = headline_method(run["evaluate"])
    if method:
        budget, kv = method["budget"], method["kv"]
        rows = [row for row in rows if math.isclose(row["budget"], budget, abs_tol=1e-6) and row["kv"] == kv]
    return rows


def cautions(run: Run) -> list[str]:
    """What a reader must know before quoting the verdict."""
    method = headline_method(run["evaluate"]) or {}
    items = (method.get("kept") or {}).get("items")
    found = []
    if items is not None and items < ENOUGH_ITEMS:
        found.append(f"A quick look: {items:,} answers; quote at least {ENOUGH_ITEMS:,}.")
    realised, budget = method.get("realised_sparsity"), method.get("budget")
    if budget and realised is not None and realised < budget / 2:
        found.append(f"Not exercised: only {percent(realised)} was skipped where {percent(budget, 0)} was asked for.")
    slow = sorted({row["length"] for row in speed_rows(run) if row["high"] < 1})
    if slow:
        found.append(f"Slower than dense: prefill of {', '.join(f'{length:,}' for length in slow)} tokens.")
    return found


def cards(run: Run) -> list[dict[str, str]]:
    """The numbers at the top of the page: `{"value", "name", "note"}`."""
    method, row = headline_method(run["evaluate"]), speed_row(run)
    found = []
    if method:
        floor = (run["evaluate"].get("noise_floor") or {}).get("kl")
        kept, kl = method.get("kept") or {}, method.get("kl") or {}
        limits = f"95 %: {percent(kept.get('low'), unit='')} to {percent(kept.get('high'))}"
        found += [
            card(
                percent(method["realised_sparsity"]),
                "skipped",
                f"budget {percent(method['budget'], 0)}, kv {method['kv']}",
            ),
            card(percent(method.get("flops_reduction")), "fewer FLOPs", "over the prompt"),
            card(percent(kept.get("share")), "answers kept", limits),
            card(number(kl.get("mean")), "KL to dense", f"nats per token; noise floor {floor_kl_text(floor)}"),
        ]
    if row:
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        note = f"{interval} at {row['length']:,} tokens; limit {row['flops_limit']:.2f}x"
        found.append(card(f"{row['speedup']:.2f}x", "prefill speed", note))
    return found


def card(value: str, name: str, note: str) -> dict[str, str]:
    """One number of the strip at the top."""
    return {"value": value, "name": name, "note": note}
