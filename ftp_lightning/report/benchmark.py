"""The benchmark's own files: its rows as CSV and as a figure, the same as in the report of a run."""

from collections.abc import Callable
from pathlib import Path

from ftp_lightning.report.outcome_figures import speed
from ftp_lightning.report.page import to_csv
from ftp_lightning.report.series import Rows
from ftp_lightning.report.style import freeze, house_style, to_png


def write_benchmark(rows: Rows, place: Callable[[str], Path]) -> None:
    """benchmark.csv and benchmark.png, each at the path that `place` gives for its name."""
    place("benchmark.csv").write_bytes(to_csv(rows))
    with house_style("benchmark"):
        figure = speed(rows)
        freeze(figure)
        place("benchmark.png").write_bytes(to_png(figure))
