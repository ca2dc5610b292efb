"""The pictures that loggers keep of a pruner: its schedule, and its gates on a text."""

from __future__ import annotations

from collections.abc import Sequence

from ftp_lightning.report.figures import block_axis, schedules
from ftp_lightning.report.series import by_block
from ftp_lightning.report.style import canvas, house_style, to_png


def schedule_png(
    sparsity: Sequence[float], realised: Sequence[float] | None = None, kv: Sequence[str] | None = None
) -> bytes:
    """Sparsity and kv mode per block, and what was realised."""
    rows = by_block(static_search=sparsity, realised=realised, static_search_kv=kv)
    with house_style():
        return to_png(schedules(rows))


def gates_png(keep: Sequence[Sequence[int]]) -> bytes:
    """Which tokens (down) which block (across) computes, dark, and skips, light. keep: N rows of T zeros and ones."""
    with house_style():
        figure, axis = canvas(1.6 + 0.3 * len(keep), 4.6)
        columns = [list(column) for column in zip(*keep)]
        axis.imshow(columns, aspect="auto", cmap="cividis_r", vmin=0, vmax=1, interpolation="nearest",
                    extent=(0.5, len(keep) + 0.5, len(columns), 0))  # fmt: skip
        block_axis(axis, len(keep))
        axis.set(ylabel="token of the prompt")
        return to_png(figure)
