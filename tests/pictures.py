"""Whether a figure that a script has drawn shows anything; and reports without drawings."""

from pathlib import Path

import matplotlib.image


def sketch(plot, rows):
    """In place of `report.page.draw`, which takes most of the time of a report: files without a drawing."""
    return {"svg": "<svg></svg>", "png": b"", "csv": b""} if rows else None


def shows_something(path: Path) -> bool:
    """A picture that can be read and has marks on at least a hundredth of it."""
    picture = matplotlib.image.imread(path)
    return bool((picture != picture[0, 0]).any(axis=-1).mean() > 0.01)
