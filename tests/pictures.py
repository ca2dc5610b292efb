"""Whether a figure that a script has drawn shows anything."""

from pathlib import Path

import matplotlib.image


def shows_something(path: Path) -> bool:
    """A picture that can be read and has marks on at least a hundredth of it."""
    picture = matplotlib.image.imread(path)
    return bool((picture != picture[0, 0]).any(axis=-1).mean() > 0.01)
