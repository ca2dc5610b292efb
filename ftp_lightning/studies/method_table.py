"""Tables of methods against cuts, made from the record of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ftp_lightning.evaluation.record import DENSE, flops_cut, kept, mean

if TYPE_CHECKING:
    from pandas import DataFrame


def kept_table(items: DataFrame, by: Sequence[str] = ("model", "task")) -> str:
    """Markdown: a table per model and task; a row per method, a column per cut.

    A cell holds the answers kept in per cent with their 95 % interval, then the FLOPs cut that was realised, and the KL
    per token with its interval where the rows have one.
    """
    from pandas import DataFrame

    shown = []
    for names, own in items.groupby(list(by), sort=False):
        rows: dict[str, dict[str, str]] = {}
        pruned = own[(own["method"] != DENSE) & ~own["task"].str.endswith("_deleted")]
        for (cut, method), found in pruned.groupby(["cut", "method"]):
            if found["needed"].astype(bool).any():
                rows.setdefault(method, {})[f"{cut:.0%} of the FLOPs"] = _cell(found)
        if not rows:
            continue
        frame = DataFrame.from_dict(rows, orient="index").fillna("–").rename_axis("kept, % [95 %] (cut)")
        needed = int(pruned.groupby(["cut", "method"])["needed"].sum().max())
        shown.append(f"### {', '.join(names)}: {needed} answers\n\n{frame.to_markdown()}\n")
    return "\n".join(shown)


def _cell(found: DataFrame) -> str:
    cut = flops_cut(found)
    more = [f"{cut:.0%}"] if cut is not None else []
    if "kl" in found and found["kl"].notna().any():
        more.append(f"KL {mean(found, 'kl'):.2g}")
    return f"{kept(found).scaled(100):.0f} ({', '.join(more)})"
